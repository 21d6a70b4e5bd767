"""Launch configs: a pure function of (kernel, M, D, R, dtype, compute capability). One table, one place.

An H200 has timed TABLE[9, 2] for `forward`, `dz` and `weights` up to R = 128 and, as a prototype, RESIDENT
(bench/results/h200.txt). All else is chosen by `python -m bench.static`: it neither spills nor overflows shared memory.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes in elements and Triton's two launch options."""

    BLOCK_M: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    BLOCK_R: int = 0  # the most a tile holds of R; 0 is all of it


@dataclass(frozen=True)
class Resident:
    """Tile sizes of hopper.py in elements, chunks of weights under way, and programs in the grid."""

    BLOCK_M: int
    BLOCK_D: int
    STAGES: int
    programs: int


# TABLE[tensor-core generation, bytes an element][kernel][R, at most]; a kernel's last row is for any larger R too.
# forward holds all of R in one tile: past its last row the pair of split.py takes over.
# Generation 8: mma, 99 KB of shared memory (sm_80, sm_86, sm_89, sm_120). 9: wgmma, 227 KB; it needs a tile side of 64
# or more in front. 10: tcgen05, 227 KB.
TABLE: dict[tuple[int, int], dict[str, dict[int, Config]]] = {
    (8, 2): {
        "forward": {
            32: Config(64, 128, 4, 3),
            64: Config(128, 64, 8, 3),
            128: Config(64, 64, 8, 3),
        },
        "dz": {
            32: Config(64, 128, 4, 3),
            64: Config(128, 64, 8, 3),
            128: Config(64, 64, 8, 3),
            256: Config(64, 64, 8, 3, BLOCK_R=128),
        },
        "weights": {
            16: Config(64, 128, 8, 3),
            32: Config(32, 128, 8, 2),
            256: Config(32, 64, 8, 3, BLOCK_R=128),  # any wider, and ptxas spills on sm_120
        },
        "down": {256: Config(128, 64, 8, 3, BLOCK_R=128)},
        "up": {256: Config(128, 128, 8, 3, BLOCK_R=64)},
    },
    (8, 4): {
        "forward": {
            32: Config(64, 64, 4, 3),
            64: Config(128, 32, 8, 3),
            128: Config(128, 32, 8, 2),
        },
        "dz": {
            32: Config(64, 64, 8, 3),
            64: Config(128, 32, 8, 3),
            256: Config(64, 32, 8, 3, BLOCK_R=128),
        },
        "weights": {
            16: Config(32, 128, 8, 3),
            64: Config(16, 128, 8, 3),
            128: Config(16, 64, 8, 3),
            256: Config(16, 128, 8, 3, BLOCK_R=64),
        },
        "down": {256: Config(128, 32, 8, 3, BLOCK_R=64)},
        "up": {256: Config(128, 64, 8, 3, BLOCK_R=32)},
    },
    (9, 4): {
        "forward": {
            32: Config(64, 64, 4, 3),
            128: Config(128, 32, 8, 3),
        },
        "dz": {
            32: Config(64, 64, 4, 3),
            256: Config(64, 32, 8, 3, BLOCK_R=128),
        },
        "weights": {
            16: Config(32, 128, 8, 3),
            64: Config(16, 128, 8, 3),
            128: Config(16, 64, 8, 3),
            256: Config(16, 128, 8, 3, BLOCK_R=64),
        },
        "down": {256: Config(128, 32, 8, 3, BLOCK_R=128)},
        "up": {256: Config(128, 64, 8, 3, BLOCK_R=32)},
    },
}
# tuned (9, 2): by hand, from times on an NVIDIA H200 (bench/results/h200.txt)
TABLE[9, 2] = {
    "forward": {
        64: Config(64, 128, 8, 3),
        128: Config(64, 64, 4, 3),
    },
    "dz": {
        32: Config(128, 64, 8, 3),
        64: Config(64, 128, 8, 3),
        128: Config(64, 128, 8, 4),
        256: Config(64, 64, 8, 3, BLOCK_R=128),
    },
    "weights": {
        128: Config(64, 128, 8, 3),
        256: Config(64, 128, 8, 2, BLOCK_R=128),
    },
    "down": {256: Config(128, 64, 8, 3, BLOCK_R=128)},
    "up": {256: Config(128, 128, 8, 3, BLOCK_R=64)},
}
# end of tuned (9, 2)
# tcgen05 takes its operands from shared memory, W_down among them: with a third stage they do not fit.
TABLE[10, 2] = TABLE[9, 2] | {"weights": {64: Config(64, 128, 8, 3), 256: Config(64, 128, 8, 2, BLOCK_R=128)}}
TABLE[10, 4] = TABLE[9, 4] | {"forward": TABLE[9, 4]["forward"] | {64: Config(128, 32, 8, 2)}}

