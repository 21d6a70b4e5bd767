"""Backward: three kernels, nothing atomic, so the same launch gives the same bits.

With s = scale and h = act(z):

    dz kernel        dh = s · dy · W_up    dz = dh ⊙ act'(z)                                        [M, R]
                     Σ dz   as one fp32 partial per program
    dx_dw kernel     dx = dz · W_down (+ dy where the residual is x)                                 [M, D]
                     dyᵀ · h   dzᵀ · x   Σ dy   as one fp32 partial per slice of M
    reduce kernel    sums the partials in order (reduce.py):
                     dW_up = s · dyᵀh   db_up = s · Σ dy   dW_down = dzᵀx   db_down = Σ dz
                     dscale[d] = Σ_r W_up[d, r] · (dyᵀh)[d, r] + b_up[d] · (Σ dy)[d]

dscale costs no pass over the tokens: with u = h · W_upᵀ + b_up, Σ_m dy ⊙ u is the last line. Only what is asked for
is computed; an output that is None is compiled away.

With tasks (grouped.py), every parameter has a first dimension of T. z, dz and h are in the order of positions, and a
block of rows or a slice has rows of one task, so that each partial sum belongs to one.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import configs, grouped, split
from .activations import find_activation
from .configs import blocks
from .parts import pass_rows, rows, tile
from .plan import Launch, Memory, Plan, dots, stride_unit
from .problem import Needs, Problem
from .reduce import reduce


class Work(NamedTuple):
    """What has to be made for the gradients that are asked for, and how it is divided."""

    dz: bool
    h: bool
    dx: bool
    up: bool  # dyᵀ · h
    b_up: bool  # Σ dy
    down: bool  # dzᵀ · x
    b_down: bool  # Σ dz
    dz_side: int  # rows of a block, in the dz kernel
    dz_rows: int  # P: blocks of rows of the dz kernel
    slices: int  # S: of M, in the dx_dw kernel
    rows_per_slice: int  # a multiple of its BLOCK_M
    r_blocks: int  # of R, in the dx_dw kernel


def plan(p: Problem) -> Plan:
    """What backward launches for a problem.

    The gradients of parameters have their dtype, and dx has x's. That of a scale comes as one fp32 value a channel.
    """
    assert p.needs is not None
    n, M, D, R = p.needs, p.M, p.D, p.R
    w = _work(p, n)
    launches, sides = [], []
    if M and (w.dz or w.h):
        launches.append(dz(p, w))
        sides.append(w.dz_side)
    if M and w.dx and w.r_blocks > 1:
        launches.append(split.input_gradient(p))
        sides.append(configs.tiles("dx", p).BLOCK_M)
    if M and (w.up or w.b_up or w.down or (w.dx and w.r_blocks == 1)):
        launches.append(dx_dw(p, w))
        sides.append(w.rows_per_slice)
    if any(n[1:]):
        launches.append(reduce(p, w.slices, w.rows_per_slice, w.dz_rows, w.dz_side))
        sides += [w.rows_per_slice] * (w.up or w.b_up or w.down) + [w.dz_side] * w.b_down
    tables, index = grouped.tables(p, *sides)

    acc, dtype = p.acc_dtype, p.parameter_dtype
    scratch = {
        "dz": Memory((M, R), p.dtype) if w.dz else None,
        "h": Memory((M, R), p.dtype) if w.h else None,
        "up": Memory((w.slices, D, R), acc) if w.up else None,
        "b_up_sum": Memory((w.slices, D), acc) if w.b_up else None,
        "down": Memory((w.slices, D, R), acc) if w.down else None,
        "b_down_sum": Memory((R, w.dz_rows), acc) if w.b_down else None,
    }
    outputs = {
        "dx": Memory((M, D), p.x.dtype, like="x") if n.x else None,
        "dw_down": Memory((*p.each, R, D), dtype, like="w_down") if n.w_down else None,
        "db_down": Memory((*p.each, R), dtype, like="b_down") if n.b_down else None,
        "dw_up": Memory((*p.each, D, R), dtype, like="w_up") if n.w_up else None,
        "db_up": Memory((*p.each, D), dtype, like="b_up") if n.b_up else None,
        "dscale": Memory((*p.each, D), acc) if n.scale else None,
    }
    needed = index | {name: memory for name, memory in scratch.items() if memory}
    return Plan(p, "three kernels", "the only form of backward", [*tables, *launches], outputs, needed)


def _work(p: Problem, n: Needs) -> Work:
    tiles, dz_tiles = configs.tiles("dx_dw", p), configs.tiles("dz", p)
    r_blocks = blocks(p.R, tiles.BLOCK_R)
    rows, columns = blocks(p.M, tiles.BLOCK_M), blocks(p.D, tiles.BLOCK_D) * r_blocks
    slices = max(1, p.target.multiprocessors // columns)  # one program a multiprocessor
    rows_per_slice = max(1, blocks(rows, slices)) * tiles.BLOCK_M
    return Work(
        dz=n.x or n.w_down or n.b_down,
        h=n.w_up or n.scale,
        dx=n.x,
        up=n.w_up or n.scale,
        b_up=n.b_up or (n.scale and p.b_up),
        down=n.w_down,
        b_down=n.b_down,
        dz_side=dz_tiles.BLOCK_M,
        dz_rows=grouped.tile_count(p, dz_tiles.BLOCK_M),
        slices=grouped.tile_count(p, rows_per_slice) if p.M else 0,
        rows_per_slice=rows_per_slice,
        r_blocks=r_blocks,
    )


def dz(p: Problem, w: Work) -> Launch:
    """dz, h, and Σ dz over each block of rows."""
    assert p.dy is not None
    tiles = configs.tiles("dz", p)
    arguments = {
        "dy_ptr": "dy",
        "z_ptr": "z",
        "w_up_ptr": "w_up",
        "scale": p.scale,
        "scale_ptr": "scale" if p.scale_size else None,
        "dz_ptr": "dz" if w.dz else None,
        "h_ptr": "h" if w.h else None,
        "b_down_partial_ptr": "b_down_sum" if w.b_down else None,
        "M": p.M,
        "stride_dym": p.dy.stride,
        **grouped.index(p, tiles.BLOCK_M),
    }
    constants = dict(
        D=p.D,
        R=p.R,
        STRIDE_UNIT=stride_unit(p.dy.stride),
        SCALE_STRIDE=p.scale_stride,
        DACT=find_activation(p.activation).dact,
        **dots(p),
        **vars(tiles),
    )
    return Launch(dz_kernel, (w.dz_rows * blocks(p.R, tiles.BLOCK_R),), arguments, constants)


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
    order_ptr,  # [M] or None: the row of each position
    tiles_ptr,  # [P, 3] or None
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
    task, row, stop = tile(tl.program_id(0) // R_BLOCKS, M, BLOCK_M, tiles_ptr)
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(0) % R_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    base, rows_m, mask_m = rows(row, stop, offs_m, order_ptr)
    mask_r = offs_r < R
    if tiles_ptr is not None:
        if task < 0:
            return
        w_up_ptr += task * D * R
        if scale_ptr is not None:
            scale_ptr += task * (D if SCALE_STRIDE else 1)
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
                dy_ptr + base * stride_dym + rows_m[:, None] * stride_dym + offs_d[None, :],
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


def dx_dw(p: Problem, w: Work) -> Launch:
    """dx, where a tile holds all of R, and the partial sums of the weights' gradients."""
    assert p.dy is not None
    tiles = configs.tiles("dx_dw", p)
    arguments = {
        "dy_ptr": "dy",
        "x_ptr": "x",
        "h_ptr": "h" if w.h else None,
        "dz_ptr": "dz" if w.dz else None,
        "w_down_ptr": "w_down",
        "dx_ptr": "dx" if w.dx and w.r_blocks == 1 else None,
        "up_partial_ptr": "up" if w.up else None,
        "b_up_partial_ptr": "b_up_sum" if w.b_up else None,
        "down_partial_ptr": "down" if w.down else None,
        "M": p.M,
        "rows_per_slice": w.rows_per_slice,
        "stride_dym": p.dy.stride,
        "stride_xm": p.x.stride,
        **grouped.index(p, w.rows_per_slice),
    }
    constants = dict(
        D=p.D,
        R=p.R,
        STRIDE_UNIT=stride_unit(p.dy.stride, p.x.stride),
        ADD_DY=p.residual is None,
        SUM_BY_DOT=p.dtype.itemsize == 2,  # in tf32 it would round dy
        **dots(p),
        **vars(tiles),
    )
    return Launch(dx_dw_kernel, (blocks(p.D, tiles.BLOCK_D) * w.r_blocks, w.slices), arguments, constants)


