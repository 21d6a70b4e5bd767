"""The benchmark's cases under pytest-benchmark: pytest bench/ --benchmark-only [--benchmark-compare]."""

import pytest
import torch

from ..shape import Shape
from .cases import PROVIDERS, Case, Gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(name, mode) for name, p in PROVIDERS.items() if p.available() and p.make for mode in p.modes]


@pytest.mark.parametrize(("provider", "mode"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["4096x768x64", "2048x4096x64", "1x64x8"])
def test_adapter(benchmark, shape, dtype, provider, mode):
    torch.compiler.reset()
    case = Case(Shape.parse(shape), dtype, DEVICE)
    module = case.make(provider)
    assert module is not None and Gate(case).check(provider, module, mode).right
    benchmark.group = f"{shape} {dtype} {mode}"
    call = case.call(module, mode)

    def synchronized() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronized)
