"""Forward on Hopper for many tokens, in Gluon: x stays in shared memory between its two uses.

    z = x · W_downᵀ + b_down                   [M, R]
    y = x + scale · (act(z) · W_upᵀ + b_up)    [M, D]

`fused.py` reads x a second time as the residual, from L2 at best. Here a program takes BLOCK_M whole rows of x into
shared memory, a chunk of BLOCK_D columns at a time, multiplies them from there, and turns each chunk into y in place;
the copy engine writes it out from the same bytes. x crosses from L2 once. The weights come in the same order for every
tile, all of W_down and then all of W_up, through a ring of STAGES chunks. A program walks over several tiles: as soon
as a chunk of y has been read out, the next tile's x takes its place.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import configs
from .activations import find_activation
from .configs import Resident
from .parts import finish
from .plan import TL_DTYPE, Boxes, Launch
from .problem import Problem

# Triton 3.9 renamed these.
RENAMED = gl.constexpr(hasattr(tma, "async_load"))
tma_load = tma.async_load if RENAMED else tma.async_copy_global_to_shared
tma_store = tma.async_store if RENAMED else tma.async_copy_shared_to_global


def launch(p: Problem, config: Resident) -> Launch:
    """y and, unless it is not to be saved, z of a problem that `fits`."""
    rows, columns, bottleneck = config.BLOCK_M, config.BLOCK_D, configs.side(p.R)
    tiles = configs.blocks(p.M, rows)
    arguments = {
        "x_desc": Boxes("x", rows, columns),
        "y_desc": Boxes("y", rows, columns),
        "w_down_desc": Boxes("w_down", bottleneck, columns),
        "w_up_desc": Boxes("w_up", columns, bottleneck),
        "b_down_ptr": "b_down" if p.b_down else None,
        "b_up_ptr": "b_up" if p.b_up else None,
        "scale": p.scale,
        "scale_ptr": "scale" if p.scale_size else None,
        "z_ptr": "z" if p.save_z else None,
        "M": p.M,
        "tiles": tiles,
    }
    constants = dict(
        D=p.D,
        R=p.R,
        SCALE_STRIDE=p.scale_stride,
        ACT=find_activation(p.activation).act,
        BLOCK_M=rows,
        BLOCK_D=columns,
        BLOCK_R=bottleneck,
        STAGES=config.STAGES,
        num_warps=rows // 16,
        enable_fp_fusion=True,
    )
    return Launch(resident_kernel, (min(tiles, config.programs),), arguments, constants)


def descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What the copy engine knows of a tensor [..., D] that is dense, or [M, D] with any row stride."""
    tensor = tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], TL_DTYPE[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, [rows, columns], layout)


@gluon.jit
def _slot(ring, i, shape: gl.constexpr, layout: gl.constexpr):
    if RENAMED:
        return ring.index(i).reinterpret(ring.dtype, shape, layout)
    else:
        return ring.index(i)._reinterpret(ring.dtype, shape, layout)


