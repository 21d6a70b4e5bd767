"""The commands of bench. Each has its own --help."""

import importlib
import os
import sys

COMMANDS = {  # the module whose `main` it is, and what it does
    "speed": ("bench.speed.command", "time the adapter beside every way PyTorch users write it, correctness first"),
    "grouped": ("bench.grouped.command", "time the adapters of many tasks in one batch, beside the ways to do without"),
    "plot": ("bench.speed.plot", "draw latency, speed-up and roofline of a CSV file of speed"),
    "readme": ("bench.speed.readme", "fill in the tables of a Markdown file from the CSV files its markers name"),
    "static": ("bench.static.gate", "compile every kernel for GPUs that are not here and judge the machine code"),
    "traffic": ("bench.static.traffic", "count the bytes that every kernel moves, in Triton's interpreter"),
    "tune": ("bench.static.tune", "search launch configs on the GPU that is here"),
    "host": ("bench.host.command", "time or count what a call takes on the host, without a GPU"),
    "serve": (
        "bench.serve.command",
        "ask examples/serve.py for 40 tasks at once, beside the ways to serve them without it",
    ),
    "paper": ("bench.paper.command", "run the studies of Houlsby et al. (2019)"),
    "demo": ("bench.demo", "show which backend runs, how fast it is, and a model fine-tuned with adapters"),
}


def main(argv: list[str]) -> int:
    """Runs one command, and imports no other. Returns its exit status."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m bench COMMAND [options]\n")
        print("\n".join(f"    {command:8} {text}" for command, (_, text) in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        print(f"python -m bench: error: unknown command {name!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if name == "traffic":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before they are imported
    return importlib.import_module(COMMANDS[name][0]).main(rest)  # type: ignore[no-any-return]
