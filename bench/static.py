"""python -m bench.static: compile every kernel for GPUs that are not here, read the machine code, and judge it.

The launchers themselves run, on meta tensors, with Triton told to compile and not launch; so what is compiled is what
would run, config and specialisation included. Figures are static: read off cubins, timed by nobody.

A kernel fails if it spills, wants more shared memory than the card has, has a product in 16-bit with R ≥ 16 but no
tensor-core instruction of the card's generation, or accesses x, dy, dx, y or the residual one element at a time though
D is a multiple of 8. The exit status is 1 if any kernel fails.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from adapter_ops.kernels import backward, configs, forward, launch
from adapter_ops.kernels.launch import Facts, Needs, Options, Weights
from bench.compiled import Code, read


@dataclass(frozen=True)
class Card:
    """What a multiprocessor holds. Shared memory in bytes; registers are handed to a warp by the `granule`.

    `multiprocessors` is that of the largest product. `tensor_core` names the instructions of its generation.
    """

    multiprocessors: int
    tensor_core: str
    shared_limit: int  # a program
    shared: int  # all programs, each with `reserved` on top
    warps: int
    programs: int
    registers: int = 65536
    granule: int = 256
    partitions: int = 4
    reserved: int = 1024
    warp_size: int = 32


# sm_*: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; gfx942: LLVM's AMDGPU target
CARDS = {
    "sm_80": Card(108, "HMMA", 163 << 10, 164 << 10, 64, 32),
    "sm_86": Card(84, "HMMA", 99 << 10, 100 << 10, 48, 16),
    "sm_89": Card(142, "HMMA", 99 << 10, 100 << 10, 48, 24),
    "sm_90": Card(132, "HGMMA", 227 << 10, 228 << 10, 64, 32),
    "sm_100": Card(148, "UTCHMMA", 227 << 10, 228 << 10, 64, 32),
    "sm_120": Card(188, "HMMA", 99 << 10, 100 << 10, 48, 24),
    "gfx942": Card(304, "mfma", 64 << 10, 64 << 10, 32, 16, 131072, 512, 4, 0, 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSOR_MEMORY = 512  # columns a multiprocessor, where there are any
TOKENS = (4096, 16)  # configs may choose other kernels for few tokens
# wgmma and tcgen05 take 64 rows or more. A kernel that only runs for fewer tokens may use any generation.
FEW = 64

# What `make static` goes through.
HIDDEN = (384, 512, 768, 1024, 1280, 2048, 4096, 5120, 8192)
BOTTLENECK = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Row:
    """One kernel of a cell, compiled for `arch`; M is the first of TOKENS that it was compiled for.

    `code` is None if there is nothing to compile, or if compiling failed. `resident`: programs a multiprocessor holds.
    `activations`: of x, dy, dx, y and the residual, the narrowest access in bytes, by name of the argument.
    """

    arch: str
    dtype: str
    D: int
    R: int
    M: int
    kernel: str
    code: Code | None = None
    resident: int = 0
    activations: dict[str, int] = field(default_factory=dict)
    failures: tuple[str, ...] = ()


class _Driver:
    """Stands in for a GPU's driver while compiling."""

    def __init__(self, arch: str) -> None:
        name = arch.removeprefix("sm_")
        target = ("cuda", int(name)) if name != arch else ("hip", name)
        self.target = GPUTarget(*target, CARDS[arch].warp_size)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def facts(arch: str) -> Facts:
    """As launch.facts gives them on such a card: ROCm's go with generation 8."""
    name = arch.removeprefix("sm_")
    return Facts(divmod(int(name), 10) if name != arch else (8, 0), CARDS[arch].multiprocessors)


