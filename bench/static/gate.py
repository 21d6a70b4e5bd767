"""python -m bench static: compile every kernel for GPUs that are not here, read the machine code, and judge it.

The plans are those of such a card, and Triton is told to compile their launches on tensors without memory; so what is
compiled is what would run, config and specialisation included. Figures are static: read off cubins, timed by nobody.

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
from random import Random
from typing import Any

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from adapter_ops.kernels import backward, forward
from adapter_ops.kernels.configs import blocks
from adapter_ops.kernels.plan import INTERPRETED, Boxes, Launch, Plan
from adapter_ops.kernels.problem import UNTUNED, Needs, Problem, Rows, Target, Tuning
from bench.cli import Parser, one_of, output_file, whole
from bench.files import write_whole
from bench.static.cards import CARDS, Card
from bench.static.machine_code import Code, read

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = (65536, 4096, 16)  # configs choose other kernels for fewer tokens
# wgmma and tcgen05 take 64 rows or more. A kernel that only runs for fewer tokens may use any generation.
FEW = 64

KERNELS = ("fused", "resident", "shrink", "combine", "expand", "dz", "dx_dw", "reduce", "table")

# Sizes (D, R) whose kernels are also compiled for rows of TASKS tasks: a handful, as they differ in how rows are found.
GROUPED = ((768, 8), (768, 24), (768, 64), (768, 256), (1024, 48), (1024, 128), (2048, 32), (4096, 64), (8192, 64))
TASKS = 64

# What `make static` goes through.
HIDDEN = (384, 512, 768, 1024, 1280, 2048, 4096, 5120, 8192)
BOTTLENECK = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Row:
    """One kernel of a cell, compiled for `arch`; M is the first of TOKENS that it was compiled for, and T counts the
    tasks of its rows, 0 where all rows are one adapter's.

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
    T: int = 0


class _Driver:
    """Stands in for a GPU's driver while compiling."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(card: Card) -> Iterator[None]:
    """Kernels compile for `card`."""
    driver.set_active(_Driver(card.target))
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            driver.reset_active()


def compiled(launch: Launch, tensors: dict[str, Tensor]) -> Any:
    """The compiled kernel of a launch, or the exception that compiling it raised; inside `compiling`."""
    launch.kernel.device_caches.clear()  # they are by device, and every card here is device 0
    try:
        return launch.kernel.run(**launch.values(tensors), grid=launch.grid, warmup=True, **launch.constants)
    except Exception as error:  # whatever the compiler dislikes is a finding, and the next kernel may compile
        return error
    finally:
        launch.kernel.device_caches.clear()


def meta_tensors(plan: Plan) -> dict[str, Tensor]:
    """Tensors without memory for all names in a plan."""
    p = plan.problem
    M, D, R, dtype, each = p.M, p.D, p.R, p.parameter_dtype, p.each
    memory = {n: (m.shape, m.dtype) for n, m in (plan.outputs | plan.scratch).items() if m is not None}
    parameters = {"w_down": (R, D), "b_down": (R,), "w_up": (D, R), "b_up": (D,), "scale": (p.scale_size,)}
    memory |= {name: ((*each, *shape), dtype) for name, shape in parameters.items()}
    memory |= {"z": ((M, R), p.dtype), "order": ((M,), torch.int64), "counts": ((p.tasks + 1,), torch.int64)}
    tensors = {name: torch.empty(shape, dtype=of, device="meta") for name, (shape, of) in memory.items()}
    for name, rows in (("x", p.x), ("residual", p.residual), ("dy", p.dy)):
        if rows:
            tensors[name] = torch.empty_strided((M, D), (rows.stride, 1), dtype=rows.dtype, device="meta")
    return tensors


def step(
    M: int,
    D: int,
    R: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    target: Target,
    tuning: Tuning = UNTUNED,
    stride: int | None = None,
    tasks: int = 0,
) -> list[Plan]:
    """The plans of a training step, and of forward with a residual of its own, which rules one form out.

    `dtypes` of x, of the parameters and of the products.
    """
    rows = Rows(stride or D, dtypes[0])
    common: dict[str, Any] = dict(
        M=M, D=D, R=R, x=rows, parameter_dtype=dtypes[1], b_down=True, b_up=True, activation="gelu", scale=1.0
    )
    common |= dict(scale_size=0, dtype=dtypes[2], tf32=False, aligned=True, target=target, tuning=tuning, tasks=tasks)
    needs = Needs(True, True, True, True, True, False)
    return [
        forward.plan(Problem(**common, residual=rows, save_z=True)),
        forward.plan(Problem(**common, residual=None, save_z=True)),
        backward.plan(Problem(**common, residual=None, dy=rows, needs=needs)),
    ]


# Tensors that may not be accessed one element at a time.
ACTIVATIONS = ("x", "residual", "y", "dy", "dx")


def element_sizes(launch: Launch, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Arguments that are x, dy, dx, y or a residual, with the bytes of an element."""
    names = {a: v.tensor if isinstance(v, Boxes) else v for a, v in launch.arguments.items()}
    return {argument: tensors[name].element_size() for argument, name in names.items() if name in ACTIVATIONS}


