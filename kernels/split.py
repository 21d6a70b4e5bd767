"""The adapter in two kernels or three, each with a grid of two dimensions: for few tokens, and for any bottleneck.

    shrink   z = x · W_downᵀ + b_down   h = act(z)   [M, R]   or, with D in S splits, S partial sums of x · W_downᵀ
    combine  z = Σ partial sums + b_down   h = act(z)   [M, R]   where S > 1
    expand   y = residual + scale · (h · W_upᵀ + b_up)   [M, D]

The fused kernel has one program per BLOCK_M rows, and each walks all of D twice: with few rows most multiprocessors
idle. Here rows, R and D are divided among programs, which walk a short loop or none. The partial sums are added in the
order of the splits and nothing is atomic, so the same launch gives the same bits. A tile of R never holds all of a
large R, so R has no limit. The price is h (and the partial sums) written and read, and x read once more: 6·M·D bytes in
16-bit, plus 4·M·R.

With tasks (grouped.py), every parameter has a first dimension of T, a tile has rows of one task, and z and h are in the
order of positions. D is then never divided, because `combine` does not know tasks.

`expand` also computes dx = dy + dz · W_down, which is the same thing.
"""

from typing import Any

import triton
import triton.language as tl

from . import configs, grouped
from .activations import find_activation
from .configs import blocks
from .parts import finish, pass_rows, rows, tile
from .plan import Launch, Memory, dots, stride_unit
from .problem import Problem


def launches(p: Problem) -> tuple[list[Launch], dict[str, Memory]]:
    """y and, unless it is not to be saved, z of a problem; and the scratch tensors."""
    tiles = configs.tiles("shrink", p)
    width = blocks(blocks(p.D, configs.splits(p)), tiles.BLOCK_D) * tiles.BLOCK_D
    S = blocks(p.D, width)
    tables, scratch = grouped.tables(p, tiles.BLOCK_M, configs.tiles("expand", p).BLOCK_M)
    scratch["h"] = Memory((p.M, p.R), p.dtype)
    if S == 1:
        return [*tables, shrink(p, S, width), expand(p)], scratch
    scratch["partial"] = Memory((S, p.M, p.R), p.acc_dtype)
    return [shrink(p, S, width), combine(p, S), expand(p)], scratch


def shrink(p: Problem, S: int, width: int) -> Launch:
    """h and z, or S partial sums over `width` columns each."""
    tiles, last = configs.tiles("shrink", p), S == 1
    arguments = {
        "x_ptr": "x",
        "w_ptr": "w_down",
        "b_ptr": "b_down" if p.b_down and last else None,
        "partial_ptr": None if last else "partial",
        "z_ptr": "z" if p.save_z and last else None,
        "h_ptr": "h" if last else None,
        "M": p.M,
        "stride_xm": p.x.stride,
        **grouped.index(p, tiles.BLOCK_M),
    }
    constants = dict(
        D=p.D,
        R=p.R,
        STRIDE_UNIT=stride_unit(p.x.stride),
        SPLIT_D=width,
        ACT=find_activation(p.activation).act if last else None,
        **dots(p),
        **vars(tiles),
    )
    grid = (grouped.tile_count(p, tiles.BLOCK_M) * blocks(p.R, tiles.BLOCK_R), S)
    return Launch(shrink_kernel, grid, arguments, constants)


