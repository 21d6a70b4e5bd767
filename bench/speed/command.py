"""python -m bench speed: the fused adapter against every way PyTorch users write it; correctness first, then times."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm

from ..cli import Parser, listed, one_of, output_file, positive, whole
from ..environment import environment
from ..shape import SHAPES_HELP, Shape
from . import measure
from .cases import MODES, PROVIDERS, Case
from .rows import Row, Writer
from .runner import run_case

DTYPES = ("float32", "float16", "bfloat16")
CPU_SHAPES = ("4096x768x64", "16384x768x64", "2048x4096x64", "4096x768x8", "4096x768x256")
SIZES = ((384, 64), (768, 8), (768, 64), (768, 256), (1024, 64), (2048, 64), (4096, 64), (4096, 256), (8192, 64))
CUDA_SHAPES = [f"{M}x{D}x{R}" for D, R in SIZES for M in (1, 16, 64, 1024, 16384, 65536)]
CUDA_AUTOTUNE_SHAPES = "16384x768x64,65536x768x64"  # a minute of compiling each
HEADS = (
    f"{'M×D×R':>14} {'dtype':>8} {'mode':>7} {'provider':>12} {'user ms':>9} {'p20–p80':>17} {'kernel ms':>9} "
    f"{'speed-up':>8} {'floor':>5} {'launches':>8} {'peak MB':>8} {'saved MB':>8} {'error':>8} {'eager’s':>8}"
)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns 0, or 1 if no row has a time, or 130 if the run was interrupted."""
    parser, args = parse(argv)
    with parser.holding(args.out):
        return run(args)


def run(args: argparse.Namespace) -> int:
    """The benchmark with the options of `parse`, while no other run writes to the same file."""
    facts = environment(args.device, args.commit)
    print("; ".join(f"{name} {value}" for name, value in facts.items()))
    print("speed-up over eager and % of the floor: by kernel time, on a CPU by user time")
    writer = Writer(args.out) if args.out else None
    status, timed = 1, False
    try:
        for rows in run_all(args):
            for row in rows:
                vars(row).update(facts)
                timed |= row.ms is not None
                tqdm.write(line(row))
            sys.stdout.flush()
            if writer:
                writer.write(rows)
        if timed:
            status = 0
        else:
            print("no row has a time", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
        print("interrupted", file=sys.stderr)
    finally:
        if writer:
            writer.close(whole=status == 0)
            if status:
                rest = (
                    f"the {writer.count} rows of this run are in {writer.partial}"
                    if writer.count
                    else "no row was made"
                )
                print(f"{args.out} is left as it was; {rest}", file=sys.stderr)
    return status


def run_all(args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one shape, dtype and mode after another. What does not fit on the device has no rows."""
    if args.warm:
        from .warm import warm

        warm(args.shapes, args.dtypes, args.providers, args.device, args.warm)
    names = {s: [n for n in args.providers if n != "max-autotune" or s in args.autotune] for s in args.shapes}
    total = sum(mode in PROVIDERS[n].modes for s in args.shapes for n in names[s] for mode in args.modes)
    with contextlib.ExitStack() as stack:
        if args.device == "cuda":
            # All on one stream, and one that can be captured: autograd ties the node of a parameter to the stream it
            # first meets, and a capture must not wait for another.
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
        bar = stack.enter_context(tqdm(total=total * len(args.dtypes), unit="row", disable=None))
        for dtype in args.dtypes:
            floors = measure.measure_floors(dtype, args.device)
            bar.write(f"{dtype}: copy {floors.bandwidth / 1e9:.1f} GB/s, matmul {floors.rate / 1e12:.2f} TFLOP/s")
            bar.write(HEADS)
            for shape in args.shapes:
                bar.set_description(f"{shape} {dtype}")
                torch.compiler.reset()  # or this shape, unlike the last one's, is compiled with symbols for sizes
                try:
                    case = Case(shape, dtype, args.device, measure.input_sets(shape, dtype, args.device))
                    for rows in run_case(case, names[shape], args.modes, args.seconds, floors):
                        yield rows
                        bar.update(len(rows))
                except Exception as error:  # a shape too large for the device, most likely
                    bar.write(f"{shape} {dtype} stopped: {measure.message(error)}", file=sys.stderr)


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The parser and the options; what cannot be run is refused with exit status 2."""
    cuda = torch.cuda.is_available()
    available = [name for name, provider in PROVIDERS.items() if provider.available()]
    parser = Parser(prog="python -m bench speed", description=__doc__)
    add = parser.add_argument
    parser.add_list("--shapes", Shape.parse, CUDA_SHAPES if cuda else CPU_SHAPES, SHAPES_HELP)
    parser.add_list("--modes", one_of("mode", MODES), MODES, "fwd: no gradient; bwd: backward alone")
    parser.add_list("--providers", one_of("provider", PROVIDERS), available, "all that can run here by default")
    parser.add_list("--dtypes", one_of("dtype", DTYPES), DTYPES[2:] if cuda else DTYPES[::2])
    add(
        "--out",
        type=output_file,
        metavar="F.csv",
        help="write the rows there; until the run is whole they are in F.partialN.csv beside it",
    )
    add("--seconds", type=positive, default=0.1 if cuda else 1.0, help="of timing, per row (default: %(default)s)")
    add(
        "--max-autotune-shapes",
        type=autotuned,
        default=CUDA_AUTOTUNE_SHAPES if cuda else "all",
        help='some of them, "all", or "" for none (default: %(default)s)',
    )
    add(
        "--warm",
        type=whole(0),
        default=0,
        metavar="N",
        help="compile in N processes first, which fills the caches on disk (default: %(default)s)",
    )
    add("--commit", help="of the code, where there is no git to ask")
    add("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args(argv)
    args.dtypes = [getattr(torch, name) for name in args.dtypes]
    few = args.max_autotune_shapes
    args.autotune = args.shapes if few is None else few
    for name in args.providers:
        if not PROVIDERS[name].available():
            parser.error(f"provider {name!r} needs the package {PROVIDERS[name].package!r}, which is not installed")
    if args.device == "cuda" and not cuda:
        parser.error("argument --device: there is no GPU here that torch can use")
    return parser, args


def autotuned(text: str) -> list[Shape] | None:
    """Parses shapes, of which there may be none; None stands for all."""
    return None if text == "all" else listed(Shape.parse)(text) if text else []


def line(row: Row) -> str:
    """A row as it is printed."""

    def cell(value: float | None, width: int, format: str, scale: float = 1.0) -> str:
        return " " * width if value is None else f"{value * scale:>{width}{format}}"

    spread = "" if row.user_p20_ms is None else f"{row.user_p20_ms:.4f}–{row.user_p80_ms:.4f}"
    cells = [
        f"{row.M}×{row.D}×{row.R}".rjust(14) + f" {row.dtype:>8} {row.mode:>7} {row.provider:>12}",
        cell(row.user_ms, 9, ".4f") + f" {spread:>17}",
        cell(row.kernel_ms, 9, ".4f"),
        cell(row.speedup, 7, ".2f") + ("×" if row.speedup else " "),
        cell(row.percent_of_floor, 4, ".0f") + ("%" if row.percent_of_floor else " "),
        cell(row.launches, 8, ".0f"),
        cell(row.peak_bytes, 8, ".1f", 1e-6),
        cell(row.saved_bytes, 8, ".1f", 1e-6),
        cell(row.error, 8, ".1e"),
        cell(row.eager_error, 8, ".1e"),
        "" if row.note.startswith("path") else row.note,
    ]
    return " ".join(cells).rstrip()
