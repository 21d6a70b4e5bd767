"""Providers, the gate they must pass, and interleaved timing."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import adapter_ops
from adapter_ops import BottleneckAdapter, reference


class Unfused(nn.Module):
    """The adapter as PyTorch users write it: x + up(gelu(down(x)))."""

    def __init__(self, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.down, self.act, self.up = adapter.down, nn.GELU(), adapter.up

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.act(self.down(x)))


PROVIDERS: dict[str, Callable[[BottleneckAdapter], nn.Module]] = {"eager": Unfused, "adapter_ops": lambda a: a}


@dataclass(frozen=True)
class Shape:
    """M tokens, hidden size D, bottleneck R."""

    M: int
    D: int
    R: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Shape.parse("4096x768x64"); ValueError for anything else."""
        sizes = text.split("x")
        if len(sizes) != 3 or not all(s.isdigit() and int(s) > 0 for s in sizes):
            raise ValueError(f"shape {text!r} is not of the form MxDxR, such as 4096x768x64")
        return cls(*map(int, sizes))


@dataclass
class Case:
    """One shape and dtype with its inputs; weights are drawn large enough that the adapter is not the identity."""

    shape: Shape
    dtype: torch.dtype
    device: str

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        M, D, R = self.shape.M, self.shape.D, self.shape.R
        self.adapter = BottleneckAdapter(D, R, init_std=0.05, device=self.device, dtype=self.dtype)
        self.x = torch.randn(M, D, device=self.device, dtype=self.dtype, requires_grad=True)
        self.dy = torch.randn(M, D, device=self.device, dtype=self.dtype)

    def provider(self, name: str) -> nn.Module:
        return PROVIDERS[name](self.adapter)

    def outputs(self, module: nn.Module) -> list[Tensor]:
        """y, dx and the parameters' gradients."""
        y = module(self.x)
        return [y.detach(), *torch.autograd.grad(y, [self.x, *self.adapter.parameters()], self.dy)]

    def oracle(self) -> list[Tensor]:
        """`outputs` in fp64."""
        inputs = [t.detach().double().requires_grad_() for t in (self.x, *self.adapter.parameters())]
        x, w_down, b_down, w_up, b_up = inputs
        y = reference.bottleneck_adapter(x, w_down, b_down, w_up, b_up)
        return [y.detach(), *torch.autograd.grad(y, inputs, self.dy.double())]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in fp64."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def gate(case: Case, name: str) -> float:
    """The worst ratio of a provider's error to eager's, over y and every gradient; at most 2 is right."""
    oracle, eager, found = case.oracle(), case.outputs(case.provider("eager")), case.outputs(case.provider(name))
    slack = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps / 2  # sums are fp32, in any order
    ratios = [relative_error(f, o) / (relative_error(e, o) + slack) for f, e, o in zip(found, eager, oracle)]
    return torch.tensor(ratios).max().item()  # unlike Python's max, this keeps a NaN


def interleaved(runs: dict[str, Callable[[], None]], seconds: float, block: float = 0.05) -> dict[str, list[float]]:
    """Seconds a call. Each run in turn, forth and back, until `seconds` have gone by, after a warm-up.

    A sample is the mean over a block of calls of about `block` seconds: calls in a row find the allocator and the
    caches as their own kind leaves them, as they do in use.
    """

    def sample(run: Callable[[], None], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    for run in runs.values():
        run()
    calls = max(1, round(block / min(sample(run, 3) for run in runs.values())))
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[names[0]]) < 5:
        names.reverse()
        for name in names:
            times[name].append(sample(runs[name], calls))
    return times


def runner(case: Case, name: str, mode: str) -> Callable[[], None]:
    """A call to time: "fwd" under no_grad, "train" forward and backward."""
    module = case.provider(name)
    inputs = [case.x, *case.adapter.parameters()]

    def fwd() -> None:
        with torch.no_grad():
            module(case.x)

    def train() -> None:
        torch.autograd.grad(module(case.x), inputs, case.dy)

    return {"fwd": fwd, "train": train}[mode]


def environment() -> str:
    """Device, versions and commit, for the head of every table."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}; adapter_ops {adapter_ops.__version__}; commit {commit or 'unknown'}"