@triton.jit
def shrink_kernel(
    x_ptr,  # [M, D]
    w_ptr,  # [R, D]
    b_ptr,  # [R] or None; used where S = 1
    partial_ptr,  # [S, M, R] or None, where S = 1
    z_ptr,  # [M, R] or None
    h_ptr,  # [M, R] or None, where S > 1
    order_ptr,  # [M] or None: the row of each position
    tiles_ptr,  # [tiles, 3] or None, as where S > 1
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
    pid_m = tl.program_id(0) // R_BLOCKS
    pid_r = tl.program_id(0) % R_BLOCKS
    pid_s = tl.program_id(1)
    task, row, stop = tile(pid_m, M, BLOCK_M, tiles_ptr)
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    base, rows_m, mask_m = rows(row, stop, offs_m, order_ptr)
    mask_r = offs_r < R
    if tiles_ptr is not None:
        if task < 0:
            if task == -1:
                if z_ptr is not None:
                    pass_rows(None, 0, z_ptr + row * R, R, offs_r, 0, stop - row, None, BLOCK_M, BLOCK_R)
            return
        w_ptr += task * R * D
        if b_ptr is not None:
            b_ptr += task * R

    z = tl.zeros([BLOCK_M, BLOCK_R], dtype=ACC)
    for start_d in range(pid_s * SPLIT_D, (pid_s + 1) * SPLIT_D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = tl.load(  # [BLOCK_M, BLOCK_D]
            x_ptr + base * stride_xm + rows_m[:, None] * stride_xm + offs_d[None, :],
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


def combine(p: Problem, S: int) -> Launch:
    """h and z from S partial sums."""
    BLOCK = 512
    arguments = {
        "partial_ptr": "partial",
        "b_ptr": "b_down" if p.b_down else None,
        "z_ptr": "z" if p.save_z else None,
        "h_ptr": "h",
        "MR": p.M * p.R,
    }
    act = find_activation(p.activation).act
    constants = dict(R=p.R, S=S, ACT=act, ACC=dots(p)["ACC"], BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True)
    return Launch(combine_kernel, (blocks(p.M * p.R, BLOCK),), arguments, constants)


@triton.jit
def combine_kernel(
    partial_ptr,  # [S, M, R]
    b_ptr,  # [R] or None
    z_ptr,  # [M, R] or None
    h_ptr,  # [M, R]
    MR,  # M · R
    R: tl.constexpr,
    S: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < MR
    z = tl.zeros([BLOCK], dtype=ACC)
    for i in tl.static_range(S):  # unrolled, so that all loads are in flight; the order of the sum is fixed
        z += tl.load(partial_ptr + tl.cast(i, tl.int64) * MR + offs, mask=mask, other=0.0)
    if b_ptr is not None:
        z += tl.load(b_ptr + offs % R, mask=mask, other=0.0).to(ACC)
    if z_ptr is not None:
        tl.store(z_ptr + offs, z, mask=mask)
    tl.store(h_ptr + offs, ACT(z), mask=mask)


def expand(p: Problem) -> Launch:
    """y from h."""
    residual = p.residual or p.x
    arguments = {
        "h_ptr": "h",
        "w_ptr": "w_up",
        "b_up_ptr": "b_up" if p.b_up else None,
        "scale": p.scale,
        "scale_ptr": "scale" if p.scale_size else None,
        "residual_ptr": "residual" if p.residual else "x",
        "y_ptr": "y",
        "stride_rm": residual.stride,
    }
    return _expand(p, "expand", arguments, (p.R, 1))


def input_gradient(p: Problem) -> Launch:
    """dx = dz · W_down, plus dy where the residual is x."""
    assert p.dy is not None
    arguments = {
        "h_ptr": "dz",
        "w_ptr": "w_down",
        "b_up_ptr": None,
        "scale": 1.0,
        "scale_ptr": None,
        "residual_ptr": None if p.residual else "dy",
        "y_ptr": "dx",
        "stride_rm": 0 if p.residual else p.dy.stride,
    }
    return _expand(p, "dx", arguments, (1, p.D))


def _expand(p: Problem, kernel: str, arguments: dict[str, Any], strides: tuple[int, int]) -> Launch:
    tiles = configs.tiles(kernel, p)
    constants = dict(
        D=p.D,
        R=p.R,
        STRIDE_UNIT=stride_unit(arguments["stride_rm"]) if arguments["residual_ptr"] else 1,
        STRIDE_WD=strides[0],
        STRIDE_WR=strides[1],
        SCALE_STRIDE=p.scale_stride if arguments["scale_ptr"] else 0,
        **dots(p),
        **vars(tiles),
    )
    grid = (grouped.tile_count(p, tiles.BLOCK_M) * blocks(p.D, tiles.BLOCK_D),)
    arguments |= {"M": p.M, **grouped.index(p, tiles.BLOCK_M)}
    return Launch(expand_kernel, grid, arguments, constants)


@triton.jit
def expand_kernel(
    h_ptr,  # [M, R]
    w_ptr,  # [D, R] by its strides
    b_up_ptr,  # [D] or None
    scale,  # number; used where scale_ptr is None
    scale_ptr,  # [1] (SCALE_STRIDE 0), [D] (SCALE_STRIDE 1) or None
    residual_ptr,  # [M, D] or None
    y_ptr,  # [M, D]
    order_ptr,  # [M] or None: the row of each position
    tiles_ptr,  # [tiles, 3] or None
    M,
    stride_rm,
    D: tl.constexpr,
    R: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,  # the row strides are multiples of it
    STRIDE_WD: tl.constexpr,
    STRIDE_WR: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    stride_rm = stride_rm // STRIDE_UNIT * STRIDE_UNIT
    # Blocks of D are neighbours in time, so that they share their rows of h in L2.
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid_m = tl.program_id(0) // D_BLOCKS
    pid_d = tl.program_id(0) % D_BLOCKS
    task, row, stop = tile(pid_m, M, BLOCK_M, tiles_ptr)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    base, rows_m, mask_m = rows(row, stop, offs_m, order_ptr)
    mask_d = offs_d < D
    if tiles_ptr is not None:
        if task < 0:
            if task == -1:
                pass_rows(residual_ptr, stride_rm, y_ptr, D, offs_d, row, stop, order_ptr, BLOCK_M, BLOCK_D)
            return
        w_ptr += task * D * R
        if b_up_ptr is not None:
            b_up_ptr += task * D
        if scale_ptr is not None:
            scale_ptr += task * (D if SCALE_STRIDE else 1)
    mask_md = mask_m[:, None] & mask_d[None, :]

    # Everything that waits for nothing is asked for first: with few rows, time is the latency of loads in a chain.
    if residual_ptr is not None:
        residual = tl.load(  # [BLOCK_M, BLOCK_D]
            residual_ptr + base * stride_rm + rows_m[:, None] * stride_rm + offs_d[None, :], mask=mask_md, other=0.0
        )
    b_up = tl.load(b_up_ptr + offs_d, mask=mask_d, other=0.0) if b_up_ptr is not None else None
    s = tl.load(scale_ptr + offs_d * SCALE_STRIDE, mask=mask_d, other=0.0) if scale_ptr is not None else None

    y = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    for start_r in range(0, R, BLOCK_R):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        w = tl.load(  # [BLOCK_R, BLOCK_D]
            w_ptr + offs_r[:, None] * STRIDE_WR + offs_d[None, :] * STRIDE_WD,
            mask=mask_r[:, None] & mask_d[None, :],
            other=0.0,
        )
        h = tl.load(  # [BLOCK_M, BLOCK_R]
            h_ptr + row * R + offs_m[:, None] * R + offs_r[None, :],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )
        y = tl.dot(h.to(DOT), w.to(DOT), y, out_dtype=ACC, input_precision=PRECISION)
    y = finish(y, b_up, scale, s, ACC)
    if residual_ptr is not None:
        y += residual.to(ACC)
    tl.store(y_ptr + base * D + rows_m[:, None] * D + offs_d[None, :], y, mask=mask_md)
