"""Rows of many tasks: tables that say which rows a program of a kernel owns, and whose.

`order` [M] has the rows sorted by task, so that `order[position]` is a row, and `counts` [T + 1] says how many rows
have no task, task 0, task 1 and so on. Each of these T + 1 stretches of positions is cut into tiles of one size. As a
stretch may end anywhere, no more than ⌈M / size⌉ + T tiles are needed, which the host knows without asking for counts.

    tiles [N, 3]   task, position of the first row, position behind the last row; task -1 for rows without a task,
                   and -2 for what is left of the N tiles
    ends [T + 1]   how many tiles there are up to the end of each stretch

The kernels of the other modules take `order` and a table in the place of "program i owns rows i · BLOCK_M and on".
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .configs import blocks
from .plan import Launch, Memory
from .problem import Problem


def tile_count(p: Problem, side: int) -> int:
    """How many tiles of `side` rows cover the rows of a problem, at most where they have tasks."""
    if not p.tasks:
        return blocks(p.M, side)
    return min(p.M, (p.M + (p.tasks + 1) * (side - 1)) // side)


def index(p: Problem, side: int) -> dict[str, Any]:
    """The arguments that tell a kernel with tiles of `side` rows which rows these are."""
    return {"order_ptr": "order" if p.tasks else None, "tiles_ptr": f"tiles_{side}" if p.tasks else None}


def ends(p: Problem, side: int) -> str | None:
    """The name of the tensor that says where each task's tiles of `side` rows end."""
    return f"ends_{side}" if p.tasks else None


def tables(p: Problem, *sides: int) -> tuple[list[Launch], dict[str, Memory]]:
    """A launch for each size of tiles, and the scratch tensors that they write; nothing where there are no tasks."""
    launches: list[Launch] = []
    scratch: dict[str, Memory] = {}
    BLOCK_N = 64
    for side in dict.fromkeys(sides if p.tasks else ()):
        N = tile_count(p, side)
        arguments = {
            "counts_ptr": "counts",
            "tiles_ptr": f"tiles_{side}",
            "ends_ptr": f"ends_{side}",
            "N": N,
            "T": p.tasks,
            "side": side,
        }
        constants = dict(BLOCK_N=BLOCK_N, BLOCK_T=64, num_warps=4)
        launches.append(Launch(table_kernel, (max(1, blocks(N, BLOCK_N)),), arguments, constants))
        scratch |= {f"tiles_{side}": Memory((N, 3), torch.int32), f"ends_{side}": Memory((p.tasks + 1,), torch.int32)}
    return launches, scratch


@triton.jit
def table_kernel(
    counts_ptr,  # [T + 1]
    tiles_ptr,  # [N, 3]
    ends_ptr,  # [T + 1]
    N,
    T,
    side,  # rows of a tile
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    task = tl.full([BLOCK_N], -2, dtype=tl.int32)
    row = tl.zeros([BLOCK_N], dtype=tl.int32)
    stop = tl.zeros([BLOCK_N], dtype=tl.int32)
    tiles_before = tl.zeros([1], dtype=tl.int32)
    rows_before = tl.zeros([1], dtype=tl.int32)
    # Every program goes through all stretches, since their tiles are where the sums over those before them say.
    for start_t in range(0, T + 1, BLOCK_T):
        offs_t = start_t + tl.arange(0, BLOCK_T)
        mask_t = offs_t <= T
        count = tl.load(counts_ptr + offs_t, mask=mask_t, other=0).to(tl.int32)  # [BLOCK_T]
        tiles = (count + side - 1) // side
        last_tile = tiles_before + tl.cumsum(tiles, 0)
        last_row = rows_before + tl.cumsum(count, 0)
        within = offs_n[:, None] - (last_tile - tiles)[None, :]  # [BLOCK_N, BLOCK_T]
        own = (within >= 0) & (offs_n[:, None] < last_tile[None, :])  # one of a line, or none
        first = (last_row - count)[None, :] + within * side
        task += tl.sum(tl.where(own, offs_t[None, :] + 1, 0), axis=1)
        row += tl.sum(tl.where(own, first, 0), axis=1)
        stop += tl.sum(tl.where(own, tl.minimum(first + side, last_row[None, :]), 0), axis=1)
        if tl.program_id(0) == 0:
            tl.store(ends_ptr + offs_t, last_tile, mask=mask_t)
        tiles_before += tl.sum(tiles, axis=0)
        rows_before += tl.sum(count, axis=0)
    mask_n = offs_n < N
    tl.store(tiles_ptr + 3 * offs_n, task, mask=mask_n)
    tl.store(tiles_ptr + 3 * offs_n + 1, row, mask=mask_n)
    tl.store(tiles_ptr + 3 * offs_n + 2, stop, mask=mask_n)
