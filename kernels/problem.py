"""What a call's launches depend on, all but the addresses. None of this needs Triton."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """The tensors of one adapter, laid out as nn.Linear has them; of T tasks, each has a first dimension T."""

    w_down: Tensor  # [R, D]
    b_down: Tensor | None  # [R]
    w_up: Tensor  # [D, R]
    b_up: Tensor | None  # [D]
    scale: Tensor | None  # [1] or [D], of tasks [T] or [T, D]; takes the place of Options.scale


class Options(NamedTuple):
    activation: str
    scale: float
    dtype: torch.dtype  # of both products' operands, and of z


class Needs(NamedTuple):
    """Which gradients are asked for; backward returns them in this order.

    The gradient of a residual of its own is dy itself, so it is not among them.
    """

    x: bool
    w_down: bool
    b_down: bool
    w_up: bool
    b_up: bool
    scale: bool


class Rows(NamedTuple):
    """A tensor [M, D] or [M, R] with a dense last dimension."""

    stride: int  # of a row, in elements
    dtype: torch.dtype


class Target(NamedTuple):
    """The card that a plan is for.

    `unmeasured` says whether it may take forms of which no such card has shown that they are faster than PyTorch.
    """

    capability: tuple[int, int]
    multiprocessors: int
    interpreted: bool = False
    unmeasured: bool = False


class Tuning(NamedTuple):
    """What a test, a benchmark or the tuner asks for in the place of what configs.py and forward.py would choose."""

    form: str | None = None
    tiles: tuple[tuple[str, Any], ...] = ()  # (kernel, Config or Resident)
    splits: int | None = None


UNTUNED = Tuning()


class Problem(NamedTuple):
    """One call of forward (`needs` is None) or of backward."""

    M: int
    D: int
    R: int
    x: Rows
    residual: Rows | None  # None where the residual is x; in backward its stride is 0
    parameter_dtype: torch.dtype
    b_down: bool
    b_up: bool
    activation: str
    scale: float  # used where scale_size is 0
    scale_size: int  # elements of the tensor that is the scale, a task: 1 or D, and 0 where a number is
    dtype: torch.dtype  # of the products' operands, and of z
    tf32: bool  # whether products of float32 may round their operands to TF32
    aligned: bool  # whether every tensor starts at a multiple of 16 bytes
    target: Target
    tuning: Tuning = UNTUNED
    save_z: bool = False  # of forward
    dy: Rows | None = None  # of backward
    needs: Needs | None = None  # of backward
    tasks: int = 0  # T, where each row has a task; 0 where all rows are one adapter's

    @property
    def each(self) -> tuple[int, ...]:
        """The first dimension of every parameter, if it has one: that of the tasks."""
        return (self.tasks,) if self.tasks else ()

    @property
    def acc_dtype(self) -> torch.dtype:
        """Of sums, and of partial sums in memory."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def y_dtype(self) -> torch.dtype:
        """The dtype that `residual + nn.Linear(...)(...)` has."""
        return torch.promote_types((self.residual or self.x).dtype, self.dtype)

    @property
    def scale_stride(self) -> int:
        """0 for one value, 1 for one per channel."""
        return int(self.scale_size > 1)


def _rows(t: Tensor) -> Rows:
    return Rows(t.stride(0), t.dtype)


def _uses_tf32(dtype: torch.dtype) -> bool:
    """PyTorch's setting, whichever of its two interfaces made it."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _common(x: Tensor, weights: Weights, options: Options, others: tuple[Tensor | None, ...]) -> dict[str, Any]:
    w_down, b_down, _, b_up, scale = weights
    tensors = (x, *weights, *others)
    tasks = w_down.shape[0] if w_down.dim() == 3 else 0
    return dict(
        M=x.shape[0],
        D=x.shape[1],
        R=w_down.shape[-2],
        x=_rows(x),
        parameter_dtype=w_down.dtype,
        b_down=b_down is not None,
        b_up=b_up is not None,
        activation=options.activation,
        scale=options.scale,
        scale_size=0 if scale is None else scale.numel() // max(1, tasks),
        dtype=options.dtype,
        tf32=_uses_tf32(options.dtype),
        aligned=all(t is None or t.data_ptr() % 16 == 0 for t in tensors),
        tasks=tasks,
    )


def forward_problem(
    x: Tensor,
    residual: Tensor | None,
    weights: Weights,
    options: Options,
    save_z: bool,
    target: Target,
    tuning: Tuning = UNTUNED,
) -> Problem:
    """Of x and residual [M, D] with any row stride and a dense last dimension, and dense parameters.

    Parameters of three dimensions, [T, R, D] and so on, are those of T tasks.
    """
    own = None if residual is None else _rows(residual)
    common = _common(x, weights, options, (residual,))
    return Problem(**common, residual=own, target=target, tuning=tuning, save_z=save_z)


def backward_problem(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weights: Weights,
    options: Options,
    needs: Needs,
    residual_is_x: bool,
    target: Target,
    tuning: Tuning = UNTUNED,
) -> Problem:
    """Of dy and x [M, D] with any row stride and a dense last dimension, z [M, R] and dense parameters."""
    own = None if residual_is_x else Rows(0, dy.dtype)
    common = _common(x, weights, options, (dy, z))
    return Problem(**common, residual=own, target=target, tuning=tuning, dy=_rows(dy), needs=needs)
