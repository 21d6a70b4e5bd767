"""The formula in plain PyTorch: oracle of every test, baseline of every benchmark, and the fallback path."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.activations import find_activation


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
    inner = x
    if compute_dtype is not None and not x.dtype == w_down.dtype == compute_dtype:
        inner, w_down, w_up = x.to(compute_dtype), w_down.to(compute_dtype), w_up.to(compute_dtype)
        b_down = None if b_down is None else b_down.to(compute_dtype)
        b_up = None if b_up is None else b_up.to(compute_dtype)
    z = F.linear(inner, w_down, b_down)
    u = F.linear(find_activation(activation).eager(z), w_up, b_up)
    if isinstance(scale, Tensor) or scale != 1.0:
        u = (u * scale).to(u.dtype)  # a scale of a wider dtype does not lift the result
    return (x if residual is None else residual) + u