@gluon.jit
def _load_weights(
    k,  # counts the chunks from the program's start: CHUNKS of W_down, CHUNKS of W_up, and again for the next tile
    wanted,
    w_down_desc,
    w_up_desc,
    ring,
    ready,
    CHUNKS: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_R: gl.constexpr,
    STAGES: gl.constexpr,
):
    DOWN: gl.constexpr = w_down_desc.layout
    UP: gl.constexpr = w_up_desc.layout
    i = k % STAGES
    chunk = k % (2 * CHUNKS)
    mbarrier.expect(ready.index(i), BLOCK_R * BLOCK_D * ring.dtype.primitive_bitwidth // 8, pred=wanted)
    down = _slot(ring, i, [BLOCK_R, BLOCK_D], DOWN)
    tma_load(w_down_desc, [0, chunk * BLOCK_D], ready.index(i), down, pred=wanted & (chunk < CHUNKS))
    up = _slot(ring, i, [BLOCK_D, BLOCK_R], UP)
    tma_load(w_up_desc, [(chunk - CHUNKS) * BLOCK_D, 0], ready.index(i), up, pred=wanted & (chunk >= CHUNKS))


@gluon.jit
def resident_kernel(
    x_desc,  # [M, D] in boxes of [BLOCK_M, BLOCK_D]
    y_desc,  # [M, D] in boxes of [BLOCK_M, BLOCK_D]
    w_down_desc,  # [R, D] in boxes of [BLOCK_R, BLOCK_D]
    w_up_desc,  # [D, R] in boxes of [BLOCK_D, BLOCK_R]
    b_down_ptr,  # [R] or None
    b_up_ptr,  # [D] or None
    scale,  # number; used where scale_ptr is None
    scale_ptr,  # [1] (SCALE_STRIDE 0), [D] (SCALE_STRIDE 1) or None
    z_ptr,  # [M, R] or None
    M,
    tiles,
    D: gl.constexpr,
    R: gl.constexpr,
    SCALE_STRIDE: gl.constexpr,
    ACT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_R: gl.constexpr,  # >= R
    STAGES: gl.constexpr,  # at least 2: a chunk is awaited while the one before it is still being multiplied
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    DOWN: gl.constexpr = w_down_desc.layout
    UP: gl.constexpr = w_up_desc.layout
    CHUNKS: gl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    X_BYTES: gl.constexpr = BLOCK_M * BLOCK_D * dtype.primitive_bitwidth // 8
    z_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_R, 16])
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_D, 16])

    xs = gl.allocate_shared_memory(dtype, [CHUNKS, BLOCK_M, BLOCK_D], x_desc.layout)
    ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_R, BLOCK_D], DOWN)
    x_ready = gl.allocate_shared_memory(gl.int64, [CHUNKS, 1], mbarrier.MBarrierLayout())
    w_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(CHUNKS):
        mbarrier.init(x_ready.index(j), count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(w_ready.index(j), count=1)
    fence_async_shared()

    first = gl.program_id(0)
    step = gl.num_programs(0)
    total = (tiles - first + step - 1) // step * (2 * CHUNKS)
    for j in gl.static_range(CHUNKS):
        mbarrier.expect(x_ready.index(j), X_BYTES)
        tma_load(x_desc, [first * BLOCK_M, j * BLOCK_D], x_ready.index(j), xs.index(j))
        if j < STAGES:
            _load_weights(j, True, w_down_desc, w_up_desc, ring, w_ready, CHUNKS, BLOCK_D, BLOCK_R, STAGES)
    for j in gl.static_range(CHUNKS, STAGES):
        _load_weights(j, True, w_down_desc, w_up_desc, ring, w_ready, CHUNKS, BLOCK_D, BLOCK_R, STAGES)

    offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, z_layout))
    offs_r = gl.arange(0, BLOCK_R, gl.SliceLayout(0, z_layout))
    mask_r = offs_r < R
    if b_down_ptr is not None:
        b_down = gl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(gl.float32)
    no_y = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, y_layout)
    x_phase = 0
    k = 0
    for tile in range(first, tiles, step):
        row = tile * BLOCK_M
        more = tile + step < tiles

        z = gl.zeros([BLOCK_M, BLOCK_R], gl.float32, z_layout)
        for i in range(CHUNKS):
            mbarrier.wait(w_ready.index(k % STAGES), (k // STAGES) & 1)
            mbarrier.wait(x_ready.index(i), x_phase)
            w = _slot(ring, k % STAGES, [BLOCK_R, BLOCK_D], DOWN).permute((1, 0))
            z = warpgroup_mma(xs.index(i), w, z, is_async=True)
            # The product before this one is done, so its weights may go.
            z = warpgroup_mma_wait(1, deps=(z,))
            free = k - 1 + STAGES
            wanted = (i > 0) & (free < total)
            _load_weights(free, wanted, w_down_desc, w_up_desc, ring, w_ready, CHUNKS, BLOCK_D, BLOCK_R, STAGES)
            k += 1
        z = warpgroup_mma_wait(0, deps=(z,))
        free = k - 1 + STAGES
        _load_weights(free, free < total, w_down_desc, w_up_desc, ring, w_ready, CHUNKS, BLOCK_D, BLOCK_R, STAGES)

        if b_down_ptr is not None:
            z += b_down[None, :]
        if R < BLOCK_R:
            z = gl.where(mask_r[None, :], z, 0.0)  # an Inf in x times the padding is NaN, and would spread to all of y
        if z_ptr is not None:
            rows = row + offs_m
            offs = rows.to(gl.int64)[:, None] * R + offs_r[None, :]
            gl.store(z_ptr + offs, z.to(dtype), mask=(rows < M)[:, None] & mask_r[None, :])
        h = gl.convert_layout(ACT(z).to(dtype), gl.DotOperandLayout(0, y_layout, 2))  # [BLOCK_M, BLOCK_R]

        for i in range(CHUNKS):
            offs_d = i * BLOCK_D + gl.arange(0, BLOCK_D, gl.SliceLayout(0, y_layout))
            mask_d = offs_d < D
            b_up = gl.load(b_up_ptr + offs_d, mask=mask_d, other=0.0) if b_up_ptr is not None else None
            x = xs.index(i).load(y_layout)  # [BLOCK_M, BLOCK_D]
            mbarrier.wait(w_ready.index(k % STAGES), (k // STAGES) & 1)
            w = _slot(ring, k % STAGES, [BLOCK_D, BLOCK_R], UP).permute((1, 0))
            y = warpgroup_mma(h, w, no_y, use_acc=False, is_async=True)
            y = warpgroup_mma_wait(0, deps=(y,))
            free = k + STAGES
            _load_weights(free, free < total, w_down_desc, w_up_desc, ring, w_ready, CHUNKS, BLOCK_D, BLOCK_R, STAGES)
            k += 1
            s = gl.load(scale_ptr + offs_d * SCALE_STRIDE, mask=mask_d, other=0.0) if scale_ptr is not None else None
            y = finish(y, b_up, scale, s, gl.float32)
            xs.index(i).store((x.to(gl.float32) + y).to(dtype))
            fence_async_shared()
            tma_store(y_desc, [row, i * BLOCK_D], xs.index(i))
            # All but this chunk of y have been read out, so x of the next tile may take the place of the one before.
            tma.store_wait(pendings=1)
            if (i > 0) & more:
                mbarrier.expect(x_ready.index(i - 1), X_BYTES)
                tma_load(x_desc, [row + step * BLOCK_M, (i - 1) * BLOCK_D], x_ready.index(i - 1), xs.index(i - 1))
        tma.store_wait(pendings=0)
        if more:
            mbarrier.expect(x_ready.index(CHUNKS - 1), X_BYTES)
            coordinates = [row + step * BLOCK_M, (CHUNKS - 1) * BLOCK_D]
            tma_load(x_desc, coordinates, x_ready.index(CHUNKS - 1), xs.index(CHUNKS - 1))
        x_phase ^= 1