@contextlib.contextmanager
def _compiling(arch: str, record: Any) -> Iterator[None]:
    """Launches compile for `arch` and go to `record(kernel, arguments, compiled kernel or exception)` instead."""

    def launched(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel.device_caches.clear()  # they are by device, and every card here is device 0
        try:
            binary = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # whatever the compiler dislikes is a finding, and the next kernel may compile
            binary = error
        kernel.device_caches.clear()
        record(kernel.__name__, dict(zip(kernel.arg_names, args)), binary)

    true_facts, run = launch.facts, triton.JITFunction.run
    launch.facts = lambda device: facts(arch)  # type: ignore[assignment]
    triton.JITFunction.run = launched
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        launch.facts, triton.JITFunction.run = true_facts, run
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            driver.reset_active()


def compile_all(
    D: int,
    R: int,
    dtype: str,
    arch: str,
    parameter_dtype: str | None = None,
    compute_dtype: str | None = None,
) -> list[Row]:
    """Every kernel of a training step of TOKENS rows at its default config; `dtype` of DTYPES, `arch` of CARDS.

    x has `dtype`; so have the parameters and the products unless told otherwise. Kernels that TOKENS share come once.
    One row named "reference path" where R is over what the kernels hold. Raises RuntimeError under TRITON_INTERPRET.
    """
    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: there is nothing to compile")
    if R > configs.MAX_BOTTLENECK:
        return [Row(arch, dtype, D, R, TOKENS[0], "reference path")]
    launches: list[tuple[str, dict[str, Any], Any]] = []
    options = Options("gelu", 1.0, DTYPES[compute_dtype or dtype])
    rows: dict[str, Row] = {}
    for M in TOKENS:
        launches.clear()

        def meta(*shape: int, dtype: str = parameter_dtype or dtype) -> Tensor:
            return torch.empty(shape, dtype=DTYPES[dtype], device="meta")

        x, dy, weights = (
            meta(M, D, dtype=dtype),
            meta(M, D, dtype=dtype),
            Weights(meta(R, D), meta(R), meta(D, R), meta(D), None),
        )
        with _compiling(arch, lambda *launched: launches.append(launched)):
            y, z = forward.forward(x, x, weights, options, True)
            assert z is not None
            needs = Needs(True, True, True, True, True, False)
            dx = backward.backward(dy, x, z, weights, options, needs, True)[0]
        # A launcher may hand on a view, so a tensor is known by its storage.
        activations = {t.untyped_storage()._cdata for t in (x, dy, y, dx) if t is not None}
        for name, arguments, binary in launches:
            row = functools.partial(Row, arch, dtype, D, R, M, name)
            if isinstance(binary, Exception):
                rows[f"{name} {M}"] = row(failures=(f"does not compile: {binary!r:.200}",))
            elif binary.hash not in rows:
                code = read(binary)
                sizes = {
                    k: t.element_size()
                    for k, t in arguments.items()
                    if isinstance(t, Tensor) and t.untyped_storage()._cdata in activations
                }
                products = "tt.dot" in binary.asm["ttir"] and R >= 16 and options.dtype.itemsize == 2
                failures = judge(code, CARDS[arch], products, M < FEW, sizes if D % 8 == 0 else {})
                widths = {name: code.arguments[name] for name in sizes if name in code.arguments}
                rows[binary.hash] = row(code, resident(code, CARDS[arch], binary.metadata.num_warps), widths, failures)
    return list(rows.values())


def resident(code: Code, card: Card, warps: int) -> int:
    """Programs of so many warps that a multiprocessor of `card` holds at once."""
    registers = -(-code.registers * card.warp_size // card.granule) * card.granule
    fits = [
        card.programs,
        card.warps // warps,
        card.registers // card.partitions // max(registers, 1) * card.partitions // warps,
        card.shared // max(code.shared + card.reserved, 1),
    ]
    if code.tensor_memory:
        fits.append(TENSOR_MEMORY // code.tensor_memory)
    return min(fits)


def judge(code: Code, card: Card, products: bool, few: bool, sizes: dict[str, int]) -> tuple[str, ...]:
    """What is wrong with `code`: `products` wants tensor cores, of any generation where `few`; `sizes` are the bytes an
    element of the arguments that may not be accessed one by one."""
    failures = []
    if code.spilled:
        failures.append(f"spills {code.spilled} bytes")
    if code.shared > card.shared_limit:
        failures.append(f"shared memory over the limit by {code.shared - card.shared_limit}")
    if products and not (code.tensor_core if few else code.tensor_core.get(card.tensor_core)):
        failures.append(f"no {card.tensor_core}")
    for name, size in sizes.items():
        width = code.arguments.get(name)
        if width == 0:
            failures.append(f"{name} is used, but no access leads to it")
        elif width is not None and width <= size:
            failures.append(f"{name} accessed {width} bytes at a time")
    if "?" in code.arguments:
        failures.append("an access leads to no argument")
    if code.split:
        failures.append("accesses narrower than in the IR")
    return tuple(failures)


HEADS = {
    "arch": 6,
    "dtype": 5,
    "D": 5,
    "R": 4,
    "M": 5,
    "kernel": 15,
    "regs": 5,
    "spilled": 8,
    "shared": 14,
    "resident": 9,
}


def line(row: Row) -> str:
    """One row of the table."""
    cells: list[Any] = [row.arch, row.dtype, row.D, row.R, row.M, row.kernel]
    tail = ""
    if row.code:
        limit = CARDS[row.arch].shared_limit
        cells += [row.code.registers, row.code.spilled, f"{row.code.shared}/{limit}", row.resident]
        cores = " ".join(f"{name}:{count}" for name, count in row.code.tensor_core.items())
        loads, stores = (",".join(map(str, widths)) for widths in (row.code.loads, row.code.stores))
        activations = ",".join(f"{name.removesuffix('_ptr')} {width}" for name, width in row.activations.items())
        tail = f"  {cores:<12} {loads:<9} {stores:<9} {activations}"
    text = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, HEADS.values()))
    return text + tail + ("  FAILS: " + "; ".join(row.failures) if row.failures else "")


def main(argv: list[str] | None = None) -> int:
    """Prints the table and the verdict; returns 1 if a kernel fails, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    joined = {"hidden": HIDDEN, "bottleneck": BOTTLENECK, "dtype": ("bf16",), "arch": ARCHS}
    for name, default in joined.items():
        parser.add_argument(
            f"--{name}", default=",".join(map(str, default)), help="comma-separated (default: %(default)s)"
        )
    parser.add_argument("--json", metavar="F", help="write the rows, and Triton's version, to this file too")
    args = parser.parse_args(argv)
    dtypes, archs = args.dtype.split(","), args.arch.split(",")
    for option, asked, known in (("dtype", dtypes, DTYPES), ("arch", archs, CARDS)):
        if unknown := set(asked) - set(known):
            parser.error(f"--{option}: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    sizes = ([int(n) for n in text.split(",")] for text in (args.hidden, args.bottleneck))
    cells = [(D, R, dtype, arch) for arch, dtype, D, R in itertools.product(archs, dtypes, *sizes)]
    print(f"triton {triton.__version__}; widths of loads and stores in bytes")
    print(
        " ".join(f"{name:>{width}}" for name, width in HEADS.items()),
        f" {'tensor core':<12} {'loads':<9} {'stores':<9} narrowest",
    )
    rows: list[Row] = []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(len(cells), os.cpu_count() or 1), spawn) as pool:
        for found in tqdm(pool.map(compile_all, *zip(*cells)), total=len(cells), unit="cell", disable=None):
            rows += found
            for row in found:
                tqdm.write(line(row))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"triton": triton.__version__, "rows": [asdict(row) for row in rows]}, file, indent=1)
    bad, reference = sum(bool(row.failures) for row in rows), sum(row.kernel == "reference path" for row in rows)
    print(
        f"{len(rows) - reference} kernels compiled, {bad} of them fail; {reference} of {len(cells)} cells take the reference path"
    )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
