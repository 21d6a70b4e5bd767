"""python -m bench: the fused adapter against the unfused PyTorch module; correctness first, then times."""

import argparse
import statistics

import torch

from adapter_ops import explain
from adapter_ops.ops import Path

from .harness import Case, Shape, environment, gate, interleaved, runner

SHAPES = "4096x768x64,16384x768x64,2048x4096x64,4096x768x8,4096x768x256"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="MxDxR, comma-separated (default: %(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="default: %(default)s")
    parser.add_argument("--modes", default="fwd,train", help="fwd (no gradient), train (forward and backward)")
    parser.add_argument("--seconds", type=float, default=4.0, help="per row (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    shapes = [Shape.parse(s) for s in args.shapes.split(",")]
    dtypes = [getattr(torch, d) for d in args.dtypes.split(",")]

    print(environment())
    paths: dict[Path, None] = {}
    heads = {"M×D×R": 16, "dtype": 9, "mode": 6, "error": 6, "eager": 10, "fused": 10, "p20–p80": 17, "speed-up": 9}
    print(" ".join(f"{name:>{width}}" for name, width in heads.items()))
    print("error: the worst of y and all gradients against fp64, as a multiple of eager's; over 2 is not timed")
    for shape in shapes:
        for dtype in dtypes:
            case = Case(shape, dtype, args.device)
            path = explain(case.x, case.adapter.down.weight)
            paths[path] = None
            error = gate(case, "adapter_ops")
            for mode in args.modes.split(","):
                head = f"{shape.M}×{shape.D}×{shape.R}"
                head = f"{head:>16} {str(dtype).removeprefix('torch.'):>9} {mode:>6} {error:6.2f}"
                if not error <= 2:
                    print(head, f"wrong (path {path.name}): not timed")
                    continue
                times = interleaved({n: runner(case, n, mode) for n in ("eager", "adapter_ops")}, args.seconds)
                eager, fused = (statistics.median(times[n]) * 1e3 for n in ("eager", "adapter_ops"))
                deciles = [1e3 * q for q in statistics.quantiles(times["adapter_ops"], n=10)]
                print(head, f"{eager:8.3f}ms {fused:8.3f}ms {deciles[1]:8.3f}–{deciles[7]:<8.3f} {eager / fused:8.2f}×")
    for path in paths:
        print(f"path: {path.name}, because {path.reason}")


if __name__ == "__main__":
    main()
