"""The adapter in two kernels, each with a grid of two dimensions: for few tokens, and for any bottleneck.

    down kernel  z = x · W_downᵀ + b_down   h = act(z)   [M, R]   or, with D in S splits, S partial sums of x · W_downᵀ
    up kernel    y = residual + scale · (h · W_upᵀ + b_up)   [M, D]   with h = act(Σ partials + b_down) where S > 1

The fused kernel has one program per BLOCK_M rows, and each walks all of D twice: with few rows most multiprocessors
idle. Here rows, R and D are divided among programs, which walk a short loop or none. The partials are summed in the
order of the splits and nothing is atomic, so the same launch gives the same bits. A tile of R never holds all of a
large R, so R has no limit. The price is h (or the partials) written and read, and x read once more: 6·M·D bytes in
16-bit, plus 4·M·R.

The up kernel also computes dx = dy + dz · W_down, which is the same thing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import find_activation
from .configs import blocks
from .launch import Options, Weights, dot_options, scale_stride, stride_unit, tile_options


@triton.jit
def down_kernel(
    x_ptr,  # [M, D]
    w_ptr,  # [R, D]
    b_ptr,  # [R] or None; used where S = 1
    partial_ptr,  # [S, M, R] or None, where S = 1
    z_ptr,  # [M, R] or None
    h_ptr,  # [M, R] or None, where S > 1
    M,
    stride_xm,
    D: tl.constexpr,
    R: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,  # the row strides are multiples of it
    SPLIT_D: tl.constexpr,  # columns of a split, a multiple of BLOCK_D
    ACT: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the operands of every dot
    ACC: tl.constexpr,  # dtype of everything held in registers
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    stride_xm = stride_xm // STRIDE_UNIT * STRIDE_UNIT
    # Blocks of R are neighbours in time, so that they share their rows of x in L2.
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid_m = (tl.program_id(0) // R_BLOCKS).to(tl.int64)
    pid_r = tl.program_id(0) % R_BLOCKS
    pid_s = tl.program_id(1)
    row = pid_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M - row
    mask_r = offs_r < R

    z = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
    for start_d in range(0, SPLIT_D, BLOCK_D):
        offs_d = pid_s * SPLIT_D + start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = tl.load(  # [BLOCK_M, BLOCK_D]
            x_ptr + row * stride_xm + offs_m[:, None] * stride_xm + offs_d[None, :],
            mask=mask_m[:, None] & mask_d[None, :],
            other=0.0,
        )
        w = tl.load(  # [BLOCK_R, BLOCK_D]
            w_ptr + offs_r[:, None] * D + offs_d[None, :], mask=mask_r[:, None] & mask_d[None, :], other=0.0
        )
        z = tl.dot(x.to(DOT), w.to(DOT).T, z, out_dtype=ACC, input_precision=PRECISION)

    offs_mr = row * R + offs_m[:, None] * R + offs_r[None, :]
    mask_mr = mask_m[:, None] & mask_r[None, :]  # what an Inf in x makes of the padding of R stays behind it
    if partial_ptr is not None:
        tl.store(partial_ptr + pid_s.to(tl.int64) * M * R + offs_mr, z, mask=mask_mr)
    else:
        if b_ptr is not None:
            z += tl.load(b_ptr + offs_r, mask=mask_r, other=0.0).to(ACC)[None, :]
        if z_ptr is not None:
            tl.store(z_ptr + offs_mr, z, mask=mask_mr)
        tl.store(h_ptr + offs_mr, ACT(z), mask=mask_mr)


@triton.jit
def up_kernel(
    h_ptr,  # [M, R]; where S > 1 the partial sums of z, [S, M, R]
    b_down_ptr,  # [R] or None; used where S > 1
    w_ptr,  # [D, R] by its strides
    b_up_ptr,  # [D] or None
    scale,  # number; used where scale_ptr is None
    scale_ptr,  # [1] (SCALE_STRIDE 0), [D] (SCALE_STRIDE 1) or None
    residual_ptr,  # [M, D] or None
    y_ptr,  # [M, D]
    z_ptr,  # [M, R] or None; written where S > 1
    M,
    stride_rm,
    D: tl.constexpr,
    R: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,  # the row strides are multiples of it
    S: tl.constexpr,
    STRIDE_WD: tl.constexpr,
    STRIDE_WR: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    ACT: tl.constexpr,  # None where S = 1
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    stride_rm = stride_rm // STRIDE_UNIT * STRIDE_UNIT
    BLOCK_S: tl.constexpr = triton.next_power_of_2(S)
    # Blocks of D are neighbours in time, so that they share their rows of h in L2.
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid_m = (tl.program_id(0) // D_BLOCKS).to(tl.int64)
    pid_d = tl.program_id(0) % D_BLOCKS
    row = pid_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m = offs_m < M - row
    mask_d = offs_d < D
    mask_md = mask_m[:, None] & mask_d[None, :]

    # Everything that waits for nothing is asked for first: with few rows, time is the latency of loads in a chain.
    if residual_ptr is not None:
        residual = tl.load(  # [BLOCK_M, BLOCK_D]
            residual_ptr + row * stride_rm + offs_m[:, None] * stride_rm + offs_d[None, :], mask=mask_md, other=0.0
        )
    if b_up_ptr is not None:
        b_up = tl.load(b_up_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)
    if scale_ptr is not None:
        s = tl.load(scale_ptr + offs_d * SCALE_STRIDE, mask=mask_d, other=0.0).to(ACC)

    y = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    for start_r in range(0, R, BLOCK_R):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        offs_mr = row * R + offs_m[:, None] * R + offs_r[None, :]
        mask_mr = mask_m[:, None] & mask_r[None, :]
        w = tl.load(  # [BLOCK_R, BLOCK_D]
            w_ptr + offs_r[:, None] * STRIDE_WR + offs_d[None, :] * STRIDE_WD,
            mask=mask_r[:, None] & mask_d[None, :],
            other=0.0,
        )
        if S == 1:
            h = tl.load(h_ptr + offs_mr, mask=mask_mr, other=0.0)  # [BLOCK_M, BLOCK_R]
        else:
            # One load of all the partials, so that they come together; the order of the sum is fixed as it compiles.
            offs_s = tl.arange(0, BLOCK_S).to(tl.int64)
            h = tl.load(  # [BLOCK_S, BLOCK_M, BLOCK_R]
                h_ptr + offs_s[:, None, None] * M * R + offs_mr[None, :, :],
                mask=(offs_s < S)[:, None, None] & mask_mr[None, :, :],
                other=0.0,
            )
            h = tl.sum(h, axis=0)  # [BLOCK_M, BLOCK_R]
            if b_down_ptr is not None:
                h += tl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(ACC)[None, :]
            if z_ptr is not None:
                if pid_d == 0:
                    tl.store(z_ptr + offs_mr, h, mask=mask_mr)
            h = ACT(h)
        y = tl.dot(h.to(DOT), w.to(DOT), y, out_dtype=ACC, input_precision=PRECISION)

    if b_up_ptr is not None:
        y += b_up[None, :]
    if scale_ptr is not None:
        y *= s[None, :]
    else:
        y *= scale
    if residual_ptr is not None:
        y += residual.to(ACC)
    tl.store(y_ptr + row * D + offs_m[:, None] * D + offs_d[None, :], y, mask=mask_md)


def forward(
    x: Tensor,
    residual: Tensor,
    weights: Weights,
    options: Options,
    y: Tensor,
    z: Tensor | None,
    splits: int,
) -> None:
    """Fills y [M, D] and, unless it is None, z [M, R]. The arguments are those of `forward.forward`."""
    (M, D), R, dtype = x.shape, weights.w_down.shape[0], options.dtype
    activation, dots = find_activation(options.activation).act, dot_options(dtype)
    tensors = (x, residual, weights.w_down)
    tiles = tile_options("down", M, D, R, tensors, x.device)
    split_d = blocks(blocks(D, splits), tiles["BLOCK_D"]) * tiles["BLOCK_D"]
    splits = blocks(D, split_d)
    if splits > 1:
        h = torch.empty((splits, M, R), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    else:
        h = torch.empty((M, R), dtype=dtype, device=x.device)
    down_kernel[(blocks(M, tiles["BLOCK_M"]) * blocks(R, tiles["BLOCK_R"]), splits)](
        x,
        weights.w_down,
        weights.b_down if splits == 1 else None,
        h if splits > 1 else None,
        z if splits == 1 else None,
        h if splits == 1 else None,
        M,
        x.stride(0),
        D=D,
        R=R,
        STRIDE_UNIT=stride_unit(x),
        SPLIT_D=split_d,
        ACT=activation if splits == 1 else None,
        **dots,
        **tiles,
    )
    tiles = tile_options("up", M, D, R, tensors, x.device)
    up_kernel[(blocks(M, tiles["BLOCK_M"]) * blocks(D, tiles["BLOCK_D"]),)](
        h,
        weights.b_down if splits > 1 else None,
        weights.w_up,
        weights.b_up,
        options.scale,
        weights.scale,
        residual,
        y,
        z if splits > 1 else None,
        M,
        residual.stride(0),
        D=D,
        R=R,
        STRIDE_UNIT=stride_unit(residual),
        S=splits,
        STRIDE_WD=R,
        STRIDE_WR=1,
        SCALE_STRIDE=scale_stride(weights.scale),
        ACT=activation if splits > 1 else None,
        **dots,
        **tiles,
    )


def input_gradient(dz: Tensor, w_down: Tensor, dy: Tensor | None, dx: Tensor) -> None:
    """Fills dx [M, D] with dz · W_down, plus dy unless it is None."""
    (M, R), D = dz.shape, w_down.shape[1]
    tiles = tile_options("up", M, D, R, (dz, w_down), dz.device)
    up_kernel[(blocks(M, tiles["BLOCK_M"]) * blocks(D, tiles["BLOCK_D"]),)](
        dz,
        None,
        w_down,
        None,
        1.0,
        None,
        dy,
        dx,
        None,
        M,
        0 if dy is None else dy.stride(0),
        D=D,
        R=R,
        STRIDE_UNIT=1 if dy is None else stride_unit(dy),
        S=1,
        STRIDE_WD=1,
        STRIDE_WR=D,
        SCALE_STRIDE=0,
        ACT=None,
        **dot_options(dz.dtype),
        **tiles,
    )
