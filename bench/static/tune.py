"""python -m bench tune: search launch configs on the GPU that is here, and write its part of kernels/configs.py.

Every candidate is compiled first, by all cores, and judged by the static gate (bench.static): what spills, or misses
the tensor cores, is not timed. The rest is timed kernel by kernel in CUDA graphs on inputs that rotate past the L2
cache. For each row of the table the config wins that is least behind the best over all shapes of that row.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm

from adapter_ops.kernels import configs
from adapter_ops.kernels.configs import Config
from adapter_ops.kernels.plan import INTERPRETED, Launch, Plan, target
from adapter_ops.kernels.problem import Target, Tuning
from bench.cli import Parser, one_of, output_file, positive, whole
from bench.environment import environment
from bench.files import write_whole
from bench.shape import SHAPES_HELP, Shape
from bench.speed.cases import Call
from bench.speed.measure import input_sets, measure_kernels
from bench.static.cards import CARDS
from bench.static.gate import DTYPES, compiled, compiling, judge, meta_tensors, step
from bench.static.machine_code import read

# Bottlenecks of the table's rows, each at hidden sizes on both sides of where L2 stops holding the rows in flight.
SHAPES = [
    *(f"65536x{D}x{R}" for R in (16, 32, 64, 128) for D in (384, 768, 1024)),
    *(f"16384x4096x{R}" for R in (16, 64, 128, 256)),
]
KERNELS = ("fused", "shrink", "expand", "dz", "dx_dw")
TABLE = Path(configs.__file__).resolve()


class Job(NamedTuple):
    kernel: str
    shape: Shape
    config: Config


def candidates(kernel: str, R: int) -> Iterator[Config]:
    """Configs whose accumulators a thread can hold: at most 128 values of 4 bytes."""
    sides = (0,) if kernel == "fused" or R <= 64 else (64, 128)
    for M, D, warps, stages, r in itertools.product((64, 128), (32, 64, 128, 256), (4, 8), (2, 3, 4), sides):
        side = min(r or configs.side(R), configs.side(R))
        held = {"dx_dw": 2 * D * side + M * D, "expand": M * D}.get(kernel, M * max(side, D))
        if 8 * 32 * warps <= held <= 160 * 32 * warps:
            yield Config(M, D, warps, stages, r)


def plan_of(job: Job, dtype: torch.dtype, target: Target) -> tuple[Plan, list[Launch]]:
    """A plan that launches the kernel of a job with its config, and these launches."""
    form = {"fused": "fused", "shrink": "split", "expand": "split"}.get(job.kernel)
    tuning = Tuning(form=form, tiles=((job.kernel, job.config),), splits=1)
    M, D, R = job.shape.M, job.shape.D, job.shape.R
    _, taken, whole_step = step(M, D, R, (dtype, dtype, dtype), target, tuning)
    plan = taken if form else whole_step
    return plan, [launch for launch in plan.launches if launch.kernel.__name__ == f"{job.kernel}_kernel"]


def tensors(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """x, dy, z and the weights of a training step, on the GPU."""
    M, D, R = shape.M, shape.D, shape.R
    sizes = dict(x=(M, D), dy=(M, D), z=(M, R), w_down=(R, D), b_down=(R,), w_up=(D, R), b_up=(D,))
    made = {name: torch.empty(size, dtype=dtype, device="cuda") for name, size in sizes.items()}
    for t in made.values():
        t.normal_(std=1.0 if t.shape[0] == M else 0.05)  # zeros would run faster than real data
    return made


def call(job: Job, made: dict[str, Any], target: Target) -> Call:
    """The kernel of a job alone, on inputs of its own; what other kernels would write is left as it was allocated."""
    plan, launches = plan_of(job, made["x"].dtype, target)
    every = plan.tensors([made.get(name) for name in plan.inputs])
    return lambda: [launch(every) for launch in launches]


def passes(job: Job, dtype: str, arch: str) -> bool:
    """Whether the static gate lets the config pass; what compiles stays in Triton's cache for the timing."""
    card = CARDS[arch]
    dots = DTYPES[dtype].itemsize == 2
    plan, launches = plan_of(job, DTYPES[dtype], card.aim)
    with compiling(card):
        found = [compiled(launch, meta_tensors(plan)) for launch in launches]
    return all(not isinstance(b, Exception) and not judge(read(b), card, dots, False, {}) for b in found)


