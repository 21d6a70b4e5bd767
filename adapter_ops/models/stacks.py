"""The parameters of several tasks stacked, and which entry of a stack every row of a batch takes."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import BottleneckAdapter


class Rows:
    """Which entry of a stack the rows of a batch take; −1 for none.

    Args:
        entries: one for each of the n examples.
        device: of the tensors that are made of them.
        beams: how many rows `generate()` makes of each example, which then are neighbours.
    """

    def __init__(self, entries: Sequence[int], device: torch.device, beams: int = 1) -> None:
        self.entries = tuple(entries)
        self.beams = beams
        self.ids = torch.tensor(self.entries, device=device)  # [n]
        self.repeated = self.ids if beams == 1 else self.ids.repeat_interleave(beams)  # [n · beams]
        self.whole = -1 not in self.entries

    def at(self, x: Tensor) -> Tensor:
        """The entries of the rows of x, which has the shape [n, ...], [n · beams, ...], or [rows of all, D] where a
        model makes one dimension of examples and tokens.

        Raises ValueError if x has another number of rows.
        """
        rows, n = x.shape[0], self.ids.shape[0]
        if rows == n:
            return self.ids
        if rows == n * self.beams:
            return self.repeated
        if x.dim() == 2 and rows % n == 0:
            return self.ids.repeat_interleave(rows // n)
        also = f" or {n * self.beams} with {self.beams} rows for each" if self.beams > 1 else ""
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} reached an adapter or a module of the tasks, and {n} tasks were given "
            f"for the examples of the batch: its first dimension must be the batch, of size {n}{also}"
        )

    def parts(self, rows: int) -> dict[int, Tensor]:
        """The positions of the rows of each entry, in a tensor of so many rows."""
        each = rows // len(self.entries)
        found: dict[int, list[int]] = {}
        for i, entry in enumerate(self.entries):
            found.setdefault(entry, []).extend(range(i * each, (i + 1) * each))
        return {entry: torch.tensor(positions, device=self.ids.device) for entry, positions in found.items()}


def of_rows(t: Tensor, x: Tensor) -> Tensor:
    """t [rows] or [rows, D] in a shape that broadcasts against x [rows, ..., D]."""
    return t.reshape(t.shape[0], *[1] * (x.dim() - t.dim()), *t.shape[1:])


class Stack:
    """Parameters of T modules of one structure, stacked along a new first dimension.

    They are stacked in each call if they train, so that gradients reach them, and once, in `kept`, if they do not.

    Args:
        modules: the modules. Their last one may be the base's, for rows without a task.
        trains: whether they may train, or others of the same batch.
        entries: None, or to stack them now, with zeros up to so many entries: a compiled model is compiled again for
            another number of them.
    """

    def __init__(self, modules: Sequence[nn.Module], trains: bool, entries: int | None) -> None:
        self.modules, self.trains = list(modules), trains
        self.kept: Any = None
        if entries is not None:
            with torch.inference_mode(False), torch.no_grad():
                self.kept = {name: _with_zeros(t, entries) for name, t in self.fresh().items()}

    def tensors(self) -> dict[str, Tensor]:
        """By name, each with a first dimension of at least T."""
        if self.kept is not None and (not torch.is_grad_enabled() or not self.trains):
            return self.kept
        return self.fresh()

    def fresh(self) -> dict[str, Tensor]:
        states = [state_of(module) for module in self.modules]
        return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers."""
    if not module._modules:  # as nearly all are, and named_parameters takes long
        return {n: t for own in (module._parameters, module._buffers) for n, t in own.items() if t is not None}
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _with_zeros(t: Tensor, entries: int) -> Tensor:
    missing = entries - t.shape[0]
    return t if missing <= 0 else torch.cat([t, t.new_zeros(missing, *t.shape[1:])])


class BottleneckStack(Stack):
    """Of bottlenecks, whose sizes may differ: parameters have zeros beyond their own size, so nothing is added there.

    Its tensors are w_down [T, R, D], b_down [T, R], w_up [T, D, R], b_up [T, D], and where the tasks differ in scale,
    or learn it, scale [T] or [T, D].
    """

    modules: list[BottleneckAdapter]  # type: ignore[assignment]

    def __init__(self, modules: Sequence[BottleneckAdapter], trains: bool, entries: int | None) -> None:
        scales = [module.scale for module in modules]
        numbers = {scale for scale in scales if not isinstance(scale, Tensor)}
        self.number = numbers.pop() if len(numbers) == 1 and not any(isinstance(s, Tensor) for s in scales) else 1.0
        self.has_scale = any(isinstance(scale, Tensor) for scale in scales) or len(numbers) > 0
        super().__init__(modules, trains, entries)

    def fresh(self) -> dict[str, Tensor]:
        parts = [weights_of(module) for module in self.modules]
        R = max(part["w_down"].shape[0] for part in parts)
        parts = [widen(part, R) for part in parts]
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        if self.has_scale:
            stacked["scale"] = self._scales(stacked["b_up"])
        return stacked

    def _scales(self, like: Tensor) -> Tensor:
        """[T], or [T, D] if one of the tasks has a value for each channel."""
        scales = [module.scale for module in self.modules]
        dtype = torch.promote_types(like.dtype, torch.float32)  # a number such as 0.1 is none in bf16
        found = [s.to(dtype) if isinstance(s, Tensor) else like.new_full((1,), s, dtype=dtype) for s in scales]
        channels = max(s.numel() for s in found)
        return torch.stack([s.expand(channels) for s in found]).squeeze(1)


def weights_of(module: BottleneckAdapter) -> dict[str, Tensor]:
    down, up = module.down, module.up
    return {"w_down": down.weight, "b_down": down.bias, "w_up": up.weight, "b_up": up.bias}


def widen(weights: dict[str, Tensor], R: int) -> dict[str, Tensor]:
    """The weights with zeros up to a bottleneck of R."""
    missing = R - weights["w_down"].shape[0]
    if not missing:
        return weights
    return {
        "w_down": nn.functional.pad(weights["w_down"], (0, 0, 0, missing)),
        "b_down": nn.functional.pad(weights["b_down"], (0, missing)),
        "w_up": nn.functional.pad(weights["w_up"], (0, missing)),
        "b_up": weights["b_up"],
    }


class Kept(Stack):
    """Tensors that were stacked elsewhere, such as those of a bank."""

    def __init__(self, tensors: dict[str, Tensor], number: float = 1.0) -> None:
        self.modules, self.trains, self.kept = [], False, tensors
        self.number = number


class Grouped:
    """What stands for several modules of tasks where a model calls one.

    Args:
        entry_of: for each task of the batch, in their order, its entry in the stack; −1 for none. None is for tasks
            whose numbers are the entries.
        without: the entry of rows whose task has none, and of rows without a task.
        device: where the rows' entries have to be.
    """

    rows: Rows

    def __init__(self, entry_of: Sequence[int] | None, without: int, device: torch.device) -> None:
        self.entry_of = None if entry_of is None else tuple(entry_of)
        self.without, self.device = without, device

    def on(self, tasks: Sequence[int], beams: int, made: dict[Any, Rows]) -> Any:
        """The same for a batch of examples whose tasks have these numbers, −1 for the bare base.

        `made` has the rows that others of the same batch have in common with this one.
        """
        key = (self.entry_of, self.without, self.device)
        if key not in made:
            own = self.entry_of
            entries = list(tasks) if own is None else [own[task] if task >= 0 else -1 for task in tasks]
            made[key] = Rows([self.without if e < 0 else e for e in entries], self.device, beams)
        found = copy.copy(self)
        found.rows = made[key]
        return found
