"""bottleneck_adapter: checks its arguments, once for calls that are alike, then calls ops."""

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import backend, ops
from .backend import Backend
from .calls import rows
from .kernels.activations import find_activation
from .kernels.problem import Options, Weights
from .ops import known

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def bottleneck_adapter(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    *,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """A bottleneck adapter (Houlsby et al. 2019, §2.1), fused:

        residual + scale · (activation(x · w_downᵀ + b_down) · w_upᵀ + b_up)

    Args:
        x: [..., D], fp16, bf16, fp32 or fp64. Rows may be strided.
        w_down, b_down: [R, D] and [R] or None, as in `nn.Linear(D, R)`.
        w_up, b_up: [D, R] and [D] or None, as in `nn.Linear(R, D)`. The four parameters share a dtype, which may
            differ from x's: products are taken in x's dtype (under autocast in autocast's), sums in fp32.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu", "tanh", "sigmoid", "quick_gelu", "leaky_relu",
            "identity", or an alias such as "gelu_new" or "swish".
        scale: a finite number, or a tensor of one element or of shape [D], which then gets a gradient.
        residual: x's shape; x itself where None.

    Returns:
        [..., D] in the dtype that `residual + nn.Linear(...)(...)` would have.

    Raises:
        ValueError: shapes or devices that do not fit, a bottleneck under 1, an unknown activation, an infinite scale.
        TypeError: a dtype that is not one of the four, parameters that differ in dtype, no tensor for a tensor, no
            number for the scale.
        RuntimeError: the environment variable ADAPTER_OPS_REQUIRE names another backend than the one that would run,
            or none.

    Which implementation runs, and why, is what `explain` answers. Gradients of gradients work, through PyTorch's own
    operations.
    """
    y = known(x, residual, w_down, b_down, w_up, b_up, scale, activation)
    if y is not None:
        return y
    _check(x, w_down, b_down, w_up, b_up, activation, scale, residual)
    if not isinstance(scale, Tensor):
        weights = Weights(w_down, b_down, w_up, b_up, None)
        return ops.adapter(x, residual, weights, activation, finite_scale(scale))
    if scale.dim() > 1:
        scale = scale.reshape(1)
    return ops.adapter(x, residual, Weights(w_down, b_down, w_up, b_up, scale), activation, 1.0)


def finite_scale(scale: Any) -> float:
    """scale as a Python float. Raises TypeError if it is no number, ValueError if it is infinite or NaN."""
    try:
        number = float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"scale must be a number or a tensor, not {type(scale).__name__}") from None
    if not -math.inf < number < math.inf:  # under torch.compile it may be symbolic, which math.isfinite refuses
        raise ValueError(f"scale is {number}, must be finite")
    return number


def explain(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None = None,
    w_up: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
) -> Backend:
    """Which backend a call of `bottleneck_adapter` with these arguments takes, and why.

    Args:
        x, w_down: [..., D] and [R, D]; they decide about the backend.
        others: as in `bottleneck_adapter`, for the plan. Where w_up is None it is like w_down.

    Returns:
        name: "triton", "cpu" or "reference".
        reason: a sentence.
        plan: None, or what the kernels launch in forward; print it. Its form is "pytorch" where PyTorch's own
            operations run because no kernel was measured to be faster.

    >>> explain(torch.zeros(512, 768), torch.zeros(64, 768)).name
    'cpu'

    The answer is that of an eager call here and now, whatever ADAPTER_OPS_REQUIRE says. Of a compiled call, transforms
    and tensor subclasses decide when it is traced, and device, dtype and size when it runs.
    """
    tensors = (residual, w_down, b_down, w_up, b_up, scale if isinstance(scale, Tensor) else None)
    if found := backend.obstacle(x, *tensors):
        return found
    number = 1.0 if isinstance(scale, Tensor) else finite_scale(scale)
    options = Options(activation, number, backend.compute_dtype(x))
    weights = Weights(w_down, b_down, w_down.t() if w_up is None else w_up, b_up, tensors[-1])
    return backend.choose(rows(x), None if residual is None else rows(residual), weights, options)


