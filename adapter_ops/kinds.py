"""Remembers a value for each kind of call, so that calls of a kind that was checked before are not checked again.

Two calls are of one kind if their settings are equal and PyTorch's guards, which torch.compile uses too, find no
difference between their tensors. The guards compare class, dispatch keys (these tell layout, autocast, inference mode,
transforms and dispatch modes), dtype, device, sizes, strides and requires_grad.
"""

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .backend import compute_dtype

KEPT = 1024  # how many settings are remembered; when there are more, all are forgotten
_KEPT_EACH = 8  # kinds of calls with the same settings; the oldest is forgotten

_grad_enabled, _float32 = torch.is_grad_enabled, torch.float32
_some_autocast = torch._C._is_any_autocast_enabled

Value = TypeVar("Value")


def _guard(tensors: tuple[Any, ...]) -> Callable[..., bool]:
    from torch._C._dynamo.guards import TensorGuards

    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check  # type: ignore[no-any-return]


try:
    _guard((torch.empty(0, device="meta"),))
    GUARDED = True
except (ImportError, TypeError):  # a version of PyTorch that has them elsewhere: every call is checked anew
    GUARDED = False


class Kinds(Generic[Value]):
    """A value for each kind of call, which any thread may ask for."""

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[tuple[Callable[..., bool], Value], ...]] = {}

    def find(self, settings: Hashable, tensors: tuple[Any, ...]) -> Value | None:
        """The value of calls of this kind, if there is one."""
        for is_alike, value in self._found.get(settings, ()):
            if is_alike(*tensors):
                return value
        return None

    def keep(self, settings: Hashable, tensors: tuple[Any, ...], value: Value) -> None:
        """Remembers the value for calls of this kind."""
        if not GUARDED:
            return
        if len(self._found) >= KEPT:
            self._found.clear()
        others = self._found.get(settings, ())[-_KEPT_EACH + 1 :]
        self._found[settings] = *others, (_guard(tensors), value)

    def values(self) -> list[Value]:
        return [value for kinds in self._found.values() for _, value in kinds]

    def clear(self) -> None:
        self._found.clear()

    def __len__(self) -> int:
        return len(self._found)


def present(tensors: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The tensors that are not None. Which of them are None belongs to the settings."""
    return tuple([t for t in tensors if t is not None])


def settings_of(
    x: Tensor, residual: Tensor | None, b_down: Tensor | None, b_up: Tensor | None, scale: Any, activation: str
) -> tuple[Hashable, ...]:
    """All but the tensors that decides whether a call is right and how it runs, but for what `ordinary` asks.

    The sizes of x are here as well, because a model sees many of them.
    """
    return (
        x.shape,
        activation,
        scale.__class__,
        scale if scale.__class__ is float or not isinstance(scale, Tensor) else None,
        residual is None,
        b_down is None,
        b_up is None,
        _grad_enabled(),
        compute_dtype(x) if _some_autocast() else None,
        x.is_cuda and (x.dtype is _float32 or _some_autocast()) and torch.backends.cuda.matmul.fp32_precision,
    )
