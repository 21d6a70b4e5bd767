"""Tables: the tiles of every kernel, and what was measured where. `forward.py` chooses the form.

An H200 has timed TABLE[9, 2] for `fused`, `dz` and `dx_dw` up to R = 128 and, as a prototype, RESIDENT
(bench/results/h200.txt). All else is chosen by `python -m bench.static`: it neither spills nor overflows shared memory.
"""

import functools
import math
from dataclasses import dataclass, replace

from .problem import Problem, Target


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
    """Tile sizes of resident.py in elements, chunks of weights under way, and programs in the grid."""

    BLOCK_M: int
    BLOCK_D: int
    STAGES: int
    programs: int


# TABLE[tensor-core generation, bytes an element][kernel][R, at most]; a kernel's last row is for any larger R too.
# `fused` holds all of R in one tile: past its last row the pair of split.py takes over.
# Generation 8: mma, 99 KB of shared memory (sm_80, sm_86, sm_89, sm_120). 9: wgmma, 227 KB; it needs a tile side of 64
# or more in front. 10: tcgen05, 227 KB.
TABLE: dict[tuple[int, int], dict[str, dict[int, Config]]] = {
    (8, 2): {
        "fused": {
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
        "dx_dw": {
            16: Config(64, 128, 8, 3),
            32: Config(32, 128, 8, 2),
            256: Config(32, 64, 8, 3, BLOCK_R=128),  # any wider, and ptxas spills on sm_120
        },
        "shrink": {256: Config(128, 64, 8, 3, BLOCK_R=128)},
        "expand": {256: Config(128, 128, 8, 3, BLOCK_R=64)},
    },
    (8, 4): {
        "fused": {
            32: Config(64, 64, 4, 3),
            64: Config(128, 32, 8, 3),
            128: Config(128, 32, 8, 2),
        },
        "dz": {
            32: Config(64, 64, 8, 3),
            64: Config(128, 32, 8, 3),
            256: Config(64, 32, 8, 3, BLOCK_R=128),
        },
        "dx_dw": {
            16: Config(32, 128, 8, 3),
            64: Config(16, 128, 8, 3),
            128: Config(16, 64, 8, 3),
            256: Config(16, 128, 8, 3, BLOCK_R=64),
        },
        "shrink": {256: Config(128, 32, 8, 3, BLOCK_R=64)},
        "expand": {256: Config(128, 64, 8, 3, BLOCK_R=32)},
    },
    (9, 4): {
        "fused": {
            32: Config(64, 64, 4, 3),
            128: Config(128, 32, 8, 3),
        },
        "dz": {
            32: Config(64, 64, 4, 3),
            256: Config(64, 32, 8, 3, BLOCK_R=128),
        },
        "dx_dw": {
            16: Config(32, 128, 8, 3),
            64: Config(16, 128, 8, 3),
            128: Config(16, 64, 8, 3),
            256: Config(16, 128, 8, 3, BLOCK_R=64),
        },
        "shrink": {256: Config(128, 32, 8, 3, BLOCK_R=128)},
        "expand": {256: Config(128, 64, 8, 3, BLOCK_R=32)},
    },
}
# tuned (9, 2): by hand, from times on an NVIDIA H200 (bench/results/h200.txt)
TABLE[9, 2] = {
    "fused": {
        64: Config(64, 128, 8, 3),
        128: Config(64, 64, 4, 3),
    },
    "dz": {
        32: Config(128, 64, 8, 3),
        64: Config(64, 128, 8, 3),
        128: Config(64, 128, 8, 4),
        256: Config(64, 64, 8, 3, BLOCK_R=128),
    },
    "dx_dw": {
        128: Config(64, 128, 8, 3),
        256: Config(64, 128, 8, 2, BLOCK_R=128),
    },
    "shrink": {256: Config(128, 64, 8, 3, BLOCK_R=128)},
    "expand": {256: Config(128, 128, 8, 3, BLOCK_R=64)},
}
# end of tuned (9, 2)
# tcgen05 takes its operands from shared memory, W_down among them: with a third stage they do not fit.
TABLE[10, 2] = TABLE[9, 2] | {"dx_dw": {64: Config(64, 128, 8, 3), 256: Config(64, 128, 8, 2, BLOCK_R=128)}}
TABLE[10, 4] = TABLE[9, 4] | {"fused": TABLE[9, 4]["fused"] | {64: Config(128, 32, 8, 2)}}

# FEW_ROWS[bytes an element][kernel][M, at most] takes precedence over TABLE. With few rows the time of a kernel is that
# of one program, so tiles are small, programs many, and a short loop has all of its loads in flight. A tile of 16 rows
# takes mma on every card.
FEW_ROWS: dict[int, dict[str, dict[int, Config]]] = {
    2: {
        "dz": {64: Config(16, 256, 4, 5, BLOCK_R=16)},
        "shrink": {64: Config(16, 128, 4, 4, BLOCK_R=16), 8192: Config(64, 64, 4, 4, BLOCK_R=64)},
        "expand": {64: Config(16, 32, 4, 2, BLOCK_R=128), 8192: Config(64, 64, 8, 2, BLOCK_R=64)},
    },
    4: {
        "dz": {64: Config(16, 128, 4, 4, BLOCK_R=16)},
        "shrink": {64: Config(16, 128, 4, 4, BLOCK_R=16), 8192: Config(64, 32, 8, 4, BLOCK_R=64)},
        "expand": {64: Config(16, 32, 4, 2, BLOCK_R=32), 8192: Config(64, 32, 8, 2, BLOCK_R=16)},
    },
}

# RAGGED[bytes an element][kernel] takes precedence over both, but for tiles of 16 rows, where rows of D or R elements
# do not all start at multiples of 16 bytes. Every element then has an address of its own, and larger tiles have no
# registers left. What an H200 has run stays as it is: R up to 128 in the kernels of TABLE[9, 2] that it timed.
RAGGED: dict[int, dict[str, Config]] = {
    2: {
        "fused": Config(64, 64, 8, 2),
        "dz": Config(64, 32, 8, 2, BLOCK_R=64),
        "dx_dw": Config(32, 64, 8, 2, BLOCK_R=64),
        "shrink": Config(64, 64, 8, 2, BLOCK_R=64),
        "expand": Config(64, 32, 8, 2, BLOCK_R=64),
    },
    4: {
        "fused": Config(64, 32, 8, 2),
        "dz": Config(64, 32, 8, 2, BLOCK_R=32),
        "dx_dw": Config(16, 64, 8, 2, BLOCK_R=32),
        "shrink": Config(64, 32, 8, 2, BLOCK_R=32),
        "expand": Config(64, 32, 8, 2, BLOCK_R=16),
    },
}

# The reduction has no dot and no rows of tokens: one entry serves every card. A wider block spills on sm_80 and sm_100.
REDUCE = {32: Config(0, 8, 4, 1), 128: Config(0, 4, 4, 1, BLOCK_R=128)}


@dataclass(frozen=True)
class Measured:
    """A form that a card has run as part of the library, and the calls for which it was faster than PyTorch there.

    `error` of these calls was at most twice eager PyTorch's, by `pytest -m gpu` on that card.
    """

    form: str
    capability: tuple[int, int]
    card: str
    commit: str
    date: str
    itemsize: int  # bytes of an element of the products' operands
    rows: int  # M, at least
    columns: int  # D, at most
    bottleneck: int  # R, at most


# What was run where (bench/results/h200.txt, sections 2 and 4). `resident` and `split` have not been run as part of the
# library by any card. With fewer rows, longer rows or a larger bottleneck `fused` was slower than eager PyTorch.
# Products in float32 were tested there, but not timed.
MEASURED = (Measured("fused", (9, 0), "NVIDIA H200", "9ac0bc0", "2026-11-23", 2, 4096, 4096, 128),)

# Where unmeasured forms may run, forward is one fused kernel from this share of the multiprocessors in use on, and the
# pair of split.py below it. Rows longer than FUSED_COLUMNS take the pair too: they leave L2 before the fused kernel
# reads them again. On an H200 that took 0.69 of eager's time at D = 4096, and 1.66 at 8192.
FUSED_SHARE = 0.5
FUSED_COLUMNS = 4096

# The pair divides D where a program would otherwise walk more blocks of columns than this. A division costs a launch
# and the partial sums in memory: 2.5 µs, where a block of columns takes about 0.25 (model).
SPLIT_BLOCKS = 12

# RESIDENT[D at most, R at most]: the rows of x that a program of resident.py holds in shared memory, and the programs
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


def itemsize(kernel: str, p: Problem) -> int:
    """Bytes of the widest element of what a kernel reads tiles of, 4 at most: it decides which tiles fit.

    fp64, which only the interpreter runs, takes the tiles of fp32.
    """
    read = {
        "dz": (p.dtype, p.parameter_dtype, p.dy and p.dy.dtype),
        "dx_dw": (p.dtype, p.parameter_dtype, p.x.dtype, p.dy and p.dy.dtype),
        "dx": (p.dtype, p.parameter_dtype),
        "reduce": (p.dtype,),
    }.get(kernel, (p.parameter_dtype, p.x.dtype, p.residual and p.residual.dtype))
    return min(4, max(dtype.itemsize for dtype in read if dtype))


def tiles(kernel: str, p: Problem) -> Config:
    """The config of a kernel for a problem. Never an error on an unknown card."""
    asked = dict(p.tuning.tiles).get(kernel)
    if asked:
        return fit(asked, p.D, p.R)
    found = _tiles(kernel, p.M, p.D, p.R, itemsize(kernel, p), p.target.capability)
    return _with_index(kernel, found, generation(p.target.capability)) if p.tasks else found


def _with_index(kernel: str, config: Config, card: int) -> Config:
    """The tiles of a kernel for rows of several tasks: no larger than what has registers left for the rows' addresses.

    A tile holds rows of one task, so that a larger one would often be empty in part.
    """
    if kernel == "dx_dw":
        return replace(config, BLOCK_D=min(config.BLOCK_D, 64)) if card == 8 else config
    if kernel in ("expand", "dx") and card == 8:
        few = config.BLOCK_M == 16  # ptxas would give each of more warps too few registers, and spill
        config = replace(config, BLOCK_R=min(config.BLOCK_R, 32), num_warps=2 if few else config.num_warps)
    if kernel == "fused" and card == 8:
        config = replace(config, num_warps=4)
    return replace(config, BLOCK_M=min(config.BLOCK_M, 64))


@functools.lru_cache(maxsize=4096)
def _tiles(kernel: str, M: int, D: int, R: int, itemsize: int, capability: tuple[int, int]) -> Config:
    if kernel == "dx":
        kernel = "expand"
    card = generation(capability)
    timed = card == 9 and R <= 128 and kernel in ("fused", "dz", "dx_dw")
    ragged = (D % 8 or R % 8) and not timed and kernel in RAGGED[itemsize]
    few = FEW_ROWS[itemsize].get(kernel, {})
    limit = min((m for m in few if m >= M), default=None)
    if limit and not (ragged and few[limit].BLOCK_M > 16):
        return fit(few[limit], D, R)
    if ragged:
        return fit(RAGGED[itemsize][kernel], D, R)
    rows = REDUCE if kernel == "reduce" else TABLE[card, itemsize][kernel]
    return fit(rows[min((r for r in rows if r >= R), default=max(rows))], D, R)


def fit(config: Config, D: int, R: int) -> Config:
    """`config` with no tile side beyond what D and R fill."""
    return replace(config, BLOCK_D=min(config.BLOCK_D, side(D)), BLOCK_R=min(config.BLOCK_R or side(R), side(R)))


def resident(p: Problem) -> Resident | None:
    """The config of resident.py; None where x does not fit, or where another form is faster."""
    row = next((v for (d, r), v in RESIDENT.items() if d >= p.D and r >= p.R), None)
    if row is None or p.target.capability != (9, 0):
        return None
    if asked := dict(p.tuning.tiles).get("resident"):
        return asked
    if p.M * p.D < RESIDENT_ELEMENTS:
        return None
    return resident_config(p.D, p.R, *row, p.target.multiprocessors)


def resident_config(D: int, R: int, rows: int, per_multiprocessor: int, multiprocessors: int) -> Resident:
    """The config for a row of RESIDENT: what x leaves of the shared memory goes to the ring of weights."""
    columns = 128
    chunks = blocks(D, columns)
    free = 228 * 1024 // per_multiprocessor - 1024 - 2 * chunks * (rows * columns + 4) - 64
    stages = min(8, free // (2 * columns * side(R) + 8))
    return Resident(rows, columns, stages, per_multiprocessor * multiprocessors)


def holds_bottleneck(p: Problem) -> bool:
    """Whether a tile of the fused kernel can hold all of R."""
    return max(TABLE[generation(p.target.capability), itemsize("fused", p)]["fused"]) >= p.R


def fills_card(p: Problem) -> bool:
    """Whether the fused kernel, which has a program for each block of rows, occupies enough of the card."""
    return blocks(p.M, tiles("fused", p).BLOCK_M) >= FUSED_SHARE * p.target.multiprocessors


def splits(p: Problem) -> int:
    """In how many parts the pair of split.py divides D.

    A program of `shrink` reads D / S columns and one of `combine` adds S partial sums of R, so about √(D/R) splits take
    both the same time; fewer where there are programs enough without.
    """
    if p.tasks:
        return 1
    if p.tuning.splits:
        return p.tuning.splits
    shrink = tiles("shrink", p)
    columns = blocks(p.D, shrink.BLOCK_D)
    if columns <= SPLIT_BLOCKS:
        return 1
    idle = p.target.multiprocessors // (blocks(p.M, shrink.BLOCK_M) * blocks(p.R, shrink.BLOCK_R))
    return max(1, min(idle, math.isqrt(p.D // p.R), columns))


def measured(form: str, target: Target) -> list[Measured]:
    """What such a card has said of a form."""
    return [row for row in MEASURED if row.form == form and row.capability == target.capability]
