"""The CPU backend: the same maths in ATen and oneDNN calls that add into their results.

Against eager PyTorch it saves the [M, D] temporaries and their passes over memory, and keeps only x and z for
backward. The two functions take tensors as the kernels take them.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.activations import find_activation
from .kernels.problem import Needs, Options, Weights

# Measured: over products longer than _LONG, in fp32 than _THIN, oneDNN's epilogue adds more slowly than a pass of its
# own does. In an outer product in bf16 a side thinner than _THIN goes first. To sum _LARGE elements of dy or more over
# the tokens takes longer than one more row of a product, unless that product is large itself. The product adds term by
# term, where the sum is pairwise: 1e-5 off and worse if rows of dy repeat, so only 16-bit gradients are made so.
_LONG, _THIN, _LARGE = 128, 16, 1 << 21
_BLOCK = 1024  # rows of an fp32 outer product that are summed at a time
# Activations that oneDNN applies to a product before it rounds and stores it.
_EPILOGUES: dict[str, tuple[str, list[Any], str]] = {"gelu": ("gelu", [], "none"), "gelu_tanh": ("gelu", [], "tanh")}


def forward(
    x: Tensor, residual: Tensor, weights: Weights, options: Options, save_z: bool
) -> tuple[Tensor, Tensor | None]:
    """y [M, D] and z [M, R] (None unless `save_z`).

    x, residual [M, D] with any row stride and a dense last dimension. y has the promoted dtype of the residual and
    `options.dtype`; z has `options.dtype`.
    """
    w_down, b_down, w_up, b_up, scale = weights
    dtype = options.dtype
    if scale is not None or options.scale != 1.0:
        factor, column = _factors(scale, options)
        w_up, b_up = w_up * column, None if b_up is None else b_up * factor
    if x.dtype != dtype or w_down.dtype != dtype or w_up.dtype != dtype:
        x, w_down, w_up = x.to(dtype), w_down.to(dtype), w_up.to(dtype)
        b_down = None if b_down is None else b_down.to(dtype)
        b_up = None if b_up is None else b_up.to(dtype)
    if not save_z and options.activation in _EPILOGUES and _onednn(x, w_down.shape[0]):
        z = None
        h = torch.ops.mkldnn._linear_pointwise(x, w_down, b_down, *_EPILOGUES[options.activation])
    else:
        z = _linear(x, w_down, b_down)
        h = find_activation(options.activation).eager(z)
        z = z if save_z else None  # here, or an unsaved z would live beside y
    return _linear(h, w_up, b_up, residual), z


def backward(
    dy: Tensor, x: Tensor, z: Tensor, weights: Weights, options: Options, needs: Needs, residual_is_x: bool
) -> list[Tensor | None]:
    """The six gradients in the order of `Needs`; None where not asked for.

    dy, x [M, D] with any row stride and a dense last dimension, z [M, R] as forward made it. dx has x's dtype and
    every other gradient the dtype of its parameter.
    """
    w_down, _, w_up, b_up, scale = weights
    dtype, parameter_dtype = z.dtype, w_down.dtype
    act = find_activation(options.activation)
    scaled = scale is not None or options.scale != 1.0
    channel = scale is not None and scale.numel() > 1
    dx: Any = None
    dw_down, db_down, dw_up, db_up, dscale = dx, dx, dx, dx, dx
    g, x_dtype = dy, x.dtype
    if x_dtype != dtype or parameter_dtype != dtype or dy.dtype != dtype:
        x, g, w_down, w_up = x.to(dtype), dy.to(dtype), w_down.to(dtype), w_up.to(dtype)
    sum_dy = needs.b_up or (needs.scale and b_up is not None)
    if needs.w_up or needs.scale:
        if sum_dy and dtype.itemsize == 2 and g.numel() >= max(_LARGE, 16 * w_up.numel()):
            dw_up, db_up = _outer_and_sum(g, act.eager(z))  # [D, R] and [D], without scale
        else:
            dw_up = _outer(g, act.eager(z))
    if sum_dy and db_up is None:
        # What dscale adds to may cancel it, so it is not rounded to 16 bits there, though that sum takes longer.
        db_up = g.sum(0, dtype=torch.promote_types(dtype, torch.float32) if needs.scale else None)
    if scaled:
        factor, column = _factors(scale, options)
        if scale is not None and needs.scale:
            dscale = (dw_up.to(torch.promote_types(dtype, torch.float32)) * w_up).sum(1)
            if b_up is not None:
                dscale += db_up * b_up
            dscale = (dscale if channel else dscale.sum()).to(scale.dtype).view_as(scale)
        dw_up = dw_up * column if needs.w_up else None
        db_up = db_up * factor if needs.b_up else None
        if channel:
            # In 16 bits dy is scaled, as in eager's backward: the rounding of a scaled W_up would be the same for all
            # rows, so that it would not average out in db_down.
            if dtype.itemsize == 2:
                g = (g * factor).to(dtype)
            else:
                w_up = (w_up * column).to(dtype)
    if needs.x or needs.w_down or needs.b_down:
        dh = _linear(g, w_up.t())
        if scaled and not channel:
            dh *= factor
        dz = act.eager_backward(z, dh)
        if needs.x:
            dx = _linear(dz, w_down.t(), None, dy if residual_is_x else None)
            dx = dx if dx.dtype == x_dtype else dx.to(x_dtype)
        if needs.w_down:
            dw_down = _outer(dz, x)
        if needs.b_down:
            db_down = dz.sum(0)
    gradients = [dw_down, db_down, dw_up, db_up]
    if scaled or parameter_dtype != dtype:
        gradients = [None if t is None else t.to(parameter_dtype) for t in gradients]
    return [dx, *gradients, dscale]


def _factors(scale: Tensor | None, options: Options) -> tuple[float | Tensor, float | Tensor]:
    """The scale as it stands beside b_up [D], and beside W_up [D, R]."""
    if scale is None:
        return options.scale, options.scale
    return scale, scale[:, None] if scale.numel() > 1 else scale


def _linear(x: Tensor, w: Tensor, b: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """x · wᵀ + b + add, in as few passes over the result as are fast."""
    onednn = _onednn(x, w.shape[0])
    if add is not None and add.dtype == x.dtype:
        if not onednn:
            return torch.addmm(add, x, w.t()) if b is None else (add + b).addmm_(x, w.t())
        if x.shape[1] <= (_THIN if x.dtype == torch.float32 else _LONG):
            return torch.ops.mkldnn._linear_pointwise.binary(x, add, w, b, "add")
    if onednn and (b is not None or x.dtype == torch.float32):
        y = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    else:
        y = F.linear(x, w, b)
    if add is None:
        return y
    return y.add_(add) if add.dtype == y.dtype else add + y


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ · b for a [M, i] and b [M, j], contiguous."""
    if a.dtype == torch.float32 and a.is_cpu and len(a) > _BLOCK:
        return _outer_in_blocks(a, b)
    if a.shape[1] > b.shape[1] and b.shape[1] < _THIN and _onednn(max(a, b, key=Tensor.numel)):
        return _outer(b, a).t().contiguous()  # in bf16 oneDNN wants the longer side last beside a thin one
    return a.t() @ b


