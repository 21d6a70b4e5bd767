"""The third kernel of backward: partial sums to gradients, added in order, so that the same launch gives the same bits.

dW_up = s · Σ dyᵀh   db_up = s · Σ dy   dW_down = Σ dzᵀx   db_down = Σ dz
dscale[d] = Σ_r W_up[d, r] · (dyᵀh)[d, r] + b_up[d] · (Σ dy)[d]
With tasks (grouped.py), every gradient has a first dimension of T, and a program sums the partials of one task.
"""

import triton
import triton.language as tl

from . import configs, grouped
from .configs import blocks
from .plan import Launch, dots
from .problem import Problem


def reduce(p: Problem, slices: int, slice_side: int, dz_rows: int, dz_side: int) -> Launch:
    """The gradients of the parameters, from partial sums over slices of M, and over dz's blocks of rows.

    Args:
        slices, dz_rows: how many there are.
        slice_side, dz_side: how many rows each has, at most.
    """
    assert p.needs is not None
    tiles, n = configs.tiles("reduce", p), p.needs
    sum_dy = n.b_up or (n.scale and p.b_up)
    arguments = {
        "up_partial_ptr": "up" if n.w_up or n.scale else None,
        "b_up_partial_ptr": "b_up_sum" if sum_dy else None,
        "down_partial_ptr": "down" if n.w_down else None,
        "b_down_partial_ptr": "b_down_sum" if n.b_down else None,
        "w_up_ptr": "w_up",
        "b_up_ptr": "b_up" if p.b_up else None,
        "scale": p.scale,
        "scale_ptr": "scale" if p.scale_size else None,
        "dw_up_ptr": "dw_up" if n.w_up else None,
        "db_up_ptr": "db_up" if n.b_up else None,
        "dw_down_ptr": "dw_down" if n.w_down else None,
        "db_down_ptr": "db_down" if n.b_down else None,
        "dscale_ptr": "dscale" if n.scale else None,
        "slice_ends_ptr": grouped.ends(p, slice_side) if sum_dy or n.w_up or n.scale or n.w_down else None,
        "block_ends_ptr": grouped.ends(p, dz_side) if n.b_down else None,
        "S": slices,
        "P": dz_rows,
    }
    constants = dict(
        D=p.D,
        R=p.R,
        SCALE_STRIDE=p.scale_stride,
        ACC=dots(p)["ACC"],
        BLOCK_D=tiles.BLOCK_D,
        BLOCK_R=tiles.BLOCK_R,
        BLOCK_P=256,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    return Launch(reduce_kernel, (blocks(p.D, tiles.BLOCK_D), *p.each), arguments, constants)


@triton.jit
def reduce_kernel(
    up_partial_ptr,  # [S, D, R] or None
    b_up_partial_ptr,  # [S, D] or None
    down_partial_ptr,  # [S, D, R] or None
    b_down_partial_ptr,  # [R, P] or None
    w_up_ptr,  # [D, R]
    b_up_ptr,  # [D] or None
    scale,  # number; used where scale_ptr is None
    scale_ptr,  # [1] (SCALE_STRIDE 0), [D] (SCALE_STRIDE 1) or None
    dw_up_ptr,  # [D, R] or None
    db_up_ptr,  # [D] or None
    dw_down_ptr,  # [R, D] or None
    db_down_ptr,  # [R] or None
    dscale_ptr,  # [D] or None: the gradient of a scale per channel
    slice_ends_ptr,  # [T + 1] or None: up to which slice the partials of each task go
    block_ends_ptr,  # [T + 1] or None: up to which block of rows
    S,
    P,
    D: tl.constexpr,
    R: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    first = 0
    last = S
    first_block = 0
    last_block = P
    if slice_ends_ptr is not None or block_ends_ptr is not None:
        task = tl.program_id(1).to(tl.int64)
        if slice_ends_ptr is not None:
            first = tl.load(slice_ends_ptr + task)
            last = tl.load(slice_ends_ptr + task + 1)
        if block_ends_ptr is not None:
            first_block = tl.load(block_ends_ptr + task)
            last_block = tl.load(block_ends_ptr + task + 1)
        w_up_ptr += task * D * R
        if b_up_ptr is not None:
            b_up_ptr += task * D
        if scale_ptr is not None:
            scale_ptr += task * (D if SCALE_STRIDE else 1)
        if dw_up_ptr is not None:
            dw_up_ptr += task * D * R
        if db_up_ptr is not None:
            db_up_ptr += task * D
        if dw_down_ptr is not None:
            dw_down_ptr += task * R * D
        if db_down_ptr is not None:
            db_down_ptr += task * R
        if dscale_ptr is not None:
            dscale_ptr += task * D

    b_up = tl.zeros([BLOCK_D], dtype=ACC)
    if b_up_partial_ptr is not None:
        for i in range(first, last):
            b_up += tl.load(b_up_partial_ptr + i * D + offs_d, mask=mask_d, other=0.0)
    if scale_ptr is not None:
        s = tl.load(scale_ptr + offs_d * SCALE_STRIDE, mask=mask_d, other=0.0).to(ACC)  # [BLOCK_D]
    else:
        s = tl.zeros([BLOCK_D], dtype=ACC) + scale
    if slice_ends_ptr is not None:
        s = tl.where(last > first, s, 0.0)  # the parameters of a task without rows may be anything, also NaN
    if db_up_ptr is not None:
        tl.store(db_up_ptr + offs_d, b_up * s, mask=mask_d)
    dscale = b_up
    if dscale_ptr is not None:
        if b_up_ptr is not None:
            dscale *= tl.load(b_up_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)

    for start_r in range(0, R, BLOCK_R):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        offs_dr = offs_d[:, None] * R + offs_r[None, :]
        mask_dr = mask_d[:, None] & mask_r[None, :]
        up = tl.zeros([BLOCK_D, BLOCK_R], dtype=ACC)
        down = tl.zeros([BLOCK_D, BLOCK_R], dtype=ACC)
        for i in tl.range(first, last, loop_unroll_factor=2):  # or each round waits for its loads
            offs_sdr = tl.cast(i, tl.int64) * D * R + offs_dr
            if up_partial_ptr is not None:
                up += tl.load(up_partial_ptr + offs_sdr, mask=mask_dr, other=0.0)
            if down_partial_ptr is not None:
                down += tl.load(down_partial_ptr + offs_sdr, mask=mask_dr, other=0.0)
        if dw_up_ptr is not None:
            tl.store(dw_up_ptr + offs_dr, up * s[:, None], mask=mask_dr)
        if dw_down_ptr is not None:
            tl.store(dw_down_ptr + offs_r[None, :] * D + offs_d[:, None], down, mask=mask_dr)
        if dscale_ptr is not None:
            dscale += tl.sum(up * tl.load(w_up_ptr + offs_dr, mask=mask_dr, other=0.0).to(ACC), axis=1)
    if dscale_ptr is not None:
        if slice_ends_ptr is not None:
            dscale = tl.where(last > first, dscale, 0.0)
        tl.store(dscale_ptr + offs_d, dscale, mask=mask_d)
    if db_down_ptr is not None:
        for r in range(tl.program_id(0), R, tl.num_programs(0)):
            b_down = tl.zeros([BLOCK_P], dtype=ACC)
            for start_p in range(first_block, last_block, BLOCK_P):
                offs_p = start_p + tl.arange(0, BLOCK_P)
                b_down += tl.load(b_down_partial_ptr + r * P + offs_p, mask=offs_p < last_block, other=0.0)
            tl.store(db_down_ptr + r, tl.sum(b_down))
