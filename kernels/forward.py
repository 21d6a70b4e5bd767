"""Forward: the whole adapter in one kernel, or in the two of split.py where configs.py has few rows or a large R.

    z = x · W_downᵀ + b_down                        [M, R]
    y = residual + scale · (act(z) · W_upᵀ + b_up)  [M, D]

A program owns BLOCK_M rows. It walks D once to build z in registers, then walks D again, backwards, so that the
second read of x (as the residual) starts with the columns that are still in L2. Only x is read from and y (and z, for
backward) written to device memory: 4·M·D bytes in 16-bit, plus M·R.
"""

import functools
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch, split
from .activations import find_activation
from .configs import blocks
from .launch import Options, Weights, device_guard, dot_options, scale_stride, stride_unit, tile_options, widest


@triton.jit
def forward_kernel(
    x_ptr,  # [M, D]
    residual_ptr,  # [M, D]
    w_down_ptr,  # [R, D]
    b_down_ptr,  # [R] or None
    w_up_ptr,  # [D, R]
    b_up_ptr,  # [D] or None
    scale,  # number; used where scale_ptr is None
    scale_ptr,  # [1] (SCALE_STRIDE 0), [D] (SCALE_STRIDE 1) or None
    y_ptr,  # [M, D]
    z_ptr,  # [M, R] or None
    M,
    stride_xm,
    stride_rm,
    D: tl.constexpr,
    R: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,  # the row strides are multiples of it
    SCALE_STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the operands of every dot
    ACC: tl.constexpr,  # dtype of everything held in registers
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,  # >= R
):
    stride_xm = stride_xm // STRIDE_UNIT * STRIDE_UNIT
    stride_rm = stride_rm // STRIDE_UNIT * STRIDE_UNIT
    row = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M - row
    mask_r = offs_r < R

    z = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = tl.load(  # [BLOCK_M, BLOCK_D]
            x_ptr + row * stride_xm + offs_m[:, None] * stride_xm + offs_d[None, :],
            mask=mask_m[:, None] & mask_d[None, :],
            other=0.0,
        )
        w = tl.load(  # [BLOCK_R, BLOCK_D]
            w_down_ptr + offs_r[:, None] * D + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0
        )
        z = tl.dot(x.to(DOT), w.to(DOT).T, z, out_dtype=ACC, input_precision=PRECISION)
    if b_down_ptr is not None:
        z += tl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(ACC)[None, :]
    if R < BLOCK_R:
        z = tl.where(mask_r[None, :], z, 0.0)  # an Inf in x times the padding is NaN, and would spread to all of y
    if z_ptr is not None:
        tl.store(z_ptr + row * R + offs_m[:, None] * R + offs_r[None, :], z, mask=mask_m[:, None] & mask_r[None, :])
    h = ACT(z).to(DOT)  # [BLOCK_M, BLOCK_R]

    for start_d in range(0, D, BLOCK_D):
        offs_d = (D - 1) // BLOCK_D * BLOCK_D - start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        w = tl.load(  # [BLOCK_D, BLOCK_R]
            w_up_ptr + offs_d[:, None] * R + offs_r[None, :], mask=mask_d[:, None] & mask_r[None, :], other=0.0
        )
        y = tl.dot(h, w.to(DOT).T, out_dtype=ACC, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
        if b_up_ptr is not None:
            y += tl.load(b_up_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + offs_d * SCALE_STRIDE, mask=mask_d, other=0.0).to(ACC)[None, :]
        else:
            y *= scale
        mask = mask_m[:, None] & mask_d[None, :]
        residual = tl.load(
            residual_ptr + row * stride_rm + offs_m[:, None] * stride_rm + offs_d[None, :], mask=mask, other=0.0
        )
        tl.store(y_ptr + row * D + offs_m[:, None] * D + offs_d[None, :], residual.to(ACC) + y, mask=mask)


@functools.cache
def _hopper() -> ModuleType | None:
    """hopper.py, where Triton is of a version it was tried with: Gluon is experimental, and its names change."""
    if not (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9):
        return None
    from . import hopper

    return hopper


def forward(
    x: Tensor, residual: Tensor, weights: Weights, options: Options, save_z: bool
) -> tuple[Tensor, Tensor | None]:
    """y [M, D] and z [M, R] (None unless `save_z`).

    x, residual [M, D] with any row stride and a dense last dimension. y has the promoted dtype of the residual and
    `options.dtype`; z has `options.dtype`.
    """
    (M, D), R, dtype = x.shape, weights.w_down.shape[0], options.dtype
    y = torch.empty((M, D), dtype=torch.promote_types(residual.dtype, dtype), device=x.device)
    z = torch.empty((M, R), dtype=dtype, device=x.device) if save_z else None
    if M == 0:
        return y, z
    tensors, facts = (x, residual, weights.w_down), launch.facts(x.device)
    with device_guard(x):
        resident = configs.resident(M, D, R, *facts) if residual is x and not launch.INTERPRETED else None
        if resident and (hopper := _hopper()) and hopper.fits(x, weights, options):
            hopper.forward(x, weights, options, y, z, resident)
            return y, z
        splits = configs.splits(M, D, R, widest(tensors), *facts)
        if splits:
            split.forward(x, residual, weights, options, y, z, splits)
            return y, z
        tiles = tile_options("forward", M, D, R, tensors, x.device)
        forward_kernel[(blocks(M, tiles["BLOCK_M"]),)](
            x,
            residual,
            weights.w_down,
            weights.b_down,
            weights.w_up,
            weights.b_up,
            options.scale,
            weights.scale,
            y,
            z,
            M,
            x.stride(0),
            residual.stride(0),
            D=D,
            R=R,
            STRIDE_UNIT=stride_unit(x, residual),
            SCALE_STRIDE=scale_stride(weights.scale),
            ACT=find_activation(options.activation).act,
            **dot_options(dtype),
            **tiles,
        )
    return y, z
