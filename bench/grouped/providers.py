"""Ways to compute the adapters of many tasks in one batch, each over the same parameters."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adapter_ops import bottleneck_adapter, grouped_bottleneck_adapter

NAMES = ("w_down", "b_down", "w_up", "b_up")


class Batch:
    """Rows x [M, D] of T tasks with their ids [M], parameters [T, ...], and what a caller may know on the host."""

    def __init__(self, ids: Tensor, T: int, D: int, R: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.ids, self.T, self.D, self.R = ids.to(device), T, D, R
        shapes = ((len(ids), D), (len(ids), D), (T, R, D), (T, R), (T, D, R), (T, D))
        self.x, self.dy, w_down, b_down, w_up, b_up = (torch.randn(s, dtype=dtype, device=device) for s in shapes)
        self.parameters = [w_down / D**0.5, b_down / 10, w_up / R**0.5, b_up / 10]
        for t in (self.x, *self.parameters):
            t.requires_grad_()
        self.lengths: list[int] = torch.bincount(ids, minlength=T).tolist()
        self.is_sorted = bool((ids.diff() >= 0).all())
        order = ids.argsort(stable=True)
        self.order, self.back = order.to(device), order.argsort().to(device)

    def by_task(self, x: Tensor) -> Tensor:
        """The rows sorted by task, with the order known."""
        return x if self.is_sorted else x.index_select(0, self.order)

    def as_before(self, y: Tensor) -> Tensor:
        return y if self.is_sorted else y.index_select(0, self.back)


Way = Callable[[Batch, Tensor, list[Tensor]], Tensor]


def adapter_ops(b: Batch, x: Tensor, parameters: list[Tensor]) -> Tensor:
    w_down, b_down, w_up, b_up = parameters
    return grouped_bottleneck_adapter(x, b.ids, w_down, b_down, w_up, b_up)


def loop(b: Batch, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """A Python loop over the tasks, which selects each one's rows by its id."""
    y = torch.empty_like(x)
    for t, task in enumerate(zip(*parameters)):
        rows = (b.ids == t).nonzero()[:, 0]
        y[rows] = _eager(x[rows], *task)
    return y


def split(b: Batch, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """As AdapterHub's BatchSplit: slices of rows that the caller has sorted, and a concatenation."""
    parts = b.by_task(x).split(b.lengths)
    tasks = zip(*parameters)
    return b.as_before(torch.cat([_eager(part, *task) for part, task in zip(parts, tasks) if len(part)]))


def padded(b: Batch, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """`torch.bmm` over tasks that are all padded to the rows of the largest one."""
    w_down, b_down, w_up, b_up = parameters
    tall = torch.nn.utils.rnn.pad_sequence(list(b.by_task(x).split(b.lengths)), batch_first=True)
    h = F.gelu(torch.baddbmm(b_down[:, None], tall, w_down.transpose(1, 2)))
    y = tall + torch.baddbmm(b_up[:, None], h, w_up.transpose(1, 2))
    return b.as_before(torch.cat([part[:n] for part, n in zip(y, b.lengths)]))


def grouped_mm(b: Batch, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """`torch._grouped_mm` over sorted rows; biases are gathered for every row."""
    w_down, b_down, w_up, b_up = parameters
    lengths = torch.tensor(b.lengths, device=x.device)
    ends, ids = lengths.cumsum(0).int(), b.by_task(b.ids)
    rows = b.by_task(x)
    h = F.gelu(torch._grouped_mm(rows, w_down.transpose(1, 2), ends) + b_down.index_select(0, ids))
    return b.as_before(rows + torch._grouped_mm(h, w_up.transpose(1, 2), ends) + b_up.index_select(0, ids))


def one_task(b: Batch, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """The single adapter over all rows, as if they were one task's: what no batch of many tasks can fall below."""
    w_down, b_down, w_up, b_up = parameters
    return bottleneck_adapter(x, w_down[0], b_down[0], w_up[0], b_up[0])


def _eager(x: Tensor, w_down: Tensor, b_down: Tensor, w_up: Tensor, b_up: Tensor) -> Tensor:
    return x + F.linear(F.gelu(F.linear(x, w_down, b_down)), w_up, b_up)


class AdapterHubSplit:
    """The slices through AdapterHub's own modules."""

    def __init__(self) -> None:
        self.modules: list[torch.nn.Module] = []

    def __call__(self, b: Batch, x: Tensor, parameters: list[Tensor]) -> Tensor:
        if not self.modules:
            from adapters import BnConfig
            from adapters.methods.modeling import Adapter

            config = BnConfig(mh_adapter=True, output_adapter=True, reduction_factor=b.D / b.R, non_linearity="gelu")
            self.modules = [Adapter(f"t{t}", b.D, b.R, config).to(x.device, x.dtype) for t in range(b.T)]
        parts = []
        for part, module, w_down, b_down, w_up, b_up in zip(b.by_task(x).split(b.lengths), self.modules, *parameters):
            if len(part):
                given = {"adapter_down.0.weight": w_down, "adapter_down.0.bias": b_down}
                given |= {"adapter_up.weight": w_up, "adapter_up.bias": b_up}
                parts.append(torch.func.functional_call(module, given, (part, part))[0])
        return b.as_before(torch.cat(parts))


class Provider(NamedTuple):
    make: Callable[[], Way]
    package: str = "torch"
    exact: bool = True  # whether it computes what the others do


PROVIDERS = {
    "adapter_ops": Provider(lambda: adapter_ops),
    "loop": Provider(lambda: loop),
    "split": Provider(lambda: split),
    "adapterhub-split": Provider(AdapterHubSplit, "adapters"),
    "padded-bmm": Provider(lambda: padded),
    "grouped_mm": Provider(lambda: grouped_mm),
    "one-task": Provider(lambda: one_task, exact=False),
}
