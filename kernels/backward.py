"""Backward: three kernels, nothing atomic, so the same launch gives the same bits.

With s = scale and h = act(z):

    dz kernel        dh = s · dy · W_up    dz = dh ⊙ act'(z)                                        [M, R]
                     Σ dz   as one fp32 partial per program
    weights kernel   dx = dz · W_down (+ dy where the residual is x)                                 [M, D]
                     dyᵀ · h   dzᵀ · x   Σ dy   as one fp32 partial per slice of M
    reduce kernel    sums the partials in order:
                     dW_up = s · dyᵀh   db_up = s · Σ dy   dW_down = dzᵀx   db_down = Σ dz
                     dscale[d] = Σ_r W_up[d, r] · (dyᵀh)[d, r] + b_up[d] · (Σ dy)[d]

dscale costs no pass over the tokens: with u = h · W_upᵀ + b_up, Σ_m dy ⊙ u is the last line. Only what is asked for
is computed; an output that is None is compiled away.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, split
from .activations import find_activation
from .configs import blocks
from .launch import Needs, Options, Weights, device_guard, dot_options, scale_stride, stride_unit, tile_options


@triton.jit
def dz_kernel(
    dy_ptr,  # [M, D]
    z_ptr,  # [M, R]
    w_up_ptr,  # [D, R]
    scale,  # number; used where scale_ptr is None
    scale_ptr,  # [1] (SCALE_STRIDE 0), [D] (SCALE_STRIDE 1) or None
    dz_ptr,  # [M, R] or None
    h_ptr,  # [M, R] or None
    b_down_partial_ptr,  # [R, P] or None: Σ dz over each of P blocks of rows
    M,
    stride_dym,
    D: tl.constexpr,
    R: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,  # the row strides are multiples of it
    SCALE_STRIDE: tl.constexpr,
    DACT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    stride_dym = stride_dym // STRIDE_UNIT * STRIDE_UNIT
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R  # neighbours in time share their rows of dy in L2
    row = (tl.program_id(0) // R_BLOCKS).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(0) % R_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M - row
    mask_r = offs_r < R
    offs_mr = offs_m[:, None] * R + offs_r[None, :]
    mask_mr = mask_m[:, None] & mask_r[None, :]

    # Before the loop, which hides the wait for it.
    z = tl.load(z_ptr + row * R + offs_mr, mask=mask_mr, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_R]
    dh = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
    if dz_ptr is not None:
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            dy = tl.load(  # [BLOCK_M, BLOCK_D]
                dy_ptr + row * stride_dym + offs_m[:, None] * stride_dym + offs_d[None, :],
                mask=mask_m[:, None] & mask_d[None, :],
                other=0.0,
            )
            w = tl.load(  # [BLOCK_D, BLOCK_R]
                w_up_ptr + offs_d[:, None] * R + offs_r[None, :], mask=mask_d[:, None] & mask_r[None, :], other=0.0
            )
            if SCALE_STRIDE == 1:
                dy = dy.to(ACC) * tl.load(scale_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
            dh = tl.dot(dy.to(DOT), w.to(DOT), dh, out_dtype=ACC, input_precision=PRECISION)
        if scale_ptr is None:
            dh *= scale
        elif SCALE_STRIDE == 0:
            dh *= tl.load(scale_ptr).to(ACC)

    dz, h = DACT(z, dh)
    if dz_ptr is not None:
        tl.store(dz_ptr + row * R + offs_mr, dz, mask=mask_mr)
    if h_ptr is not None:
        tl.store(h_ptr + row * R + offs_mr, h, mask=mask_mr)
    if b_down_partial_ptr is not None:
        P = tl.num_programs(0) // R_BLOCKS
        tl.store(b_down_partial_ptr + offs_r * P + tl.program_id(0) // R_BLOCKS, tl.sum(dz, axis=0), mask=mask_r)


@triton.jit
def weights_kernel(
    dy_ptr,  # [M, D]
    x_ptr,  # [M, D]
    h_ptr,  # [M, R]
    dz_ptr,  # [M, R]
    w_down_ptr,  # [R, D]
    dx_ptr,  # [M, D] or None, as where R has more than one block
    up_partial_ptr,  # [S, D, R] or None: dyᵀ · h
    b_up_partial_ptr,  # [S, D] or None: Σ dy
    down_partial_ptr,  # [S, D, R] or None: xᵀ · dz
    M,
    rows_per_slice,  # a multiple of BLOCK_M
    stride_dym,
    stride_xm,
    D: tl.constexpr,
    R: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,  # the row strides are multiples of it
    ADD_DY: tl.constexpr,  # the residual is x
    SUM_BY_DOT: tl.constexpr,  # Σ dy as a product with ones
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    stride_dym = stride_dym // STRIDE_UNIT * STRIDE_UNIT
    stride_xm = stride_xm // STRIDE_UNIT * STRIDE_UNIT
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid_d = tl.program_id(0) // R_BLOCKS
    pid_r = tl.program_id(0) % R_BLOCKS
    pid_s = tl.program_id(1).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_mr = offs_m[:, None] * R + offs_r[None, :]
    mask_d = offs_d < D
    mask_r = offs_r < R
    # The accumulators are held the way round that gives the dot the longer first side.
    R_FIRST: tl.constexpr = BLOCK_R >= BLOCK_D
    NEED_DZ: tl.constexpr = (dx_ptr is not None) or (down_partial_ptr is not None)
    NEED_DY: tl.constexpr = (
        (up_partial_ptr is not None) or (b_up_partial_ptr is not None) or (dx_ptr is not None and ADD_DY)
    )

    if dx_ptr is not None:
        w_down = tl.load(  # [BLOCK_R, BLOCK_D]
            w_down_ptr + offs_r[:, None] * D + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0
        ).to(DOT)
    if R_FIRST:
        up = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
        down = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
    else:
        up = tl.zeros([BLOCK_D, BLOCK_R], dtype=ACC)
        down = tl.zeros([BLOCK_D, BLOCK_R], dtype=ACC)
    # A sum over a tile's rows crosses threads and warps in every round, which takes longer than the products; a product
    # with ones does not.
    if SUM_BY_DOT:
        b_up = tl.zeros([BLOCK_D, 16], dtype=ACC)
        ones = tl.full([BLOCK_M, 16], 1.0, dtype=DOT)
    else:
        b_up = tl.zeros([BLOCK_D], dtype=ACC)

    for start_m in range(0, rows_per_slice, BLOCK_M):
        row = pid_s * rows_per_slice + start_m
        mask_m = offs_m < M - row
        mask_md = mask_m[:, None] & mask_d[None, :]
        mask_mr = mask_m[:, None] & mask_r[None, :]
        if NEED_DY:
            dy = tl.load(  # [BLOCK_M, BLOCK_D]
                dy_ptr + row * stride_dym + offs_m[:, None] * stride_dym + offs_d[None, :], mask=mask_md, other=0.0
            )
        if NEED_DZ:
            dz = tl.load(dz_ptr + row * R + offs_mr, mask=mask_mr, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_R]
        if dx_ptr is not None:
            dx = tl.dot(dz, w_down, out_dtype=ACC, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
            if ADD_DY:
                dx += dy.to(ACC)
            tl.store(dx_ptr + row * D + offs_m[:, None] * D + offs_d[None, :], dx, mask=mask_md)
        if up_partial_ptr is not None:
            h = tl.load(h_ptr + row * R + offs_mr, mask=mask_mr, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_R]
            if R_FIRST:
                up = tl.dot(h.T, dy.to(DOT), up, out_dtype=ACC, input_precision=PRECISION)
            else:
                up = tl.dot(dy.to(DOT).T, h, up, out_dtype=ACC, input_precision=PRECISION)
        if down_partial_ptr is not None:
            x = tl.load(  # [BLOCK_M, BLOCK_D]
                x_ptr + row * stride_xm + offs_m[:, None] * stride_xm + offs_d[None, :], mask=mask_md, other=0.0
            )
            if R_FIRST:
                down = tl.dot(dz.T, x.to(DOT), down, out_dtype=ACC, input_precision=PRECISION)
            else:
                down = tl.dot(x.to(DOT).T, dz, down, out_dtype=ACC, input_precision=PRECISION)
        if b_up_partial_ptr is not None:
            if SUM_BY_DOT:
                b_up = tl.dot(dy.to(DOT).T, ones, b_up, out_dtype=ACC, input_precision=PRECISION)
            else:
                b_up += tl.sum(dy.to(ACC), axis=0)

    if R_FIRST:
        offs_dr = offs_d[None, :] * R + offs_r[:, None]
        mask_dr = mask_d[None, :] & mask_r[:, None]
    else:
        offs_dr = offs_d[:, None] * R + offs_r[None, :]
        mask_dr = mask_d[:, None] & mask_r[None, :]
    if up_partial_ptr is not None:
        tl.store(up_partial_ptr + pid_s * D * R + offs_dr, up, mask=mask_dr)
    if down_partial_ptr is not None:
        tl.store(down_partial_ptr + pid_s * D * R + offs_dr, down, mask=mask_dr)
    if b_up_partial_ptr is not None:
        if SUM_BY_DOT:
            b_up = tl.max(b_up, axis=1)  # the columns are equal
        if pid_r == 0:
            tl.store(b_up_partial_ptr + pid_s * D + offs_d, b_up, mask=mask_d)


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

    b_up = tl.zeros([BLOCK_D], dtype=ACC)
    if b_up_partial_ptr is not None:
        for i in range(S):
            b_up += tl.load(b_up_partial_ptr + i * D + offs_d, mask=mask_d, other=0.0)
    if scale_ptr is not None:
        s = tl.load(scale_ptr + offs_d * SCALE_STRIDE, mask=mask_d, other=0.0).to(ACC)  # [BLOCK_D]
    else:
        s = tl.zeros([BLOCK_D], dtype=ACC) + scale
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
        for i in tl.range(S, loop_unroll_factor=2):  # or each round waits for its loads
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
        tl.store(dscale_ptr + offs_d, dscale, mask=mask_d)
    if db_down_ptr is not None:
        for r in range(tl.program_id(0), R, tl.num_programs(0)):
            b_down = tl.zeros([BLOCK_P], dtype=ACC)
            for start_p in range(0, P, BLOCK_P):
                offs_p = start_p + tl.arange(0, BLOCK_P)
                b_down += tl.load(b_down_partial_ptr + r * P + offs_p, mask=offs_p < P, other=0.0)
            tl.store(db_down_ptr + r, tl.sum(b_down))


def backward(
    dy: Tensor, x: Tensor, z: Tensor, weights: Weights, options: Options, needs: Needs, residual_is_x: bool
) -> list[Tensor | None]:
    """The six gradients in the order of `Needs`; None where not asked for.

    dy, x [M, D] with any row stride and a dense last dimension, z [M, R] as forward made it. dx has x's dtype and
    every other gradient the dtype of its parameter.
    """
    (M, D), R = x.shape, z.shape[1]
    w_down, w_up, b_up = weights.w_down, weights.w_up, weights.b_up
    scale, scale_tensor = options.scale, weights.scale
    dots = dot_options(z.dtype)
    acc_dtype = torch.promote_types(z.dtype, torch.float32)
    need_dz = needs.x or needs.w_down or needs.b_down
    need_up = needs.w_up or needs.scale
    need_b_up = needs.b_up or (needs.scale and b_up is not None)

    def new(wanted: bool, *shape: int, dtype: torch.dtype = acc_dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    dz, h = new(need_dz, M, R, dtype=z.dtype), new(need_up, M, R, dtype=z.dtype)
    dx = new(needs.x, M, D, dtype=x.dtype)
    dw_down, db_down = new(needs.w_down, R, D, dtype=w_down.dtype), new(needs.b_down, R, dtype=w_down.dtype)
    dw_up, db_up = new(needs.w_up, D, R, dtype=w_up.dtype), new(needs.b_up, D, dtype=w_up.dtype)
    dscale = new(needs.scale, D)

    tiles = tile_options("weights", M, D, R, (dy, x, z, w_down), x.device)
    rows, r_blocks = blocks(M, tiles["BLOCK_M"]), blocks(R, tiles["BLOCK_R"])
    columns = blocks(D, tiles["BLOCK_D"]) * r_blocks
    slices = max(1, launch.facts(x.device).multiprocessors // columns)  # one program a multiprocessor
    rows_per_slice = blocks(rows, slices) * tiles["BLOCK_M"]
    slices = blocks(M, rows_per_slice) if M else 0
    partials = [new(need_up, slices, D, R), new(need_b_up, slices, D), new(needs.w_down, slices, D, R)]
    dz_tiles = tile_options("dz", M, D, R, (dy, z, w_up), x.device)
    dz_rows = blocks(M, dz_tiles["BLOCK_M"])
    b_down_partial = new(needs.b_down, R, dz_rows)

    with device_guard(x):
        if M and (need_dz or need_up):
            dz_kernel[(dz_rows * blocks(R, dz_tiles["BLOCK_R"]),)](
                dy,
                z,
                w_up,
                scale,
                scale_tensor,
                dz,
                h,
                b_down_partial,
                M,
                dy.stride(0),
                D=D,
                R=R,
                STRIDE_UNIT=stride_unit(dy),
                SCALE_STRIDE=scale_stride(scale_tensor),
                DACT=find_activation(options.activation).dact,
                **dots,
                **dz_tiles,
            )
        if M and dz is not None and dx is not None and r_blocks > 1:
            split.input_gradient(dz, w_down, dy if residual_is_x else None, dx)
        if M and (any((need_up, need_b_up, needs.w_down)) or (needs.x and r_blocks == 1)):
            weights_kernel[(columns, slices)](
                dy,
                x,
                h,
                dz,
                w_down,
                dx if r_blocks == 1 else None,
                *partials,
                M,
                rows_per_slice,
                dy.stride(0),
                x.stride(0),
                D=D,
                R=R,
                STRIDE_UNIT=stride_unit(dy, x),
                ADD_DY=residual_is_x,
                SUM_BY_DOT=z.dtype.itemsize == 2,  # in tf32 it would round dy
                **dots,
                **tiles,
            )
        if any(needs[1:]):
            reduce_tiles = tile_options("reduce", M, D, R, (z,), x.device)
            del reduce_tiles["BLOCK_M"]
            reduce_kernel[(blocks(D, reduce_tiles["BLOCK_D"]),)](
                *partials,
                b_down_partial,
                w_up,
                b_up,
                scale,
                scale_tensor,
                dw_up,
                db_up,
                dw_down,
                db_down,
                dscale,
                slices,
                dz_rows,
                D=D,
                R=R,
                SCALE_STRIDE=scale_stride(scale_tensor),
                ACC=dots["ACC"],
                enable_fp_fusion=True,
                BLOCK_P=256,
                **reduce_tiles,
            )
    if dscale is not None and scale_tensor is not None:
        dscale = (dscale if scale_stride(scale_tensor) else dscale.sum()).to(scale_tensor.dtype).view_as(scale_tensor)
    return [dx, dw_down, db_down, dw_up, db_up, dscale]
