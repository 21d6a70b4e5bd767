"""Launch configs: chosen for anything. tests/test_static.py compiles them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_ops.kernels import configs


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
    assert splits == 0 or R > 128 or D > 4096 or M < 132 * 128
    assert splits or D <= 4096
    down, up = (configs.choose(kernel, M, D, R, dtype, capability) for kernel in ("down", "up"))
    assert splits <= -(-D // down.BLOCK_D)
    assert splits <= 1 or splits * up.BLOCK_M * up.BLOCK_R <= 64 * 32 * up.num_warps
