"""Calls: what calls of the same sizes, strides, dtypes, devices and settings have in common, worked out once.

`KernelCalls` and `CPUCalls` have the same two methods, forward and backward, and no tensors: they may be called from
any thread, and by any adapter of the same sizes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .kernels.installed import MISSING
from .kernels.problem import (
    UNTUNED,
    Needs,
    Options,
    Problem,
    Target,
    Tuning,
    Weights,
    backward_problem,
    forward_problem,
)
from .kinds import Kinds, present

if MISSING is None:  # else no call takes the backend of KernelCalls
    from .kernels import backward as backward_form
    from .kernels import forward as forward_form
    from .kernels.plan import Plan

Parameters = Sequence[Tensor | None]
# A recording's function: the outputs, or None where there is none for these inputs.
Play = Callable[..., Sequence[Any] | None]

_KEPT_HERE = 64  # plans of calls of one kind


def rows(t: Tensor) -> Tensor:
    """t [..., D] as [M, D] with a dense last dimension; a view wherever one exists.

    Rows may overlap. A tile of 128 rows is addressed in 32 bits, so rows further apart than 2^24 elements are copied
    together.
    """
    if t.dim() != 2:
        t = t.reshape(-1, t.shape[-1])
    if t.is_contiguous():
        return t
    row, column = t.stride()
    return t if column == 1 and row < 1 << 24 else t.contiguous()


def dense(weights: Sequence[Tensor | None]) -> Weights:
    """The kernels and oneDNN take no strides of parameters; oneDNN reads a strided bias as if it were dense."""
    return Weights(*(None if t is None else t.contiguous() for t in weights))  # type: ignore[arg-type]


def _nothing(*inputs: Any) -> None:
    """Of what was not recorded yet."""


def _any_rows(t: Tensor | None) -> Tensor | None:
    """t as the kernels take it: of any shape where it is dense, else [M, D]."""
    return t if t is None or t.is_contiguous() else rows(t)


class CPUCalls:
    """Calls of the CPU backend, by any number of tensors that it serves."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def forward(self, inputs: tuple[Any, ...], save_z: bool) -> Sequence[Any]:
        """y and z of x, residual and the five weights."""
        x, residual, *weights = inputs
        x_rows = rows(x)
        y, z = cpu.forward(x_rows, x_rows if residual is None else rows(residual), dense(weights), self.options, save_z)
        return _as(y, x), z

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        z: Tensor,
        weights: Sequence[Tensor | None],
        needs: Sequence[bool],
        residual_is_x: bool,
        hooked: bool = False,
    ) -> Sequence[Any]:
        """The gradients in the order of `Needs`."""
        dx, *rest = cpu.backward(rows(dy), rows(x), z, dense(weights), self.options, Needs(*needs), residual_is_x)
        return [None if dx is None else dx.view(x.shape), *rest]


def _as(y: Tensor, x: Tensor) -> Tensor:
    """y in the shape of x. No view, because autograd lets nobody write into a view that was made inside a Function."""
    return y if y.shape == x.shape else y.resize_(x.shape)


def _view(dx: Tensor, x: Tensor) -> Tensor:
    return dx.view(x.shape)


def _shaped(play: Play, x: int, shape: Callable[[Tensor, Tensor], Tensor]) -> Play:
    """A recording whose first output gets the shape of the input with the number x."""

    def shaped(*inputs: Any) -> Sequence[Any] | None:
        found = play(*inputs)
        if found is None or found[0] is None:
            return found
        return shape(found[0], inputs[x]), *found[1:]

    return shaped


class KernelCalls:
    """Calls of the kernels with one description; the plans that they need, and recordings of them.

    Where each row has a task, `index` is which row has each position, and how many rows each task has.
    """

    def __init__(self, options: Options, target: Target, tuning: Tuning = UNTUNED) -> None:
        self.options, self.target, self.tuning = options, target, tuning
        self.plans: dict[Problem, Plan] = {}
        # What was recorded of forward without z and with z, and of backward, whose tensors may have been given other
        # memory since the forward.
        self.forwards: list[Play] = [_nothing, _nothing]
        self.backwards: Kinds[Play] = Kinds()

    def forward(self, inputs: tuple[Any, ...], save_z: bool) -> Sequence[Any]:
        """y and z of x, residual, the five weights and the index."""
        return self.forwards[save_z](*inputs) or self._first_forward(inputs, save_z)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        z: Tensor,
        weights: Sequence[Tensor | None],
        needs: Sequence[bool],
        residual_is_x: bool,
        hooked: bool = False,
        index: Sequence[Tensor] = (),
    ) -> Sequence[Any]:
        """The gradients in the order of `Needs`."""
        tf32 = self.options.dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision
        inputs = dy, x, z, *weights, *index
        settings = *needs, residual_is_x, tf32, hooked, *[t is None for t in weights]
        play = self.backwards.find(settings, present(inputs))
        found = play(*inputs) if play else None
        if found is None:
            found = self._first_backward(settings, inputs, Needs(*needs), residual_is_x, hooked)
        if found[-1] is None:
            return found
        return [*found[:-1], _of_scale(found[-1], weights[-1])]

    def _first_forward(self, inputs: tuple[Any, ...], save_z: bool) -> Sequence[Any]:
        x, residual, *weights = inputs[:7]
        taken = (_any_rows(x), _any_rows(residual), *dense(weights), *inputs[7:])
        described = rows(x), None if residual is None else rows(residual), Weights(*taken[2:7])
        problem = forward_problem(*described, self.options, save_z, self.target, self.tuning)
        plan = self.plans.get(problem) or self._keep(problem, forward_form.plan(problem))
        y, z = plan.run(taken)
        assert y is not None
        if plan.recording is not None and _same(taken, inputs):
            play = plan.recording.play
            self.forwards[save_z] = play if y.shape == x.shape else _shaped(play, 0, _as)
        return _as(y, x), z

    def _first_backward(
        self, settings: Any, inputs: tuple[Any, ...], needs: Needs, residual_is_x: bool, hooked: bool
    ) -> list[Any]:
        dy, x, z, *weights = inputs[:8]
        taken = (_any_rows(dy), _any_rows(x), z.contiguous(), *dense(weights), *inputs[8:])
        described = rows(dy), rows(x), taken[2], Weights(*taken[3:8])
        problem = backward_problem(*described, self.options, needs, residual_is_x, self.target, self.tuning)
        # What hooks bring back may differ from what a problem tells of it, so nothing is recorded of such a call.
        plan = None if hooked else self.plans.get(problem)
        if plan is None:
            plan = backward_form.plan(problem)
            if not hooked:
                self._keep(problem, plan)
        found = plan.run(taken)
        dx = found[0]
        if plan.recording is not None and _same(taken, inputs):
            play = plan.recording.play
            shaped = play if dx is None or dx.shape == x.shape else _shaped(play, 1, _view)
            self.backwards.keep(settings, present(inputs), shaped)
        return found if dx is None else [_view(dx, x), *found[1:]]

    def _keep(self, problem: Problem, plan: "Plan") -> "Plan":
        if len(self.plans) >= _KEPT_HERE:
            self.plans.clear()
        self.plans[problem] = plan
        return plan


def _of_scale(per_channel: Any, scale: Any) -> Tensor:
    """The gradient of a scale of one value or one a channel, a task, from one value a channel."""
    total = per_channel if scale.numel() == per_channel.numel() else per_channel.sum(-1)
    return total.to(scale.dtype).view_as(scale)


def _same(taken: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> bool:
    return all(a is b for a, b in zip(taken, inputs))
