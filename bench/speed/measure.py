"""Times, floors, launches and memory of calls that are known to be right."""

import contextlib
import ctypes
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..shape import Shape
from .cases import Call, Case, Module

Times = dict[str, list[float]]  # provider -> seconds a call, one sample after another
MAX_SETS = 128


def input_sets(shape: Shape, dtype: torch.dtype, device: str) -> int:
    """How many sets of inputs it takes for none to be in the cache when its turn comes again: 3 × L2.

    At most 128, so a small x stays in L2, as it does between two layers of a model. The CPU gets one set.
    """
    if device != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0) or 64 << 20
    return min(MAX_SETS, math.ceil(3 * cache / (shape.M * shape.D * dtype.itemsize)))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def user_times(runs: dict[str, list[Call]], seconds: float, block: float) -> Times:
    """Time as a caller sees it, host included. Each provider in turn, forth and back, after a warm-up.

    A sample is the mean over a block of calls of about `block` seconds: calls in a row find the allocator and the
    caches as their own kind leaves them, as they do in use.
    """

    def sample(calls: list[Call], count: int) -> float:
        synchronize()
        start = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        synchronize()
        return (time.perf_counter() - start) / count

    counts = {}
    for name, calls in runs.items():
        sample(calls, len(calls))
        counts[name] = max(1, round(block / sample(calls, 3)))
    times: Times = {name: [] for name in runs}
    names = list(runs)
    end = time.perf_counter() + seconds * len(names)
    while names and (time.perf_counter() < end or len(times[names[0]]) < 5):
        names.reverse()
        for name in names:
            times[name].append(sample(runs[name], counts[name]))
    return times


def capture(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of all the calls on the current stream, which must not be the default one.

    Results live until the last call is in, so that each has memory of its own, as the inputs have.
    """
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    results: list[Any] = []
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            results.append(call())
    graph.instantiate()
    return graph


def nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    """Kernels, copies and fills in a graph, asked of the driver; None where it is not NVIDIA's.

    A profiler would tell the same, and slow down the launches of all that is timed after it.
    """
    count = ctypes.c_size_t()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
            ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)
        )
    except OSError:
        return None
    return count.value if status == 0 else None


@dataclass
class Kernels:
    """What CUDA graphs tell of each provider: samples of its time, launches a call, or why no graph could be made."""

    times: Times
    launches: dict[str, int]
    failures: dict[str, str]


def measure_kernels(runs: dict[str, list[Call]], seconds: float) -> Kernels:
    """Time on the GPU alone: replays of a CUDA graph of a provider's calls, in rounds over the providers.

    A sample is one replay over the number of its calls.
    """
    found = Kernels({}, {}, {})
    graphs, times = {}, found.times
    for name, calls in runs.items():
        try:
            graphs[name] = graph = capture(calls)
        except Exception as error:  # one that cannot be captured still has its user time
            found.failures[name] = message(error)
            continue
        times[name] = []
        if count := nodes(graph):
            found.launches[name] = round(count / len(calls))
    if not graphs:
        return found

    def rounds(count: int) -> None:
        marks = {name: [_events() for _ in range(count)] for name in graphs}
        for i in range(count):
            for name, graph in graphs.items():
                start, end = marks[name][i]
                start.record()
                graph.replay()
                end.record()
        torch.cuda.synchronize()
        for name, pairs in marks.items():
            times[name] += [start.elapsed_time(end) / 1e3 / len(runs[name]) for start, end in pairs]

    rounds(2)
    longest = sum(samples[-1] * len(runs[name]) for name, samples in times.items())
    for samples in times.values():
        samples.clear()
    rounds(min(100, max(7, round(seconds * len(graphs) / longest))))
    return found


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, p20 and p80, in milliseconds."""
    deciles = statistics.quantiles(samples, n=10) if len(samples) > 1 else samples * 9
    return statistics.median(samples) * 1e3, deciles[1] * 1e3, deciles[7] * 1e3


@dataclass(frozen=True)
class Floors:
    """What the device does at best in this run: bytes read and written a second, and FLOP/s of a product."""

    bandwidth: float
    rate: float

    def seconds(self, moved: int, flops: int) -> float:
        return max(moved / self.bandwidth, flops / self.rate)


def measure_floors(dtype: torch.dtype, device: str) -> Floors:
    size, buffer = (8192, 1 << 30) if device == "cuda" else (2048, 256 << 20)
    source = torch.randint(0, 255, (buffer,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    products: list[Call] = [lambda: torch.mm(a, b, out=out)]
    if device == "cpu" and dtype != torch.float16 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # In fp32 torch.mm takes MKL, which on some processors is the slower of the two libraries PyTorch has.
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    copy, *rest = (_median(call, device) for call in (lambda: target.copy_(source), *products))
    return Floors(2 * buffer / copy, 2 * size**3 / min(rest))


def _median(call: Call, device: str, repeats: int = 10) -> float:
    """Median seconds of one call."""
    for _ in range(3):
        call()
    if device == "cuda":
        marks = [_events() for _ in range(repeats)]
        for start, end in marks:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3
    return statistics.median(user_times({"": [call]}, 0.0, 0.0)[""])


def work(shape: Shape, dtype: torch.dtype, mode: str) -> tuple[int, int]:
    """Bytes that must be moved, and FLOPs; the weights, small and soon in the cache, are not counted as moved.

    Forward reads x and writes y; backward reads dy and x and writes dx.
    """
    tensors, products = {"fwd": (2, 2), "bwd": (3, 4), "fwd+bwd": (5, 6)}[mode]
    return tensors * shape.M * shape.D * dtype.itemsize, products * 2 * shape.M * shape.D * shape.R


def peak_memory(case: Case, module: Module, mode: str) -> int:
    """Bytes above inputs and parameters at the worst moment; in "bwd" with what its forward left behind."""
    with memory(case.device) as before:
        call = case.call(module, mode)
    with memory(case.device) as during:
        results = call()
    del results
    return before["net"] + during["peak"]


@contextlib.contextmanager
def memory(device: str) -> Iterator[dict[str, int]]:
    """`net` bytes more at the end than at the start, and `peak` bytes more at the worst moment."""
    found: dict[str, int] = {}
    if device == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found["net"] = torch.cuda.memory_allocated() - start
        found["peak"] = torch.cuda.max_memory_allocated() - start
        return
    # The profiler's library reports its every start and stop on stderr; above 5 it is silent. It reads this once.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    found["net"] = found["peak"] = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        found["net"] += event.nbytes()
        found["peak"] = max(found["peak"], found["net"])


def saved_bytes(case: Case, module: Module) -> int:
    """Bytes that forward keeps alive for backward, x among them and parameters not; nothing counts twice."""
    parameters = {p.untyped_storage().data_ptr() for p in case.parameters}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(case.xs[0])
    del y
    return sum(saved.values())


def message(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
