"""Forward: the whole adapter in one kernel.

    z = x · W_downᵀ + b_down                        [M, R]
    y = residual + scale · (act(z) · W_upᵀ + b_up)  [M, D]

A program owns BLOCK_M rows. It walks D once to build z in registers, then walks D again, backwards, so that the
second read of x (as the residual) starts with the columns that are still in L2. Only x is read from and y (and z, for
backward) written to device memory: 4·M·D bytes in 16-bit, plus M·R.

With tasks (grouped.py), every parameter has a first dimension of T, a tile has rows of one task, and z is in the order
of positions.
"""

import triton
import triton.language as tl

from . import configs, grouped
from .activations import find_activation
from .parts import finish, pass_rows, rows, tile
from .plan import Launch, Memory, dots, stride_unit
from .problem import Problem


def launches(p: Problem) -> tuple[list[Launch], dict[str, Memory]]:
    """y and, unless it is not to be saved, z of a problem; and the scratch tensors."""
    tiles = configs.tiles("fused", p)
    residual = p.residual or p.x
    arguments = {
        "x_ptr": "x",
        "residual_ptr": "residual" if p.residual else "x",
        "w_down_ptr": "w_down",
        "b_down_ptr": "b_down" if p.b_down else None,
        "w_up_ptr": "w_up",
        "b_up_ptr": "b_up" if p.b_up else None,
        "scale": p.scale,
        "scale_ptr": "scale" if p.scale_size else None,
        "y_ptr": "y",
        "z_ptr": "z" if p.save_z else None,
        "M": p.M,
        "stride_xm": p.x.stride,
        "stride_rm": residual.stride,
        **grouped.index(p, tiles.BLOCK_M),
    }
    constants = dict(
        D=p.D,
        R=p.R,
        STRIDE_UNIT=stride_unit(p.x.stride, residual.stride),
        SCALE_STRIDE=p.scale_stride,
        ACT=find_activation(p.activation).act,
        **dots(p),
        **vars(tiles),
    )
    tables, scratch = grouped.tables(p, tiles.BLOCK_M)
    return [*tables, Launch(fused_kernel, (grouped.tile_count(p, tiles.BLOCK_M),), arguments, constants)], scratch


@triton.jit
def fused_kernel(
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
    order_ptr,  # [M] or None: the row of each position
    tiles_ptr,  # [tiles, 3] or None
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
    task, row, stop = tile(tl.program_id(0), M, BLOCK_M, tiles_ptr)
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    base, rows_m, mask_m = rows(row, stop, offs_m, order_ptr)
    mask_r = offs_r < R
    if tiles_ptr is not None:
        if task < 0:
            if task == -1:
                for start_d in range(0, D, BLOCK_D):
                    offs_d = start_d + tl.arange(0, BLOCK_D)
                    pass_rows(residual_ptr, stride_rm, y_ptr, D, offs_d, row, stop, order_ptr, BLOCK_M, BLOCK_D)
                if z_ptr is not None:
                    pass_rows(None, 0, z_ptr + row * R, R, offs_r, 0, stop - row, None, BLOCK_M, BLOCK_R)
            return
        w_down_ptr += task * R * D
        w_up_ptr += task * D * R
        if b_down_ptr is not None:
            b_down_ptr += task * R
        if b_up_ptr is not None:
            b_up_ptr += task * D
        if scale_ptr is not None:
            scale_ptr += task * (D if SCALE_STRIDE else 1)

    z = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = tl.load(  # [BLOCK_M, BLOCK_D]
            x_ptr + base * stride_xm + rows_m[:, None] * stride_xm + offs_d[None, :],
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
        b_up = tl.load(b_up_ptr + offs_d, mask=mask_d, other=0.0) if b_up_ptr is not None else None
        s = tl.load(scale_ptr + offs_d * SCALE_STRIDE, mask=mask_d, other=0.0) if scale_ptr is not None else None
        y = finish(y, b_up, scale, s, ACC)
        mask = mask_m[:, None] & mask_d[None, :]
        residual = tl.load(
            residual_ptr + base * stride_rm + rows_m[:, None] * stride_rm + offs_d[None, :], mask=mask, other=0.0
        )
        tl.store(y_ptr + base * D + rows_m[:, None] * D + offs_d[None, :], residual.to(ACC) + y, mask=mask)
