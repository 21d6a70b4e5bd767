"""Launch configs: a pure function of (kernel, D, R, dtype, compute capability). One table, one place.

The tiles were chosen by compiling for sm_80, sm_90 and sm_100 and reading off registers, spills and shared memory
(static); no GPU has timed them yet.
"""

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Config:
    """Tile sizes in elements and Triton's two launch options."""

    BLOCK_M: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def block_r(R: int) -> int:
    """The tile side that holds R: a power of two, and at least 16, the least a tensor core takes."""
    return max(16, triton.next_power_of_2(R))


# kernel -> {largest padded R: config}, 16-bit operands. fp32 and small shared memory shrink from here.
TABLE: dict[str, dict[int, Config]] = {
    "forward": {
        32: Config(64, 128, 4, 3),
        64: Config(128, 64, 8, 3),
        128: Config(128, 64, 8, 3),
        256: Config(64, 64, 8, 3),
    },
    "dz": {
        32: Config(64, 128, 4, 3),
        64: Config(128, 64, 8, 3),
        128: Config(64, 64, 8, 3),
        256: Config(64, 32, 8, 3),
    },
    "weights": {
        32: Config(64, 128, 8, 3),
        64: Config(64, 128, 8, 3),
        128: Config(64, 64, 8, 3),
        256: Config(64, 64, 8, 2),
    },
    "reduce": {
        32: Config(0, 16, 4, 3),
        64: Config(0, 8, 4, 3),
        128: Config(0, 4, 4, 3),
        256: Config(0, 4, 4, 3),
    },
}

MAX_BOTTLENECK = max(TABLE["forward"])


def choose(kernel: str, D: int, R: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """The config of `kernel` for hidden size D and bottleneck R <= MAX_BOTTLENECK. Never an error on an unknown GPU."""
    rows = TABLE[kernel]
    config = rows[min(r for r in rows if r >= block_r(R))]
    return Config(
        config.BLOCK_M, min(config.BLOCK_D, max(16, triton.next_power_of_2(D))), config.num_warps, config.num_stages
    )
