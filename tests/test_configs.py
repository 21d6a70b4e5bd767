"""Launch configs: chosen for anything. tests/test_static.py compiles them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_ops.kernels import configs


@settings(deadline=None)
@given(
    kernel=st.sampled_from(["forward", "dz", "weights", "reduce"]),
    D=st.integers(1, 20_000),
    R=st.integers(1, configs.MAX_BOTTLENECK),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    capability=st.tuples(st.integers(0, 15), st.integers(0, 9)),
)
def test_never_an_error(kernel, D, R, dtype, capability):
    config = configs.choose(kernel, D, R, dtype, capability)
    assert configs.block_r(R) >= max(R, 16)
    for size in (config.BLOCK_D, config.num_warps) + ((config.BLOCK_M,) if kernel != "reduce" else ()):
        assert size > 0 and size & (size - 1) == 0
    assert config == configs.choose(kernel, D, R, dtype, capability)
