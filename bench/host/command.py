"""python -m bench host: time that the GPU path takes on the host, beside eager PyTorch's; no GPU is needed.

Nothing is computed: a stand-in for the GPU takes the launches (bench/host/rig.py). A time is the 20th percentile of
short samples, in which the providers take turns.
"""

import argparse
import json
import os
import sys
from typing import NoReturn

from ..cli import Parser, one_of, positive, telling
from ..shape import Shape
from . import build, rig

MODES = ("fwd", "fwd grad", "bwd", "fwd+bwd", "chain")


def main(argv: list[str]) -> NoReturn:
    """Runs the command line and ends the process, since the rig's device thread has no clean end."""
    status = run(argv)
    sys.stdout.flush()
    os._exit(status)


def run(argv: list[str]) -> int:
    """The exit status: 1 if `--check` finds a difference, else 0."""
    parser, args = parse(argv)
    if lack := build.missing(args.count):
        parser.error(lack)
    rig.start()
    if args.check:
        from .cases import check_all

        return int(not check_all())
    import torch

    from . import meter

    if not args.count:
        rig.spin(args.launch, args.gemm)
    found = meter.calls(args.shape, getattr(torch, args.dtype), args.modes, args.compile)
    if args.inner:
        meter.inner(found)
        return 0
    if args.count:
        for call in found.values():
            call()  # compiles, which takes minutes under valgrind
        figures = meter.count(argv)
    else:
        figures = meter.times(found, args.seconds)
    rows = {mode: meter.ratio(figures, mode) for mode in args.modes}
    if args.json:
        print(json.dumps(rows))
        return 0
    unit, digits = ("instructions", 0) if args.count else ("µs", 1)
    print(f"{args.shape} {args.dtype}, {unit} a call; in chain an adapter's share of {meter.CHAIN} in a row")
    print(f"{'':10}{'compiled' if args.compile else 'eager':>12}{'adapter_ops':>12}{'ratio':>8}")
    for mode, (theirs, ours, ratio) in rows.items():
        print(f"{mode:10}{theirs:>12,.{digits}f}{ours:>12,.{digits}f}{ratio:>8.2f}")
    return 0


def parse(argv: list[str]) -> tuple[Parser, argparse.Namespace]:
    """The options. Nothing here may import torch."""
    parser = Parser(prog="python -m bench host", description=__doc__)
    add = parser.add_argument
    add("--shape", type=telling(Shape.parse), default="64x768x64", help="MxDxR (default: %(default)s)")
    add("--dtype", type=one_of("dtype", ("float32", "float16", "bfloat16")), default="bfloat16")
    modes_help = "fwd: no gradient; chain: forward and backward of several adapters"
    parser.add_list("--modes", one_of("mode", MODES), MODES, modes_help)
    add("--seconds", type=positive, default=10.0, help="of timing (default: %(default)s)")
    add("--count", action="store_true", help="count instructions under callgrind instead: no noise, but a minute")
    add("--compile", action="store_true", help="both under torch.compile")
    add("--launch", type=positive, default=0.0, metavar="US", help="µs that a launch takes in the driver")
    add("--gemm", type=positive, default=0.0, metavar="US", help="µs that a product takes in cuBLAS, launch included")
    add("--check", action="store_true", help="compare the launches of many kinds of calls with what Triton dispatches")
    add("--json", action="store_true", help="print {mode: [PyTorch, adapter_ops, ratio]}")
    add("--inner", action="store_true", help=argparse.SUPPRESS)
    return parser, parser.parse_args(argv)
