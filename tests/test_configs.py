"""Launch configs: chosen for anything, and compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_ops.kernels import configs
from bench.static import SHARED_LIMIT

ROOT = Path(__file__).parent.parent


@settings(deadline=None)
@given(
    kernel=st.sampled_from(["forward", "down", "up", "dz", "weights", "reduce"]),
    M=st.integers(1, 1 << 24),
    D=st.integers(1, 20_000),
    R=st.integers(1, 5000),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    capability=st.tuples(st.integers(0, 15), st.integers(0, 9)),
)
def test_never_an_error(kernel, M, D, R, dtype, capability):
    config = configs.choose(kernel, M, D, R, dtype, capability)
    sides = (config.BLOCK_D, config.BLOCK_R) + ((config.BLOCK_M,) if kernel != "reduce" else ())
    for size in (*sides, config.num_warps):
        assert size > 0 and size & (size - 1) == 0
    assert config.BLOCK_R >= 16
    assert config == configs.choose.__wrapped__(kernel, M, D, R, dtype, capability)


@settings(deadline=None)
@given(
    M=st.integers(1, 1 << 24),
    D=st.integers(1, 20_000),
    R=st.integers(1, 5000),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    capability=st.sampled_from([(8, 0), (9, 0), (10, 0), (12, 0)]),
)
def test_forms_of_forward(M, D, R, dtype, capability):
    """Fused where there is work for all and R fits a tile; split no further than there are columns and registers."""
    splits = configs.splits(M, D, R, dtype, capability, 132)
    assert R <= 128 or splits
    assert M > 64 or splits
    assert splits == 0 or R > 128 or M < 132 * 128
    down, up = (configs.choose(kernel, M, D, R, dtype, capability) for kernel in ("down", "up"))
    assert splits <= -(-D // down.BLOCK_D)
    assert splits <= 1 or splits * up.BLOCK_M * up.BLOCK_R <= 64 * 32 * up.num_warps


# A process of its own: in this one the kernels are interpreted.
COMPILE = """
import dataclasses, json, sys, torch
from bench.static import compile_all
arch, dtypes, sizes = json.loads(sys.argv[1])
x, parameters, products = (getattr(torch, d) for d in dtypes)
for M, D, R in sizes:
    for c in compile_all(D, R, x, arch, parameters, products, M):
        print(json.dumps({"M": M, "D": D, "R": R} | dataclasses.asdict(c)))
"""


def compiled(arch, dtypes, sizes):
    """What bench.static reads off every kernel, with nothing but Triton's own compiler: no GPU, and no driver."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    argument = json.dumps([arch, dtypes, sizes])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, argument],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    for M, D, R in sizes:
        names = {k["kernel"].removesuffix("_kernel") for k in found if [k["M"], k["D"], k["R"]] == [M, D, R]}
        form = {"forward"} if M > 8192 and R <= 128 else {"down", "up"}
        assert names == form | {"dz", "weights", "reduce"}
    for kernel in found:
        assert kernel["shared"] <= SHARED_LIMIT[arch], kernel
    return found


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_default_config_compiles(arch, dtype):
    sizes = [(1 << 16, 768, R) for R in (16, 32, 64, 128, 512)]
    sizes += [(16, 768, 64), (16, 4096, 64), (512, 768, 64)]
    for kernel in compiled(arch, [dtype] * 3, sizes):
        assert kernel["spilled"] == 0, kernel
        if dtype != "float32" and kernel["kernel"] != "reduce_kernel":
            assert kernel["tensor_core"], kernel


AUTOCAST, FP32_PARAMETERS = ("float32", "float32", "bfloat16"), ("float16", "float32", "float16")


@pytest.mark.parametrize(
    "arch, dtypes, R", [(86, AUTOCAST, 16), (100, AUTOCAST, 64), (120, FP32_PARAMETERS, 256)], ids=str
)
def test_mixed_dtypes_fit_shared_memory(arch, dtypes, R):
    """Tiles are loaded at the width they have in memory, which may be more than that of the products."""
    compiled(arch, dtypes, [(1 << 16, 100, R), (512, 4096, R)])
