"""The benchmark's cases under pytest-benchmark: pytest bench/ --benchmark-only [--benchmark-compare]."""

import pytest
import torch

from .harness import PROVIDERS, Case, Shape, gate, runner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("mode", ["fwd", "train"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["4096x768x64", "2048x4096x64", "1x64x8"])
def test_adapter(benchmark, shape, dtype, provider, mode):
    case = Case(Shape.parse(shape), dtype, DEVICE)
    assert gate(case, provider) <= 2
    benchmark.group = f"{shape} {dtype} {mode}"
    run = runner(case, provider, mode)

    def synchronized() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronized)
