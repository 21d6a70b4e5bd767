"""python -m bench.static: compile every kernel for GPUs that are not here, and read the machine code.

The launchers themselves run, on meta tensors, with Triton told to compile and not launch; so what is compiled is what
would run, config and specialisation included. Figures are static: read off cubins, timed by nobody.
"""

import argparse
import collections
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from adapter_ops.kernels import backward, forward, launch, split
from adapter_ops.kernels.launch import Facts, Needs, Options, Weights

# compute capability -> bytes of shared memory a program may have (CUDA C++ Programming Guide, specifications)
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
KERNELS = (
    forward.forward_kernel,
    split.down_kernel,
    split.up_kernel,
    backward.dz_kernel,
    backward.weights_kernel,
    backward.reduce_kernel,
)
TENSOR_CORE = r"\b(UTC\w*MMA|HGMMA|HMMA)\b"


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled: registers a thread, bytes spilled and shared, tensor-core instructions by name."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    tensor_core: dict[str, int]


class _Driver:
    """Stands in for a GPU's driver while compiling."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(
    D: int,
    R: int,
    dtype: torch.dtype,
    arch: int,
    parameter_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    M: int = 1 << 16,
) -> list[Compiled]:
    """Every kernel of a training step on M tokens at its default config, for `arch` such as 90.

    x has `dtype`; so have the parameters and the products unless told otherwise. Where up_kernel runs twice, for y and
    for dx, the first is listed.
    """
    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: there is nothing to compile")
    compiled: dict[str, Any] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.setdefault(kernel.__name__, run(kernel, *args, grid=grid, warmup=True, **kwargs))

    def meta(*shape: int, dtype: torch.dtype = parameter_dtype or dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = meta(M, D, dtype=dtype)
    weights = Weights(meta(R, D), meta(R), meta(D, R), meta(D), None)
    options = Options("gelu", 1.0, compute_dtype or dtype)
    facts, run = launch.facts, triton.JITFunction.run
    launch.facts = lambda device: Facts((arch // 10, arch % 10), 132)  # type: ignore[assignment]
    triton.JITFunction.run = record
    driver.set_active(_Driver(arch))
    for kernel in KERNELS:
        kernel.device_caches.clear()
    try:
        forward.forward(x, x, weights, options, True)
        needs = Needs(True, True, True, True, True, False)
        backward.backward(x, x, meta(M, R, dtype=options.dtype), weights, options, needs, True)
    finally:
        launch.facts, triton.JITFunction.run = facts, run
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            driver.reset_active()
    return [_read(name, binary) for name, binary in compiled.items()]


def _read(name: str, binary: Any) -> Compiled:
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([os.path.join(tools, tool), option, file.name], capture_output=True, text=True, check=True)
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, spilled = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()  # type: ignore[union-attr]
    counts = collections.Counter(re.findall(TENSOR_CORE, sass.stdout))
    return Compiled(name, int(registers), int(spilled), binary.metadata.shared, dict(counts))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--hidden", default="768", help="comma-separated, like the next four (default: %(default)s)")
    parser.add_argument("--bottleneck", default="16,32,64,128,256", help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16,float32", help="default: %(default)s")
    parser.add_argument("--arch", default="80,90,100", help="default: %(default)s")
    args = parser.parse_args(argv)
    bad = 0
    print(f"triton {triton.__version__}")
    heads = {"arch": 5, "dtype": 9, "D": 5, "R": 4, "kernel": 15, "regs": 5, "spilled": 8, "shared": 7}
    print(" ".join(f"{name:>{width}}" for name, width in heads.items()), " tensor core")
    for arch in map(int, args.arch.split(",")):
        for dtype in args.dtype.split(","):
            for D in map(int, args.hidden.split(",")):
                for R in map(int, args.bottleneck.split(",")):
                    for c in compile_all(D, R, getattr(torch, dtype), arch):
                        over = c.shared > SHARED_LIMIT[arch]
                        bad += over
                        print(
                            f"{arch:>5} {dtype:>9} {D:>5} {R:>4} {c.kernel:>15} {c.registers:>5} {c.spilled:>8} "
                            f"{c.shared:>7}  {c.tensor_core or ''} {'over the limit of shared memory' if over else ''}",
                            flush=True,
                        )
    return bad


if __name__ == "__main__":
    sys.exit(main())