# FEW_ROWS[bytes an element][kernel][M, at most] takes precedence over TABLE. With few rows the time of a kernel is that
# of one program, so tiles are small, programs many, and a short loop has all of its loads in flight. A tile of 16 rows
# takes mma on every card.
FEW_ROWS: dict[int, dict[str, dict[int, Config]]] = {
    2: {
        "dz": {64: Config(16, 256, 4, 5, BLOCK_R=16)},
        "down": {64: Config(16, 128, 4, 4, BLOCK_R=16), 8192: Config(64, 64, 4, 4, BLOCK_R=64)},
        "up": {64: Config(16, 32, 4, 2, BLOCK_R=128), 8192: Config(64, 64, 8, 2, BLOCK_R=64)},
    },
    4: {
        "dz": {64: Config(16, 128, 4, 4, BLOCK_R=16)},
        "down": {64: Config(16, 128, 4, 4, BLOCK_R=16), 8192: Config(64, 32, 8, 4, BLOCK_R=64)},
        "up": {64: Config(16, 32, 4, 2, BLOCK_R=32), 8192: Config(64, 32, 8, 2, BLOCK_R=16)},
    },
}

# The reduction has no dot and no rows of tokens: one entry serves every card. At R = 256 four warps spill on sm_80.
REDUCE = {32: Config(0, 8, 4, 1), 192: Config(0, 4, 4, 1, BLOCK_R=256), 256: Config(0, 4, 8, 1, BLOCK_R=256)}

# forward is one fused kernel from this share of the multiprocessors in use on, and a pair of kernels below it.
# Rows longer than FUSED_COLUMNS take the pair too: they leave L2 before the fused kernel reads them again. On an H200
# that took 0.69 of eager's time at D = 4096, and 1.66 at 8192.
FUSED_SHARE = 0.5
FUSED_COLUMNS = 4096


# RESIDENT[D at most, R at most]: the rows of x that a program of hopper.py holds in shared memory, and the programs
# that share the 228 KB of a multiprocessor; what is left goes to the ring of weights. The first row that holds D and R
# counts.
RESIDENT = {(512, 64): (64, 2), (768, 32): (128, 1), (1024, 128): (64, 1)}
# Four descriptors for the copy engine cost a launch 30 µs of host time; from about this many elements of x that is less
# than the kernel takes.
RESIDENT_ELEMENTS = 1 << 24


def blocks(size: int, side: int) -> int:
    """How many tiles of `side` cover `size`. triton.cdiv is a jit function too, and takes 3 µs on the host."""
    return -(-size // side)


def side(size: int) -> int:
    """The least tile side that holds `size`: a power of two, and at least 16, the least a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


def generation(capability: tuple[int, int]) -> int:
    """The generation of tensor cores, as in TABLE; for an unknown card the one that every card knows."""
    return {9: 9, 10: 10, 11: 10}.get(capability[0], 8)


def _table(dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, dict[int, Config]]:
    """`dtype` is that of the products; fp64, which only the interpreter runs, goes with fp32."""
    return TABLE[generation(capability), min(4, dtype.itemsize)]


@functools.lru_cache(maxsize=4096)
def choose(kernel: str, M: int, D: int, R: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """The config of `kernel` for M tokens, hidden size D and bottleneck R. Never an error on an unknown GPU."""
    few = FEW_ROWS[min(4, dtype.itemsize)].get(kernel, {})
    limit = min((m for m in few if m >= M), default=None)
    if limit:
        config = few[limit]
    else:
        rows = REDUCE if kernel == "reduce" else _table(dtype, capability)[kernel]
        config = rows[min((r for r in rows if r >= R), default=max(rows))]
    return fit(config, D, R)


def fit(config: Config, D: int, R: int) -> Config:
    """`config` with no tile side beyond what D and R fill."""
    return replace(config, BLOCK_D=min(config.BLOCK_D, side(D)), BLOCK_R=min(config.BLOCK_R or side(R), side(R)))


@functools.lru_cache(maxsize=4096)
def resident(M: int, D: int, R: int, capability: tuple[int, int], multiprocessors: int) -> Resident | None:
    """The config of hopper.py for 16-bit tensors; None where another form of forward is to run."""
    row = next((v for (d, r), v in RESIDENT.items() if d >= D and r >= R), None)
    if row is None or capability != (9, 0) or M * D < RESIDENT_ELEMENTS or D % 8 or R % 8:
        return None
    rows, per_multiprocessor = row
    columns = 128
    chunks = blocks(D, columns)
    free = 228 * 1024 // per_multiprocessor - 1024 - 2 * chunks * (rows * columns + 4) - 64
    stages = min(8, free // (2 * columns * side(R) + 8))
    return Resident(rows, columns, stages, per_multiprocessor * multiprocessors)


@functools.lru_cache(maxsize=4096)
def splits(M: int, D: int, R: int, dtype: torch.dtype, capability: tuple[int, int], multiprocessors: int) -> int:
    """How forward runs: 0 is the fused kernel, any other number the pair of split.py with D in that many splits.

    A program of the down kernel reads D / S columns and one of the up kernel sums S partials of R, so about √(D/R)
    splits take both the same time; fewer where there are programs enough without, or where the up kernel's threads
    would hold more than 64 values each.
    """
    if D <= FUSED_COLUMNS and any(r >= R for r in _table(dtype, capability)["forward"]):
        fused = choose("forward", M, D, R, dtype, capability)
        if blocks(M, fused.BLOCK_M) >= FUSED_SHARE * multiprocessors:
            return 0
    down, up = (choose(kernel, M, D, R, dtype, capability) for kernel in ("down", "up"))
    idle = multiprocessors // (blocks(M, down.BLOCK_M) * blocks(R, down.BLOCK_R))
    held = 64 * 32 * up.num_warps // (up.BLOCK_M * up.BLOCK_R)
    return max(1, min(idle, held, math.isqrt(D // R), blocks(D, down.BLOCK_D)))