def _check(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    activation: str,
    scale: float | Tensor,
    residual: Tensor | None,
) -> None:
    """Cheap for a good call: every comparison once, and no message is made."""
    find_activation(activation)
    try:
        D = x.shape[-1]
        R = w_down.shape[0]
        device, dtype = x.device, w_down.dtype
        fits = (
            R > 0
            and D > 0
            and x.dtype in DTYPES
            and dtype in DTYPES
            and w_down.shape == (R, D)
            and w_up.shape == (D, R)
            and w_up.dtype == dtype
            and w_down.device == device
            and w_up.device == device
            and (b_down is None or (b_down.shape == (R,) and b_down.dtype == dtype and b_down.device == device))
            and (b_up is None or (b_up.shape == (D,) and b_up.dtype == dtype and b_up.device == device))
            and (
                not isinstance(scale, Tensor)
                or ((scale.numel() == 1 or scale.shape == (D,)) and scale.dtype in DTYPES and scale.device == device)
            )
            and (
                residual is None
                or (residual.shape == x.shape and residual.dtype in DTYPES and residual.device == device)
            )
        )
    except (AttributeError, IndexError, RuntimeError):  # RuntimeError: the shape of a nested tensor
        fits = False
    if not fits and not _fits_nested(x, w_down):
        _reject(x, w_down, b_down, w_up, b_up, scale, residual)


def _fits_nested(x: Tensor, w_down: Tensor) -> bool:
    """Whether x is a nested tensor with rows of the right size.

    A nested tensor has no shape to compare. PyTorch's own operations, which such a call is made of, check the rest.
    """
    if not (isinstance(x, Tensor) and x.is_nested and isinstance(w_down, Tensor)):
        return False
    if w_down.dim() != 2 or x.size(-1) != w_down.shape[1]:
        raise ValueError(f"x has hidden size {x.size(-1)}, w_down has shape {tuple(w_down.shape)}")
    return True


def _reject(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    scale: float | Tensor,
    residual: Tensor | None,
) -> NoReturn:
    """Finds what is wrong and names both sides."""
    tensors: dict[str, Any] = {"x": x, "w_down": w_down, "b_down": b_down, "w_up": w_up, "b_up": b_up}
    tensors |= {"residual": residual, "scale": scale if isinstance(scale, Tensor) else None}
    for name, t in tensors.items():
        if (t is None and name in ("x", "w_down", "w_up")) or (t is not None and not isinstance(t, Tensor)):
            raise TypeError(f"{name} must be a tensor, not {type(t).__name__}")
        if t is not None and t.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {t.dtype}, expected one of {', '.join(sorted(map(str, DTYPES)))}")
    if x.dim() == 0:
        raise ValueError("x has no dimensions, expected [..., hidden size]")
    if w_down.dim() != 2:
        raise ValueError(f"w_down has shape {tuple(w_down.shape)}, expected [bottleneck, hidden size]")
    R, D = w_down.shape
    if R < 1 or D < 1:
        raise ValueError(f"w_down has shape {(R, D)}: bottleneck and hidden size must be at least 1")
    if x.shape[-1] != D:
        raise ValueError(f"x has hidden size {x.shape[-1]}, w_down expects {D}")
    shapes = {"w_up": (D, R), "b_down": (R,), "b_up": (D,), "residual": tuple(x.shape)}
    for name, shape in shapes.items():
        t = tensors[name]
        if t is not None and t.shape != shape:
            other = "x" if name == "residual" else "w_down"
            sides = f"{name} has shape {tuple(t.shape)}, {other} {tuple(tensors[other].shape)}"
            raise ValueError(f"{sides} expects {shape}")
    if isinstance(scale, Tensor) and scale.numel() != 1 and scale.shape != (D,):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, expected one element or {(D,)}, the hidden size of x")
    for name in ("w_up", "b_down", "b_up"):
        t = tensors[name]
        if t is not None and t.dtype != w_down.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}, w_down has {w_down.dtype}")
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x is on {x.device}")
    raise AssertionError("a bad call was found but not what is wrong with it")
