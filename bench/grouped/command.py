"""python -m bench grouped: adapters of many tasks in one batch, beside the ways to compute them without this library.

A provider whose error against fp64 is over twice that of the Python loop gets no time. Providers take turns. "ms" is
the median of the samples, "ops" counts PyTorch's operations, and "MiB" is memory above the inputs at the worst moment.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapter_ops.reference import relative_error

from ..cli import Parser, one_of, output_file, positive, telling, whole
from ..environment import environment
from ..files import write_whole
from ..shape import Shape
from ..speed.measure import memory, message, user_times
from .providers import PROVIDERS, Batch, Way, loop

SPREADS, ORDERS, MODES = ("even", "zipf"), ("sorted", "shuffled"), ("fwd", "fwd+bwd")
DTYPES = ("float32", "float16", "bfloat16")
TIMES = f"{'ms':>9}{'p20':>9}{'p80':>9}{'loop/':>7}{'/one':>7}{'ops':>7}{'MiB':>9}"
COLUMNS = f"{'T':>4} {'rows':16}{'provider':18}{'mode':9}{TIMES}"


def main(argv: list[str]) -> int:
    """The exit status: 1 if every provider of every batch failed, else 0."""
    parser = Parser(prog="python -m bench grouped", description=__doc__)
    add = parser.add_argument
    add("--shape", type=telling(Shape.parse), default="4096x768x64", help="MxDxR (default: %(default)s)")
    parser.add_list("--tasks", whole(1), (1, 2, 8, 64, 512), "numbers of tasks")
    parser.add_list(
        "--spread", one_of("spread", SPREADS), SPREADS, "rows a task: equal, or falling as 1, 1/2, 1/3, ..."
    )
    parser.add_list("--order", one_of("order", ORDERS), ORDERS)
    parser.add_list("--modes", one_of("mode", MODES), MODES)
    parser.add_list("--dtypes", one_of("dtype", DTYPES), ("float32",))
    parser.add_list("--providers", one_of("provider", PROVIDERS), PROVIDERS)
    add("--device", type=one_of("device", ("cpu", "cuda")), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=positive, default=1.0, help="of timing for each provider and batch (default: %(default)s)")
    add("--commit", help="named in the results (default: that of the checkout)")
    add("--out", type=output_file, help="a text file for the table")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    # Asked before anything of it is imported, as AdapterHub's package then has no spec any more.
    args.providers = [name for name in args.providers if importlib.util.find_spec(PROVIDERS[name].package)]
    if not args.providers:
        parser.error("argument --providers: the packages of these providers are not installed")
    lines: list[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    with parser.holding(args.out):
        tell(", ".join(environment(args.device, args.commit).values()))
        tell("python -m bench grouped " + " ".join(argv))
        timed = sum(table(batch, args, tell) for batch in batches(args, tell))
        if args.out is not None:
            write_whole(args.out, "\n".join(lines) + "\n")
    return int(timed == 0)


def batches(args: argparse.Namespace, tell: Callable[[str], None]) -> Iterator[tuple[str, Batch]]:
    """Every batch that is asked for, and what its rows are called."""
    shape = args.shape
    for dtype in args.dtypes:
        tell(f"\n{shape} {dtype}; loop/ and /one: the loop's time over this one, and this one over one task's")
        tell(COLUMNS)
        for T in args.tasks:
            for spread in args.spread:
                lengths = rows_of_tasks(shape.M, T, spread)
                for order in args.order:
                    ids = torch.arange(T).repeat_interleave(torch.tensor(lengths))
                    if order == "shuffled":
                        ids = ids[torch.randperm(shape.M, generator=torch.Generator().manual_seed(0))]
                    batch = Batch(ids, T, shape.D, shape.R, getattr(torch, dtype), args.device)
                    yield f"{spread}, {order}", batch


def rows_of_tasks(M: int, T: int, spread: str) -> list[int]:
    """How many rows each of T tasks has, M in all: as equal as possible, or task t as 1 / (t + 1)."""
    shares = [1 / (t + 1) if spread == "zipf" else 1.0 for t in range(T)]
    ends = [round(M * sum(shares[: t + 1]) / sum(shares)) for t in range(T)]
    return [end - start for start, end in zip([0, *ends], ends)]


def table(named: tuple[str, Batch], args: argparse.Namespace, tell: Callable[[str], None]) -> int:
    """Tells the lines of one batch. Returns how many of its providers were timed."""
    rows, batch = named
    ways: dict[str, Way] = {}
    wrong: dict[str, str] = {}
    oracle = results(loop, batch, wide=True)
    allowed = errors(results(loop, batch), oracle)
    for name in args.providers:
        provider = PROVIDERS[name]
        way = provider.make()
        try:
            if provider.exact and (lack := wrongness(errors(results(way, batch), oracle), allowed)):
                wrong[name] = lack
            else:
                ways[name] = way
        except Exception as error:  # a provider that cannot run costs its own lines alone
            wrong[name] = message(error)
    for mode in args.modes:
        runs = {name: [call(way, batch, mode)] for name, way in ways.items()}
        times = user_times(runs, args.seconds, min(args.seconds / 10, 0.05))
        medians = {name: statistics.median(samples) for name, samples in times.items()}
        for name in args.providers:
            start = f"{batch.T:>4} {rows:16}{name:18}{mode:9}"
            if name in wrong:
                tell(f"{start}  not timed: {wrong[name]}")
            elif name in times:
                deciles = statistics.quantiles(times[name], n=10)
                ms = "".join(f"{1e3 * t:>9.2f}" for t in (medians[name], deciles[1], deciles[7]))
                ratios = ratio(medians, "loop", name) + ratio(medians, name, "one-task")
                tell(f"{start}{ms}{ratios}{operations(runs[name][0]):>7}{peak(runs[name][0], args.device):>9.1f}")
    return len(ways)


def ratio(medians: dict[str, float], above: str, below: str) -> str:
    known = above in medians and below in medians
    return f"{medians[above] / medians[below]:>7.2f}" if known else f"{'':7}"


def call(way: Way, batch: Batch, mode: str) -> Callable[[], Any]:
    """What is timed: y without gradients, or y and the gradients of x and of all parameters."""
    if mode == "fwd":

        def fwd() -> Tensor:
            with torch.no_grad():
                return way(batch, batch.x, batch.parameters)

        return fwd
    inputs = [batch.x, *batch.parameters]
    return lambda: torch.autograd.grad(way(batch, batch.x, batch.parameters), inputs, batch.dy, allow_unused=True)


def results(way: Way, batch: Batch, wide: bool = False) -> list[Tensor]:
    """y, dx and the gradients of the parameters, `wide` in fp64."""
    x, *parameters = (
        t.detach().to(torch.float64 if wide else t.dtype).requires_grad_() for t in (batch.x, *batch.parameters)
    )
    y = way(batch, x, parameters)
    found = torch.autograd.grad(y, [x, *parameters], batch.dy.to(y.dtype), materialize_grads=True, allow_unused=True)
    return [y.detach(), *found]


def errors(found: list[Tensor], oracle: list[Tensor]) -> list[float]:
    return [relative_error(f, o) for f, o in zip(found, oracle)]


def wrongness(found: list[float], allowed: list[float]) -> str | None:
    """Why results are wrong: an error over twice the loop's, give or take eight roundings of a sum in fp32."""
    for name, f, a in zip(("y", "dx", "dw_down", "db_down", "dw_up", "db_up"), found, allowed):
        if not f <= 2 * a + 8 * torch.finfo(torch.float32).eps:
            return f"the error of {name} is {f:.1e}, the loop's is {a:.1e}"
    return None


class _Counter(TorchDispatchMode):
    """Counts PyTorch's operations, but for views, which launch nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> int:
    """How many operations of PyTorch a call makes; one of this library counts as one, whatever it launches."""
    with _Counter() as counter:
        run()
    return counter.count


def peak(run: Callable[[], Any], device: str) -> float:
    """MiB above the inputs at the worst moment of a call."""
    with memory(device) as found:
        results = run()
    del results
    return found["peak"] / 2**20
