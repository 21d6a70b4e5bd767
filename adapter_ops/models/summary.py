"""How many parameters each task of a model adds, as data and as a table."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .adapters import adapters_of
from .sites import base_parameters, find_heads
from .tasks import active_adapter


class TaskSize(NamedTuple):
    """Parameters of one task by kind, and their sum as a share of the base's."""

    name: str
    adapters: int
    norms: int
    modules: int
    total: int
    share: float


@dataclass(frozen=True)
class AdapterSummary:
    """What `adapter_summary` returns. `str(summary)` is a table of it."""

    base: int  # parameters of the model without adapters and without heads
    active: str | None  # the task that a call of the model would run, or None for the bare base
    tasks: tuple[TaskSize, ...]  # in the order they were added
    total: TaskSize  # the sum of all tasks, with the name "all tasks"

    def __str__(self) -> str:
        rows = [*self.tasks, self.total]
        width = max(len(row.name) for row in rows) + 1
        lines = [
            f"base: {self.base:,} parameters; active: {self.active}",
            f"{'':{width}} {'adapters':>12} {'norms':>10} {'modules':>12} {'total':>12} {'of base':>8}",
        ]
        for name, layers, norms, modules, total, share in rows:
            lines.append(f"{name:{width}} {layers:12,} {norms:10,} {modules:12,} {total:12,} {share:8.2%}")
        return "\n".join(lines)


def adapter_summary(model: nn.Module) -> AdapterSummary:
    """The parameters that each task of a model adds, and what all of them add, beside those of the base.

    The base is the model without adapters and without heads. Works on the meta device.

    Raises ValueError where the model has no adapters.

    >>> print(adapter_summary(model))  # doctest: +SKIP
    """
    adapters = adapters_of(model)
    root = adapters.model
    heads = tuple(f"{path}." for path in find_heads(root, adapters.sites))
    base = sum(p.numel() for name, p in base_parameters(root) if not name.startswith(heads))
    tasks = []
    for name in adapters.names:
        task = adapters.task(name)
        norms, modules = (
            sum(p.numel() for path in paths for p in task.copy_at[path].parameters())
            for paths in (task.norms, task.heads)
        )
        layers = sum(p.numel() for p in task.adapters.parameters())
        total = layers + norms + modules
        tasks.append(TaskSize(name, layers, norms, modules, total, total / base))
    kinds = [sum(column) for column in list(zip(*tasks))[1:4]]
    everything = TaskSize("all tasks", kinds[0], kinds[1], kinds[2], sum(kinds), sum(kinds) / base)
    return AdapterSummary(base, active_adapter(model), tuple(tasks), everything)
