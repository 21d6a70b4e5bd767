"""The tasks of a batch's examples: which they are, and what is made of them to run together."""

import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapters
from .hooks import Switch
from .layers import AdapterLayer
from .mixed import GATHERED, ROWS_MIXED, GroupedHead, GroupedLayer, GroupedNorm, TaskBatch, elements, norm_by_rows
from .parameters import Task
from .sites import base_parameters
from .stacks import BottleneckStack, Stack, state_of


def names_of(known: Collection[str], names: Any, where: str = "the model") -> list[str | None]:
    """The name of each example's task, or None for the bare base.

    Args:
        known: the tasks that there are, in their order.
        names: a sequence of names, with None for the base; or numbers in `known` as a tensor of integers [examples],
            with -1 for the base.
        where: what has the tasks, for errors.

    Raises:
        TypeError: neither of the two.
        ValueError: an unknown name, or a number out of range, or no example at all.
    """
    found: list[str | None]
    if isinstance(names, Tensor):
        if names.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8) or names.dim() != 1:
            raise TypeError(
                f"the tasks of a batch are a tensor of dtype {names.dtype} and shape {tuple(names.shape)}, expected "
                "integers [examples]"
            )
        numbers, order = names.tolist(), list(known)
        if wrong := sorted({number for number in numbers if not -1 <= number < len(order)}):
            raise ValueError(
                f"the tasks of a batch have the numbers {wrong}, expected -1, for the bare base, to {len(order) - 1}: "
                f"{where} has {len(order)} adapters"
            )
        found = [None if number < 0 else order[number] for number in numbers]
    elif isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"the tasks of a batch are {names!r}, expected a sequence with the name of a task, or None, for each "
            "example, or a tensor of integers"
        )
    else:
        if wrong := [name for name in names if name is not None and not isinstance(name, str)]:
            raise TypeError(f"the tasks of a batch hold {wrong[0]!r}, expected names of tasks, and None for the base")
        if unknown := [name for name in dict.fromkeys(names) if name is not None and name not in known]:
            order = list(known)
            some = ", ".join(order[:40]) + (f" and {len(order) - 40} others" if len(order) > 40 else "")
            raise ValueError(
                f"{where} has no adapter{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}; it has: "
                f"{some or 'none'}"
            )
        found = list(names)
    if not found:
        raise ValueError("the tasks of a batch are empty, expected the task of at least one example")
    return found


def batch_of(adapters: Adapters, tasks: Sequence[Task | None]) -> TaskBatch:
    """What runs for a batch whose examples have these tasks.

    Raises ValueError, before anything runs, where a task's parameters are sharded or offloaded, and where a task
    cannot share a batch with others.
    """
    distinct = list(dict.fromkeys(task for task in tasks if task is not None))
    number = {task: i for i, task in enumerate(distinct)}
    numbers = [-1 if task is None else number[task] for task in tasks]
    for task in distinct:
        check_task(adapters, task)
    trained = any(p.requires_grad for task in distinct for p in task.own_parameters())
    # In a process that compiles, every mix of as many examples has stacks of as many entries, so that one compilation
    # serves all of them.
    entries: int | None = min(len(tasks), len(adapters.tasks)) if "torch._dynamo" in sys.modules else 0
    if trained and torch.is_grad_enabled():
        entries = None
    layers = {}
    for site in adapters.sites:
        here = {i: task.layer_at[site.name] for i, task in enumerate(distinct) if site.name in task.layer_at}
        if here:
            layers[site.name] = _layers_at(here, len(distinct), trained, entries)
    copies: dict[str, GroupedHead] = {}
    heads = tuple(dict.fromkeys(path for task in distinct for path in task.heads))
    unequal = None
    for path in dict.fromkeys(path for task in distinct for path in task.copy_at):
        own = {i: task.copy_at[path] for i, task in enumerate(distinct) if path in task.copy_at}
        entry_of = [list(own).index(i) if i in own else -1 for i in range(len(distinct))]
        compared = [*own.values(), *([adapters.switches[path].module] if any(i not in own for i in numbers) else [])]
        equal = all(same_structure(module, compared[0]) for module in compared)
        copies[path] = _copies_at(adapters, path, list(own.values()), entry_of, equal, trained, entries, path in heads)
        unequal = unequal or (None if equal else path)
    refusal = unequal and (
        f"the tasks of this batch have heads {unequal!r} of different sizes, and the model computes one loss for all "
        "of its rows: call the model without labels=, and compute each task's loss from its rows of the logits"
    )
    return TaskBatch(layers, copies, heads, numbers, refusal=refusal)