@triton.jit
def dx_dw_kernel(
    dy_ptr,  # [M, D]
    x_ptr,  # [M, D]
    h_ptr,  # [M, R]
    dz_ptr,  # [M, R]
    w_down_ptr,  # [R, D]
    dx_ptr,  # [M, D] or None, as where R has more than one block
    up_partial_ptr,  # [S, D, R] or None: dyᵀ · h
    b_up_partial_ptr,  # [S, D] or None: Σ dy
    down_partial_ptr,  # [S, D, R] or None: xᵀ · dz
    order_ptr,  # [M] or None: the row of each position
    tiles_ptr,  # [S, 3] or None: the slices
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
    if tiles_ptr is not None:
        task, first, stop = tile(pid_s, M, rows_per_slice, tiles_ptr)
        if task < 0:
            if dx_ptr is not None:
                if task == -1:
                    source_ptr = dy_ptr if ADD_DY else None
                    pass_rows(source_ptr, stride_dym, dx_ptr, D, offs_d, first, stop, order_ptr, BLOCK_M, BLOCK_D)
            return
        w_down_ptr += task * R * D
        rows_per_slice = stop - first
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
        if tiles_ptr is None:  # here and not before the loop, so that the machine code is what an H200 has timed
            first = pid_s * rows_per_slice
            stop = M
        row = first + start_m
        base, rows_m, mask_m = rows(row, stop, offs_m, order_ptr)
        mask_md = mask_m[:, None] & mask_d[None, :]
        mask_mr = mask_m[:, None] & mask_r[None, :]
        if NEED_DY:
            dy = tl.load(  # [BLOCK_M, BLOCK_D]
                dy_ptr + base * stride_dym + rows_m[:, None] * stride_dym + offs_d[None, :], mask=mask_md, other=0.0
            )
        if NEED_DZ:
            dz = tl.load(dz_ptr + row * R + offs_mr, mask=mask_mr, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_R]
        if dx_ptr is not None:
            dx = tl.dot(dz, w_down, out_dtype=ACC, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
            if ADD_DY:
                dx += dy.to(ACC)
            tl.store(dx_ptr + base * D + rows_m[:, None] * D + offs_d[None, :], dx, mask=mask_md)
        if up_partial_ptr is not None:
            h = tl.load(h_ptr + row * R + offs_mr, mask=mask_mr, other=0.0).to(DOT)  # [BLOCK_M, BLOCK_R]
            if R_FIRST:
                up = tl.dot(h.T, dy.to(DOT), up, out_dtype=ACC, input_precision=PRECISION)
            else:
                up = tl.dot(dy.to(DOT).T, h, up, out_dtype=ACC, input_precision=PRECISION)
        if down_partial_ptr is not None:
            x = tl.load(  # [BLOCK_M, BLOCK_D]
                x_ptr + base * stride_xm + rows_m[:, None] * stride_xm + offs_d[None, :], mask=mask_md, other=0.0
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
