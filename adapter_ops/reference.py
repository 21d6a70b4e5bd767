"""The formula in plain PyTorch: oracle of every test, baseline of every benchmark, and the fallback path."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.activations import find_activation
from .kernels.problem import Needs, Options, Weights


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
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + scale · (act(x · w_downᵀ + b_down) · w_upᵀ + b_up), by autograd's own operations.

    Shapes and defaults are those of `adapter_ops.bottleneck_adapter`. With `compute_dtype` the operands of both
    products are cast to it first, as `torch.autocast` would.
    """
    eager = find_activation(activation).eager
    return formula(x, residual, w_down, b_down, w_up, b_up, scale, eager, compute_dtype)


def formula(
    x: Tensor,
    residual: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    scale: float | Tensor,
    eager: Callable[[Tensor], Tensor],
    compute_dtype: torch.dtype | None,
) -> Tensor:
    """`bottleneck_adapter` with the function of the activation for its name."""
    inner = x
    if compute_dtype is not None and not x.dtype == w_down.dtype == compute_dtype:
        inner, w_down, w_up = x.to(compute_dtype), w_down.to(compute_dtype), w_up.to(compute_dtype)
        b_down = None if b_down is None else b_down.to(compute_dtype)
        b_up = None if b_up is None else b_up.to(compute_dtype)
    u = F.linear(eager(F.linear(inner, w_down, b_down)), w_up, b_up)
    if isinstance(scale, Tensor) or scale != 1.0:
        u = (u * scale).to(u.dtype)  # a scale of a wider dtype does not lift the result
    return (x if residual is None else residual) + u


def pre_activation(x: Tensor, weights: Weights, dtype: torch.dtype) -> Tensor:
    """z [M, R] in `dtype`, which the paths save for backward."""
    b_down = weights.b_down
    b_down = None if b_down is None else b_down.to(dtype)
    return F.linear(x.reshape(-1, x.shape[-1]).to(dtype), weights.w_down.to(dtype), b_down)


def gradients(
    dy: Tensor, x: Tensor, z: Tensor, weights: Weights, options: Options, needs: Needs, residual_is_x: bool
) -> list[Tensor | None]:
    """The six gradients in the order of `Needs`, from dy and x [..., D] and z [M, R].

    Nothing is written in place, so torch.vmap, forward-mode differentiation and autograd go through every step. In grad
    mode the gradients are differentiable functions of dy, x, the parameters, and of whatever z depends on.
    """
    w_down, _, w_up, b_up, scale = weights
    dtype, D = options.dtype, x.shape[-1]
    rows, du = x.reshape(-1, D).to(dtype), dy.reshape(-1, D).to(dtype)  # [M, D]
    factor: float | Tensor = options.scale if scale is None else scale
    activation = find_activation(options.activation)
    dx, dw_down, db_down, dw_up, db_up, dscale = [None] * len(needs)
    if needs.w_up or needs.scale:
        product = du.t() @ activation.eager(z)  # [D, R], without scale
        if needs.w_up:
            dw_up = product * (factor[:, None] if isinstance(factor, Tensor) and factor.numel() > 1 else factor)
        if scale is not None and needs.scale:
            dscale = (product * w_up).sum(1)
            dscale = dscale if b_up is None else dscale + du.sum(0) * b_up
            dscale = dscale if scale.numel() > 1 else dscale.sum()
            dscale = dscale.to(scale.dtype).reshape(scale.shape)
    if needs.b_up:
        db_up = du.sum(0) * factor
    if needs.x or needs.w_down or needs.b_down:
        dh = (du * factor).to(dtype) @ w_up.to(dtype)
        dz = activation.eager_derivative(z, dh)
        if needs.x:
            dx = (dz @ w_down.to(dtype)).to(x.dtype).reshape(x.shape)
            dx = dx + dy.to(x.dtype) if residual_is_x else dx
        dw_down = dz.t() @ rows if needs.w_down else None
        db_down = dz.sum(0) if needs.b_down else None
    parameters = [None if t is None else t.to(w_down.dtype) for t in (dw_down, db_down, dw_up, db_up)]
    return [dx, *parameters, dscale]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64, on the device of `expected`; 0 where the two are equal."""
    expected = expected.double()
    difference = torch.sub(found.to(expected.device), expected).norm()  # promotes `found` without a copy
    return (difference / expected.norm()).item() if difference else 0.0
