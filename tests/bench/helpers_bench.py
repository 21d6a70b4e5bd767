"""Rows of results without a run."""

import torch

from bench.shape import Shape
from bench.speed import measure
from bench.speed.cases import MODES, PROVIDERS
from bench.speed.rows import Row, Writer


def made_up(shapes, provider_names=("eager", "in-place", "adapter_ops", "copy")):
    """Rows as a run on a GPU would write them."""
    for M, D, R in shapes:
        for mode in MODES:
            moved, flops = measure.work(Shape(M, D, R), torch.bfloat16, mode)
            for i, name in enumerate(provider_names):
                if mode in PROVIDERS[name].modes:
                    ms = 1 + M / (i + 1)
                    row = Row(name, "made up", "bfloat16", mode, M, D, R, user_ms=ms, kernel_ms=ms, bytes=moved)
                    row.flops, row.kernel_speedup, row.percent_of_floor = flops, (1 + M) / ms, 50.0
                    row.copy_bytes_per_second, row.matmul_flops_per_second = 3e12, 8e14
                    yield row


def write(path, rows):
    writer = Writer(path)
    writer.write(rows)
    writer.close(whole=True)
    return path