def measure(jobs: list[Job], dtype: torch.dtype, seconds: float) -> dict[Job, float]:
    """Seconds a launch, of each job that runs."""
    found, card = {}, target(torch.device("cuda", torch.cuda.current_device()))
    bar = tqdm(total=len(jobs), unit="config", desc="timing", disable=None)
    for shape, group in itertools.groupby(jobs, key=lambda job: job.shape):
        sets = [tensors(shape, dtype) for _ in range(input_sets(shape, dtype, "cuda"))]
        for job in group:
            with contextlib.suppress(Exception):  # more shared memory than there is, say
                calls = [call(job, made, card) for made in sets]
                calls[0]()
                times = measure_kernels({"": calls}, seconds).times[""]
                found[job] = sorted(times)[len(times) // 2]
            bar.update()
    return found


def winners(times: dict[Job, float]) -> dict[str, dict[int, Config]]:
    """By kernel and bottleneck: of the configs timed at all its shapes, the one least behind the best of each."""
    rows: dict[tuple[str, int], dict[Config, dict[Shape, float]]] = {}
    for (kernel, shape, config), seconds in times.items():
        rows.setdefault((kernel, shape.R), {}).setdefault(config, {})[shape] = seconds
    table: dict[str, dict[int, Config]] = {}
    for (kernel, R), found in rows.items():
        shapes = {shape for by_shape in found.values() for shape in by_shape}
        best = {shape: min(t[shape] for t in found.values() if shape in t) for shape in shapes}
        behind = {c: math.prod(t[s] / best[s] for s in shapes) for c, t in found.items() if t.keys() == shapes}
        if behind:
            table.setdefault(kernel, {})[R] = min(behind, key=lambda config: behind[config])
    return table


def block(key: tuple[int, int], rows: dict[str, dict[int, Config]], heading: str) -> str:
    """The part of configs.py for one entry of the table."""
    text = f"# tuned {key}: {heading}\nTABLE[{key[0]}, {key[1]}] = {{\n"
    for kernel, by_r in rows.items():
        text += f'    "{kernel}": {{\n'
        for R, config in sorted(by_r.items()):
            *sizes, r = astuple(config)
            text += f"        {R}: Config({', '.join(map(str, sizes))}{f', BLOCK_R={r}' if r else ''}),\n"
        text += "    },\n"
    return text + f"}}\n# end of tuned {key}\n"


def split_at_block(path: Path, key: tuple[int, int]) -> tuple[str, str]:
    """The text before the table's block of `key` and the text after it. Raises ValueError where there is none."""
    text = path.read_text(encoding="utf-8")
    found = re.split(
        rf"# tuned {re.escape(str(key))}: .*?\n# end of tuned {re.escape(str(key))}\n", text, flags=re.DOTALL
    )
    if len(found) != 2:
        raise ValueError(f"{path.name} has no block '# tuned {key}' to write to")
    return found[0], found[1]


def write(path: Path, key: tuple[int, int], rows: dict[str, dict[int, Config]], heading: str) -> None:
    """Puts `rows` over those of `key` in the table; ValueError, and nothing written, if the file has no such block."""
    before, after = split_at_block(path, key)
    merged = {kernel: by_r | rows.get(kernel, {}) for kernel, by_r in configs.TABLE[key].items()}
    write_whole(path, before + block(key, merged, heading) + after)


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The parser and the options; what cannot be tuned, timed or written is refused with exit status 2."""
    parser = Parser(
        prog="python -m bench tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    parser.add_list("--shapes", Shape.parse, SHAPES, SHAPES_HELP)
    parser.add_list("--kernels", one_of("kernel", KERNELS), KERNELS)
    add("--dtype", default="bf16", choices=DTYPES, help="default: %(default)s")
    add("--seconds", type=positive, default=0.01, help="of timing a config (default: %(default)s)")
    add("--processes", type=whole(1), default=os.cpu_count(), help="that compile (default: %(default)s)")
    add("--out", type=output_file, help="all times, as JSON")
    add("--write", action="store_true", help="write the winners to kernels/configs.py")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here to time configs on")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, under which there is nothing to compile: unset it")
    capability = torch.cuda.get_device_capability()
    if (arch := "sm_{}{}".format(*capability)) not in CARDS:
        parser.error(f"the GPU here is {arch}, which the static gate does not know; known: {', '.join(CARDS)}")
    if args.write:
        with parser.refusing():
            split_at_block(TABLE, (configs.generation(capability), DTYPES[args.dtype].itemsize))
    return parser, args


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1, and writes nothing, if no config passed the gate and ran."""
    parser, args = parse(argv)
    with parser.holding(args.out, TABLE if args.write else None):
        return run(args)


def run(args: argparse.Namespace) -> int:
    """The search with the options of `parse`, while no other run writes to the same files."""
    dtype = DTYPES[args.dtype]
    major, minor = torch.cuda.get_device_capability()
    key = (configs.generation((major, minor)), dtype.itemsize)
    jobs = [Job(k, s, c) for s in args.shapes for k in args.kernels for c in candidates(k, s.R)]
    tried = len(jobs)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        judged = pool.map(functools.partial(passes, dtype=args.dtype, arch=f"sm_{major}{minor}"), jobs, chunksize=4)
        bar = tqdm(zip(jobs, judged), total=len(jobs), unit="config", desc="compiling", disable=None)
        jobs = [job for job, good in bar if good]
    with torch.cuda.stream(torch.cuda.Stream()):
        times = measure(jobs, dtype, args.seconds)
    if not times:
        print(f"none of {tried} configs passed the gate and ran; nothing is written", file=sys.stderr)
        return 1
    facts = environment("cuda", None)
    heading = f"{facts['device']}; triton {triton.__version__}; {datetime.date.today()}; commit {facts['commit']}"
    rows = winners(times)
    print(block(key, rows, heading))
    if args.out:
        found = [
            dict(kernel=j.kernel, shape=str(j.shape), config=astuple(j.config), us=t * 1e6) for j, t in times.items()
        ]
        write_whole(args.out, json.dumps({"heading": heading, "times": found}))
    if args.write:
        write(TABLE, key, rows, heading)
    return 0
