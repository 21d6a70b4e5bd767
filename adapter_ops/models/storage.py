"""The stacks of a bank: one entry for each place on the device, and what runs them in the model."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapters
from .batches import check_rows, device_of, kind_of, same_structure
from .layers import AdapterLayer
from .mixed import GroupedHead, GroupedLayer, GroupedNorm, norm_by_rows
from .parameters import Task
from .stacks import Kept, state_of, weights_of, widen

_MAY_DIFFER = ("bottleneck", "reduction_factor", "init", "init_std", "dropout")  # of configs in one bank


class Storage:
    """Stacks with as many entries as a bank has places, made for tasks like its first one.

    Args:
        adapters: of the model.
        first: a task, whose values are not taken.
        name: of that task, for errors.
        capacity: the number of places.
        bottleneck: R, the largest bottleneck of a task.
    """

    def __init__(self, adapters: Adapters, first: Task, name: str, capacity: int, bottleneck: int) -> None:
        self.first = name
        self.like = copy.deepcopy(first).to("meta").requires_grad_(False).eval()
        self.capacity, self.bottleneck = capacity, bottleneck
        self.base_fits = True  # whether the base has heads of the tasks' sizes
        with torch.inference_mode(False), torch.no_grad():
            self.layers = {
                site: (self._layer(layer, first.layer_at[site]),) for site, layer in self.like.layer_at.items()
            }
            self.copies: dict[str, GroupedHead] = {}
            for path, like in self.like.copy_at.items():
                switch = adapters.switches[path]
                check_rows(switch)
                state, base = state_of(first.copy_at[path]), state_of(switch.module)
                fits = same_structure(switch.module, like)
                self.base_fits &= fits
                stacks = {n: t.new_zeros(capacity + 1, *t.shape) for n, t in state.items()}
                if fits:
                    for n, t in stacks.items():
                        t[capacity].copy_(base[n])
                is_head = path in first.heads
                kept = Kept(stacks) if is_head or norm_by_rows(first.copy_at[path]) else None
                device, calls = device_of(first.copy_at[path], adapters), [None] * capacity
                kind = GroupedHead if is_head else GroupedNorm
                self.copies[path] = kind(calls, switch.base, like, kept, None, device, _Entries(stacks), fits)

    def _layer(self, like: AdapterLayer, first: AdapterLayer) -> GroupedLayer:
        C, R = self.capacity, self.bottleneck
        stacks = []
        for b in first.bottlenecks:
            weights = weights_of(b)  # type: ignore[arg-type]
            w_down, w_up = weights["w_down"], weights["w_up"]
            D = w_down.shape[1]
            t = {"w_down": w_down.new_zeros(C, R, D), "b_down": w_down.new_zeros(C, R)}
            t |= {"w_up": w_up.new_zeros(C, D, R), "b_up": w_up.new_zeros(C, D)}
            number: Any = 1.0
            if isinstance(b.scale, Tensor):
                t["scale"] = b.scale.new_zeros((C, D) if b.scale.numel() > 1 else (C,))  # type: ignore[operator]
            else:
                number = b.scale
            stacks.append(Kept(t, number))  # type: ignore[arg-type]
        norm = None
        if first.norm is not None:
            norm = Kept({n: p.new_zeros(C, *p.shape) for n, p in state_of(first.norm).items()})
        return GroupedLayer(like, stacks, norm, None, first.bottlenecks[0].down.weight.device)  # type: ignore[union-attr,arg-type]

    @property
    def tensors(self) -> list[Tensor]:
        stacks = [stack for (layer,) in self.layers.values() for stack in (*layer.bottlenecks, layer.norm) if stack]
        found = [t for stack in stacks for t in stack.kept.values()]
        return found + [t for head in self.copies.values() for t in head.state.stacks.values()]  # type: ignore[union-attr]

    @torch.no_grad()
    def write(self, place: int, task: Task) -> None:
        """Copies a task, which `check_fits` found to fit, to a place."""
        for site, (group,) in self.layers.items():
            layer = task.layer_at[site]
            for stack, b in zip(group.bottlenecks, layer.bottlenecks):
                values = widen(weights_of(b), self.bottleneck)  # type: ignore[arg-type]
                if isinstance(b.scale, Tensor):
                    values["scale"] = b.scale
                for n, t in stack.kept.items():
                    t[place].copy_(values[n].reshape(t[place].shape))
            if group.norm is not None and layer.norm is not None:
                _copy(group.norm.kept, place, layer.norm)
        for path, head in self.copies.items():
            _copy(head.state.stacks, place, task.copy_at[path])  # type: ignore[union-attr]


class _Entries:
    """Of stacked parameters, those of one entry."""

    def __init__(self, stacks: dict[str, Tensor]) -> None:
        self.stacks = stacks

    def __call__(self, entry: int) -> dict[str, Tensor]:
        return {name: t[entry] for name, t in self.stacks.items()}


def _copy(stacks: Mapping[str, Tensor], place: int, module: nn.Module) -> None:
    for name, t in state_of(module).items():
        stacks[name][place].copy_(t)


def check_bottlenecks(name: str, task: Task, bottleneck: int) -> None:
    """Raises ValueError where an adapter of a task is larger than the bank has room for."""
    for site, layer in task.layer_at.items():
        for b in layer.bottlenecks:
            size = weights_of(b)["w_down"].shape[0]  # type: ignore[arg-type]
            if size > bottleneck:
                raise ValueError(
                    f"the task {name!r} has a bottleneck of {size} at {site!r}, and the bank was made for at most "
                    f"{bottleneck}: give AdapterBank a larger bottleneck"
                )


def check_fits(name: str, task: Task, storage: Storage) -> None:
    """Raises ValueError, which names both sides, where a task differs from a bank's first one in what may not."""
    like, first = storage.like, storage.first
    for field in vars(like.config):
        ours, theirs = getattr(task.config, field), getattr(like.config, field)
        if field not in _MAY_DIFFER and ours != theirs:
            raise ValueError(
                f"the task {name!r} has {field}={ours!r}, and the bank's first task, {first!r}, has {theirs!r}: the "
                f"configs in one bank may differ in {', '.join(_MAY_DIFFER)} only"
            )
    for what, ours, theirs in (
        ("adapters at", task.layer_at.keys(), like.layer_at.keys()),
        ("its own modules", task.copy_at.keys(), like.copy_at.keys()),
    ):
        if ours != theirs:
            differing = sorted(ours ^ theirs)
            raise ValueError(
                f"the task {name!r} has {len(ours)} {what} paths of the model, and the bank's first task, {first!r}, "
                f"has {len(theirs)}; they differ at {', '.join(differing[:3])}"
            )
    for path, module in task.copy_at.items():
        ours, theirs = state_of(module), state_of(like.copy_at[path])
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            a, b = (f"{tuple(s[key].shape)} {s[key].dtype}" if key in s else "nothing" for s in (ours, theirs))
            if a != b:
                raise ValueError(
                    f"the task {name!r} has {a} as {path}.{key}, and the bank's first task, {first!r}, has {b}: heads "
                    "in one bank need the same sizes"
                )
    for site, layer in task.layer_at.items():
        ours, theirs = kind_of(layer)[:-1], kind_of(like.layer_at[site])[:-1]
        ours, theirs = _without_dropout(ours), _without_dropout(theirs)
        if ours != theirs:
            raise ValueError(
                f"the adapter of the task {name!r} at {site!r} is {ours}, and that of the bank's first task, "
                f"{first!r}, is {theirs}"
            )


def _without_dropout(kind: Any) -> Any:
    return (*kind[:4], *kind[5:])