def compile_all(
    D: int,
    R: int,
    dtype: str,
    arch: str,
    parameter_dtype: str | None = None,
    compute_dtype: str | None = None,
    tuning: Tuning = UNTUNED,
    stride: int | None = None,
    kernels: tuple[str, ...] = (),
) -> list[Row]:
    """Every kernel of a training step of TOKENS rows at its default config; `dtype` of DTYPES, `arch` of CARDS.

    x has `dtype`; so have the parameters and the products unless told otherwise. Kernels that TOKENS share come once.
    For the sizes of GROUPED there are also those of rows of several tasks.
    Raises RuntimeError under TRITON_INTERPRET.

    Args:
        tuning: what to compile in the place of the default configs.
        stride: of the rows of x, dy and the residual, D by default.
        kernels: to compile no others, all by default.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: there is nothing to compile")
    x, parameters, products = (DTYPES[name or dtype] for name in (dtype, parameter_dtype, compute_dtype))
    card, rows = CARDS[arch], dict[str, Row]()
    for T, M in itertools.product((0, TASKS) if (D, R) in GROUPED else (0,), TOKENS):
        for plan in step(M, D, R, (x, parameters, products), card.aim, tuning, stride, T):
            tensors = meta_tensors(plan)
            for launch in plan.launches:
                if kernels and launch.kernel.__name__ not in kernels:
                    continue
                with compiling(card):
                    binary = compiled(launch, tensors)
                name, sizes = launch.kernel.__name__, element_sizes(launch, tensors)
                row = functools.partial(Row, arch, dtype, D, R, M, name, T=T)
                if isinstance(binary, Exception):
                    rows[f"{name} {T} {M}"] = row(failures=(f"does not compile: {binary!r:.200}",))
                elif binary.hash not in rows:
                    code = read(binary)
                    text = binary.asm.get("ttir", binary.asm["ttgir"])  # Gluon starts from the latter
                    dots = ("tt.dot" in text or "warp_group_dot" in text) and R >= 16 and products.itemsize == 2
                    failures = judge(code, card, dots, M < FEW, sizes if D % 8 == 0 else {})
                    widths = {name: code.arguments[name] for name in sizes if name in code.arguments}
                    rows[binary.hash] = row(code, card.resident(code), widths, failures)
    return list(rows.values())


def judge(code: Code, card: Card, dots: bool, few: bool, sizes: dict[str, int]) -> tuple[str, ...]:
    """What is wrong with `code`: `dots` want tensor cores, of any generation where `few`; `sizes` are the bytes an
    element of the arguments that may not be accessed one by one."""
    failures = []
    if code.spilled:
        failures.append(f"spills {code.spilled} bytes")
    if code.shared > card.shared_limit:
        failures.append(f"shared memory over the limit by {code.shared - card.shared_limit}")
    if dots and not (code.tensor_core if few else code.tensor_core.get(card.tensor_core)):
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


def drawn(count: int, seed: int, dtypes: list[str], archs: list[str]) -> list[tuple[int, int, str, str]]:
    """(D, R, dtype, arch) of cells at random; every second D is a multiple of 8, as most models have it."""
    random = Random(seed)
    found = []
    for i in range(count):
        D, R = random.randint(1, HIDDEN[-1]), random.randint(1, BOTTLENECK[-1])
        found.append((blocks(D, 8) * 8 if i % 2 else D, R, random.choice(dtypes), random.choice(archs)))
    return found


HEADS = dict(arch=6, dtype=5, D=5, R=4, M=5, T=2, kernel=15, regs=5, spilled=8, shared=14, resident=9)


def line(row: Row) -> str:
    """One row of the table."""
    cells: list[Any] = [row.arch, row.dtype, row.D, row.R, row.M, row.T or "", row.kernel]
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
    """Prints the table and the verdict; returns 1 if a kernel fails or none was compiled, else 0."""
    parser = Parser(
        prog="python -m bench static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_list("--hidden", whole(1), HIDDEN)
    parser.add_list("--bottleneck", whole(1), BOTTLENECK)
    parser.add_list("--dtype", one_of("dtype", DTYPES), ["bf16"])
    parser.add_list("--arch", one_of("arch", CARDS), ARCHS)
    parser.add_list("--kernels", one_of("kernel", KERNELS), KERNELS, "compile no others")
    parser.add_argument(
        "--random",
        type=whole(1),
        metavar="N",
        help="N cells drawn from all D up to 8192, all R up to 512, and --dtype and --arch, instead of the grid",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --random (default: %(default)s)")
    parser.add_argument(
        "--json", type=output_file, metavar="F", help="write the rows, and Triton's version, to this file too"
    )
    args = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, under which there is nothing to compile: unset it")
    with parser.holding(args.json):
        return run(args)


def run(args: argparse.Namespace) -> int:
    """What `main` does with its options, while no other run writes to the same file."""
    if args.random:
        cells = drawn(args.random, args.seed, args.dtype, args.arch)
    else:
        cells = [
            (D, R, dtype, arch)
            for arch, dtype, D, R in itertools.product(args.arch, args.dtype, args.hidden, args.bottleneck)
        ]
    print(f"triton {triton.__version__}; widths of loads and stores in bytes")
    print(
        " ".join(f"{name:>{width}}" for name, width in HEADS.items()),
        f" {'tensor core':<12} {'loads':<9} {'stores':<9} narrowest",
    )
    rows: list[Row] = []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(len(cells), os.cpu_count() or 1), spawn) as pool:
        compile_cell = functools.partial(compile_all, kernels=tuple(f"{name}_kernel" for name in args.kernels))
        for found in tqdm(pool.map(compile_cell, *zip(*cells)), total=len(cells), unit="cell", disable=None):
            rows += found
            for row in found:
                tqdm.write(line(row))
            sys.stdout.flush()
    if args.json:
        report = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        write_whole(args.json, json.dumps(report, indent=1))
    bad = sum(bool(row.failures) for row in rows)
    print(f"{len(rows)} kernels: {bad} failures")
    return int(bad > 0 or not rows)
