"""Launch configs: a pure function of (kernel, D, R, dtype, compute capability). One table, one place.

Every entry compiles without a spill at D = 768 and fits the shared memory of its cards (static: Triton 3.9, `python -m
bench.static` shows it; where an entry spills, a comment says so). No GPU has timed them yet.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Tile sizes in elements and Triton's two launch options."""

    BLOCK_M: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


# TABLE[tensor-core generation, bytes an element][kernel][R rounded up to a power of two]
# Generation 8: mma, 99 KB of shared memory (sm_80, sm_86, sm_89, sm_120). 9: wgmma, 227 KB; it needs a tile side of 64
# or more in front, and at R = 256 dz keeps to that and spills 40 bytes outside its loop. 10: tcgen05, 227 KB.
TABLE: dict[tuple[int, int], dict[str, dict[int, Config]]] = {
    (8, 2): {
        "forward": {
            32: Config(64, 128, 4, 3),
            64: Config(128, 64, 8, 3),
            128: Config(64, 64, 8, 3),
            256: Config(64, 64, 8, 2),
        },
        "dz": {
            32: Config(64, 128, 4, 3),
            64: Config(128, 64, 8, 3),
            128: Config(64, 64, 8, 3),
            256: Config(32, 64, 8, 3),
        },
        "weights": {
            16: Config(64, 128, 8, 3),
            32: Config(64, 128, 8, 2),
            64: Config(32, 128, 8, 2),
            128: Config(32, 64, 8, 2),
            256: Config(32, 32, 8, 3),
        },
    },
    (8, 4): {
        "forward": {
            32: Config(64, 64, 4, 3),
            64: Config(128, 32, 8, 3),
            128: Config(128, 32, 8, 2),
            256: Config(64, 32, 8, 2),
        },
        "dz": {
            32: Config(64, 64, 8, 3),
            64: Config(128, 32, 8, 3),
            256: Config(64, 32, 8, 3),
        },
        "weights": {
            16: Config(32, 128, 8, 3),
            64: Config(16, 128, 8, 3),
            128: Config(16, 64, 8, 3),
            256: Config(16, 32, 8, 2),
        },
    },
    (9, 2): {
        "forward": {
            32: Config(64, 128, 4, 3),
            128: Config(128, 64, 8, 3),
            256: Config(64, 64, 8, 3),
        },
        "dz": {
            32: Config(64, 128, 4, 3),
            64: Config(128, 64, 8, 3),
            128: Config(64, 64, 8, 3),
            256: Config(64, 64, 16, 3),
        },
        "weights": {
            64: Config(64, 128, 8, 3),
            128: Config(64, 64, 8, 3),
            256: Config(64, 32, 16, 3),
        },
    },
    (9, 4): {
        "forward": {
            32: Config(64, 64, 4, 3),
            128: Config(128, 32, 8, 3),
            256: Config(64, 32, 8, 3),
        },
        "dz": {
            32: Config(64, 64, 4, 3),
            64: Config(128, 32, 8, 3),
            128: Config(64, 64, 8, 3),
            256: Config(32, 64, 8, 3),
        },
        "weights": {
            16: Config(32, 128, 8, 3),
            64: Config(16, 128, 8, 3),
            128: Config(16, 64, 8, 3),
            256: Config(16, 32, 8, 2),
        },
    },
}
TABLE[10, 2] = TABLE[9, 2] | {
    "dz": TABLE[9, 2]["dz"] | {256: Config(64, 64, 8, 2)},
    "weights": TABLE[9, 2]["weights"] | {256: Config(64, 64, 8, 2)},
}
TABLE[10, 4] = TABLE[9, 4] | {"forward": TABLE[9, 4]["forward"] | {64: Config(128, 32, 8, 2)}}
# The reduction has no dot and no rows of tokens: one entry serves every card.
REDUCE = {32: Config(0, 8, 4, 1), 256: Config(0, 4, 4, 1)}

MAX_BOTTLENECK = 256


def power_of_2(n: int) -> int:
    """The least power of two that is at least n ≥ 1. (Triton's own is a constexpr function, and takes microseconds.)"""
    return 1 << (n - 1).bit_length()


def block_r(R: int) -> int:
    """The tile side that holds R: a power of two, and at least 16, the least a tensor core takes."""
    return max(16, power_of_2(R))


def choose(kernel: str, D: int, R: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """The config of `kernel` for hidden size D and bottleneck R ≤ MAX_BOTTLENECK. Never an error on an unknown GPU.

    `dtype` is that of the products; fp64, which only the interpreter runs, goes with fp32.
    """
    if kernel == "reduce":
        rows = REDUCE
    else:
        generation = {9: 9, 10: 10, 11: 10}.get(capability[0], 8)
        rows = TABLE[generation, min(4, dtype.itemsize)][kernel]
    config = rows[min(r for r in rows if r >= block_r(R))]
    columns = min(config.BLOCK_D, max(16, power_of_2(D)))
    return Config(config.BLOCK_M, columns, config.num_warps, config.num_stages)
