"""Times and instructions of calls on the rig, which has to be started before this is imported."""

import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from adapter_ops import BottleneckAdapter

from ..shape import Shape
from ..speed.cases import Call, Module, Unfused
from . import rig

CHAIN = 8
COUNTED = 20  # calls under valgrind, after a warm-up
Figures = dict[str, float]  # {"PyTorch fwd": of a call, …}


def calls(shape: Shape, dtype: torch.dtype, modes: list[str], compiled: bool) -> dict[str, Call]:
    """What to measure, as {"PyTorch fwd": call, "adapter_ops fwd": call, …}."""
    torch.set_num_threads(1)
    adapter = BottleneckAdapter(shape.D, shape.R, dtype=dtype, device="meta").to_empty(device="cuda")
    x, dy = (torch.empty(shape.M, shape.D, dtype=dtype, device="cuda") for _ in range(2))
    inputs = [x.requires_grad_(), *adapter.parameters()]
    modules: dict[str, Module] = {"PyTorch": Unfused(adapter), "adapter_ops": adapter}
    if compiled:
        from torch._functorch import config

        rig.allow_compile()
        config.donated_buffer = False  # "bwd" runs several times over what one forward saved
        modules = {name: torch.compile(module, dynamic=False) for name, module in modules.items()}
    return {f"{name} {mode}": _call(module, mode, inputs, dy) for mode in modes for name, module in modules.items()}


def _call(module: Module, mode: str, inputs: list[Tensor], dy: Tensor) -> Call:
    x = inputs[0]

    def fwd() -> Tensor:
        with torch.no_grad():
            return module(x)

    def chain() -> None:
        """As in a model, gradients are accumulated, and autograd's thread is woken once for all."""
        h = x
        for _ in range(CHAIN):
            h = module(h)
        h.backward(dy)
        for t in inputs:
            t.grad = None

    if mode == "bwd":
        y = module(x)
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)
    known: dict[str, Call] = {
        "fwd": fwd,
        "fwd grad": lambda: module(x),
        "fwd+bwd": lambda: torch.autograd.grad(module(x), inputs, dy),
        "chain": chain,
    }
    return known[mode]


def times(found: dict[str, Call], seconds: float) -> Figures:
    """µs a call: the 20th percentile of samples of 0.3 ms, every call in turn. A neighbour on the core only adds."""

    def sample(call: Call, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count * 1e6

    counts, samples = {}, {name: [] for name in found}  # type: dict[str, int], dict[str, list[float]]
    for name, call in found.items():
        sample(call, 30)
        counts[name] = max(1, round(300 / min(sample(call, 5) for _ in range(5))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[name]) < 5:
        for name, call in found.items():
            samples[name].append(sample(call, counts[name]))
    return {name: statistics.quantiles(each, n=5)[0] for name, each in samples.items()}


def count(arguments: list[str]) -> Figures:
    """Instructions a call, of a run of this command line under callgrind. They repeat to about 1%.

    Raises RuntimeError with what valgrind said.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        command += [sys.executable, "-m", "bench", "host", *arguments, "--inner"]
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        run = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr)
        found = {}
        for path in Path(folder).iterdir():
            text = path.read_text()
            if match := re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M):
                total = re.search(r"^totals: (\d+)", text, re.M)
                assert total is not None
                found[match[1]] = int(total[1]) / COUNTED
        return found


def inner(found: dict[str, Call]) -> None:
    """What runs under callgrind: a part of its output for each call."""
    for name, call in found.items():
        for _ in range(5):
            call()
        gc.collect()
        gc.disable()
        rig.fake.collect(True)
        for _ in range(COUNTED):
            call()
        rig.fake.dump(name)
        rig.fake.collect(False)
        gc.enable()


def ratio(figures: Figures, mode: str) -> tuple[float, float, float]:
    """PyTorch's figure, ours and ours over PyTorch's; in chain of one adapter."""
    theirs, ours = (
        figures[f"{name} {mode}"] / (CHAIN if mode == "chain" else 1) for name in ("PyTorch", "adapter_ops")
    )
    return theirs, ours, ours / theirs
