"""Pieces of kernels that more than one kernel is made of."""

import triton
import triton.language as tl


@triton.jit
def tile(
    i,  # number of the tile
    M,
    side,  # rows of a tile
    tiles_ptr,  # [tiles, 3] or None: task, position of the first row, position behind the last row
):
    """(task, first position, position behind the last) of a tile; every row is task 0's where there is no table.

    The task is -1 for rows without a task, and -2 for a tile without rows.
    """
    if tiles_ptr is None:
        task = 0
        row = i.to(tl.int64) * side
        stop = M
    else:
        task = tl.load(tiles_ptr + 3 * i).to(tl.int64)
        row = tl.load(tiles_ptr + 3 * i + 1).to(tl.int64)
        stop = tl.load(tiles_ptr + 3 * i + 2)
    return task, row, stop


@triton.jit
def rows(
    row,  # position of the first row
    stop,  # position behind the last row
    offs_m,  # [BLOCK_M]
    order_ptr,  # [M] or None: which row has each position
):
    """(base, rows_m, mask_m): the row at the position row + offs_m is base + rows_m."""
    mask_m = offs_m < stop - row
    if order_ptr is None:
        base = row
        rows_m = offs_m
    else:
        base = 0
        rows_m = tl.load(order_ptr + row + offs_m, mask=mask_m, other=0)
    return base, rows_m, mask_m


@triton.jit
def pass_rows(
    source_ptr,  # [M, D] or None, for zeros
    stride_sm,
    target_ptr,  # [M, D]
    D: tl.constexpr,
    offs_d,  # [BLOCK_D]
    row,
    stop,
    order_ptr,  # [M] or None
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copies some columns of the rows at the positions from row to stop, as rows without a task are."""
    offs_m = tl.arange(0, BLOCK_M)
    for position in range(row, stop, BLOCK_M):
        base, rows_m, mask_m = rows(position, stop, offs_m, order_ptr)
        mask = mask_m[:, None] & (offs_d < D)[None, :]
        target_ptrs = target_ptr + base * D + rows_m[:, None] * D + offs_d[None, :]  # [BLOCK_M, BLOCK_D]
        if source_ptr is None:
            tl.store(target_ptrs, tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32), mask=mask)
        else:
            source_ptrs = source_ptr + base * stride_sm + rows_m[:, None] * stride_sm + offs_d[None, :]
            tl.store(target_ptrs, tl.load(source_ptrs, mask=mask, other=0.0), mask=mask)


@triton.jit
def finish(
    u,  # [BLOCK_M, BLOCK_D]: h · W_upᵀ
    b_up,  # [BLOCK_D] or None
    scale,  # number; used where s is None
    s,  # [BLOCK_D], the scale of each channel, or None
    ACC: tl.constexpr,  # dtype of u
):
    """scale · (u + b_up), in ACC; what the residual is added to."""
    if b_up is not None:
        u += b_up.to(ACC)[None, :]
    if s is not None:
        u *= s.to(ACC)[None, :]
    else:
        u *= scale
    return u