def _outer_in_blocks(a: Tensor, b: Tensor) -> Tensor:
    """`_outer` over blocks of rows, whose products are then summed.

    A long sum that is made term by term in fp32 loses digits, most where rows repeat and every rounding goes the same
    way. oneDNN makes longer sums than other libraries and takes no rows that overlap, so its product is not used here.
    Several threads also share blocks better than one product.
    """
    whole = len(a) - len(a) % _BLOCK
    blocks = [t[:whole].unflatten(0, (-1, _BLOCK)) for t in (a, b)]
    total = torch.bmm(blocks[0].transpose(1, 2), blocks[1]).sum(0)
    return total if whole == len(a) else total.addmm_(a[whole:].t(), b[whole:])


def _outer_and_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """aᵀ · b and Σ a over its rows, by one product."""
    b = torch.cat([b, b.new_ones(b.shape[0], 1)], 1)
    both = _outer(b, a)
    return both[:-1].t().contiguous(), both[-1].clone()


def _onednn(x: Tensor, columns: int = 0) -> bool:
    """Whether to call oneDNN by name for a product of x with so many columns.

    In fp32 ATen would take MKL, half as fast on some processors; in bf16 it takes oneDNN itself, but only by name does
    that add a bias or a residual while it writes the product. Where neither x nor the product has 2^16 elements its
    set-up costs more than it saves.
    """
    elements = x.shape[0] * max(x.shape[1], columns)
    return x.is_cpu and elements >= 1 << 16 and x.dtype in _onednn_dtypes() and torch._C._get_mkldnn_enabled()


@functools.cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")):
        return ()
    return (torch.float32, torch.bfloat16) if ops._is_mkldnn_bf16_supported() else (torch.float32,)