def _layers_at(here: dict[int, AdapterLayer], count: int, trains: bool, entries: int | None) -> list[GroupedLayer]:
    """The adapters of `count` tasks at one site, by number of the task: one GroupedLayer for each kind. `trains` and
    `entries`: see `Stack`."""
    kinds: dict[Any, list[int]] = {}
    for i, layer in here.items():
        kinds.setdefault(kind_of(layer), []).append(i)
    groups = []
    for members in kinds.values():
        own = [here[i] for i in members]
        entry_of = [members.index(i) if i in members else -1 for i in range(count)]
        stacks = [
            BottleneckStack([layer.bottlenecks[d] for layer in own], trains, entries)  # type: ignore[misc]
            for d in range(len(own[0].bottlenecks))
        ]
        norms = [layer.norm for layer in own if layer.norm is not None]
        device = own[0].bottlenecks[0].down.weight.device  # type: ignore[union-attr]
        groups.append(GroupedLayer(own[0], stacks, Stack(norms, trains, entries) if norms else None, entry_of, device))  # type: ignore[arg-type]
    return groups


def kind_of(layer: AdapterLayer) -> Any:
    """What adapters have in common that one launch serves."""
    bottleneck: Any = layer.bottlenecks[0]
    norm: Any = layer.norm
    inner = None if norm is None else (type(norm), norm.eps, layer.norm_position)
    wiring = layer.reads, layer.adds_to, layer.ln_after
    weight = bottleneck.down.weight
    return bottleneck.activation, wiring, len(layer.bottlenecks), inner, layer.dropout, weight.dtype, weight.device


def _copies_at(
    adapters: Adapters,
    path: str,
    modules: list[nn.Module],
    entry_of: list[int],
    equal: bool,
    trains: bool,
    entries: int | None,
    is_head: bool,
) -> GroupedHead:
    """What runs for the copies that tasks have of one module. `equal`: whether they differ in their values alone."""
    switch, first = adapters.switches[path], modules[0]
    check_rows(switch)
    stack = None
    small = (len(modules) + 1) * elements(first) <= GATHERED
    if equal and (small if is_head else all(norm_by_rows(module) for module in modules)):
        # Where the base's differs in size no row takes it, and an entry in its place keeps the number of entries.
        last = switch.module if same_structure(switch.module, first) else first
        stack = Stack([*modules, last], trains, entries and entries + 1)
    device = device_of(first, adapters)
    return (GroupedHead if is_head else GroupedNorm)(modules, switch.base, first, stack, entry_of, device)


def check_rows(switch: Switch) -> None:
    """Raises ValueError for a module of the base that rows cannot have their own of, or that has no values."""
    for t in state_of(switch.module).values():
        if t.is_meta or hasattr(t, "full_tensor"):
            raise ValueError(
                f"the module {switch.path!r} is {_lacks(t)}, and the rows of a batch that have no task need the whole "
                "of it: use a model that is neither sharded nor offloaded, or call it for each task with using_adapter"
            )
    if hasattr(switch.above[0], "get_rel_embedding"):
        raise ValueError(
            f"the normalisation {switch.path!r} is of the relative positions, which all rows of a batch share, so "
            "that rows cannot have their own: train such tasks with layer_norms='frozen', or call the model for each "
            "task with using_adapter"
        )


def device_of(module: nn.Module, adapters: Adapters) -> torch.device:
    """Where a module runs; one without parameters is where the model is."""
    found = next((t.device for t in state_of(module).values()), None)
    return found or next((p.device for _, p in base_parameters(adapters.model)), torch.device("cpu"))


def same_structure(module: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same parameters and buffers but for their values."""
    a, b = state_of(module), state_of(other)
    same = a.keys() == b.keys() and all(a[n].shape == b[n].shape and a[n].dtype == b[n].dtype for n in a)
    return same and type(module) is type(other)


def check_task(adapters: Adapters, task: Task) -> None:
    """Raises ValueError for a task that cannot share a batch with others."""
    for layer in task.layer_at.values():
        if layer.norm is not None and isinstance(layer.norm, nn.BatchNorm1d) and layer.norm.training:
            raise ValueError(f"the task {adapters.name_of(task)!r}: {ROWS_MIXED}")
    if any(p.is_meta or hasattr(p, "full_tensor") for p in task.own_parameters()):
        lacking = [(n, p) for n, p in task.named_parameters() if p.is_meta or hasattr(p, "full_tensor")]
        for name, p in lacking[:1]:
            raise ValueError(
                f"{name!r} of the task {adapters.name_of(task)!r} is {_lacks(p)}, and a batch of several tasks needs "
                "the whole of it: use a model that is neither sharded nor offloaded, or call it for each task with "
                "using_adapter"
            )


def _lacks(t: Tensor) -> str:
    return "sharded" if hasattr(t, "full_tensor") else "on the meta device (offloaded, perhaps)"
