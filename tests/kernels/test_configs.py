"""Tables and forms: something is chosen for anything. tests/bench/test_static.py compiles it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter_ops.kernels import backward, configs, forward
from adapter_ops.kernels.plan import Memory, Plan
from adapter_ops.kernels.problem import Needs, Problem, Rows, Target, Tuning

H200 = Target((9, 0), 132)


def problem(M=65536, D=768, R=64, dtype=torch.bfloat16, target=H200, **rest):
    rows = Rows(D, dtype)
    common = dict(residual=None, parameter_dtype=dtype, b_down=True, b_up=True, activation="gelu", scale=1.0)
    common |= dict(scale_size=0, dtype=dtype, tf32=False, aligned=True)
    return Problem(M, D, R, rows, **common | rest, target=target)


sizes = dict(
    M=st.integers(1, 1 << 24),
    D=st.integers(1, 20_000),
    R=st.integers(1, 5000),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)


@settings(deadline=None)
@given(
    **sizes,
    kernel=st.sampled_from(["fused", "shrink", "expand", "dz", "dx_dw", "dx", "reduce"]),
    capability=st.tuples(st.integers(0, 15), st.integers(0, 9)),
)
def test_tiles_for_anything(kernel, M, D, R, dtype, capability):
    p = problem(M, D, R, dtype, Target(capability, 100), dy=Rows(D, dtype))
    config = configs.tiles(kernel, p)
    sides = (config.BLOCK_D, config.BLOCK_R) + ((config.BLOCK_M,) if kernel != "reduce" else ())
    for size in (*sides, config.num_warps):
        assert size > 0 and size & (size - 1) == 0
    assert config.BLOCK_R >= 16


@settings(deadline=None)
@given(**sizes, capability=st.sampled_from([(8, 0), (9, 0), (10, 0), (12, 0)]))
def test_forms_of_forward(M, D, R, dtype, capability):
    """Fused where there is work for all and R fits a tile; split where not, and no further than there are columns."""
    p = problem(M, D, R, dtype, Target(capability, 132, unmeasured=True))
    plan = forward.plan(p)
    few, wide = M < 132 * 32, R > 128 or D > 4096
    assert plan.form != "fused" or not wide
    assert plan.form == "split" or not (wide or M <= 64)
    assert plan.form != "split" or wide or M < 132 * 128 or few
    assert plan.form != "resident" or (capability == (9, 0) and D % 8 == R % 8 == 0 and dtype.itemsize == 2)
    S = configs.splits(p)
    assert S == 1 or -(-D // configs.tiles("shrink", p).BLOCK_D) > configs.SPLIT_BLOCKS
    assert 1 <= S <= -(-D // configs.tiles("shrink", p).BLOCK_D)


@settings(deadline=None)
@given(**sizes, capability=st.sampled_from([(7, 5), (8, 0), (9, 0), (10, 0), (12, 0)]))
def test_nothing_runs_on_a_card_that_was_not_measured_there(M, D, R, dtype, capability):
    plan = forward.plan(problem(M, D, R, dtype, Target(capability, 132)))
    measured = capability == (9, 0) and M >= 4096 and D <= 4096 and R <= 128 and dtype.itemsize == 2
    assert (plan.form == "fused") == measured and (plan.form == "pytorch") == (not measured)
    assert bool(plan.launches) == measured
    assert ("NVIDIA H200" in plan.reason) == (capability == (9, 0))
    assert ("ADAPTER_OPS_UNMEASURED=1" in plan.reason) == (not measured)


def test_every_measured_row_is_of_a_form_and_shown():
    assert {row.form for row in configs.MEASURED} <= set(forward.FORMS)
    shown = "NVIDIA H200 (commit 9ac0bc0, 2026-11-23)"
    assert shown in forward.plan(problem()).reason


def test_a_form_that_is_asked_for_runs_or_raises():
    for form in ("fused", "split"):
        assert forward.plan(problem(tuning=Tuning(form))).form == form
    with pytest.raises(ValueError, match="the form 'resident' does not fit"):
        forward.plan(problem(R=200, tuning=Tuning("resident")))
    with pytest.raises(ValueError, match="the form 'none' does not fit"):
        forward.plan(problem(tuning=Tuning("none")))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.sampled_from([torch.bfloat16, torch.float32])), max_size=8))
def test_scratch_tensors_do_not_overlap(sizes):
    scratch = {f"s{i}": Memory((size,), dtype) for i, (size, dtype) in enumerate(sizes)}
    plan = Plan(problem(), "form", "reason", scratch=scratch)
    spans = [(o, o + m.shape[0] * m.dtype.itemsize) for o, m in zip(plan.offsets, scratch.values())]
    assert all(o % 256 == 0 and end <= plan.bytes for o, end in spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_a_plan_prints_what_it_launches():
    needs = Needs(True, True, True, True, True, False)
    text = str(backward.plan(problem(dy=Rows(768, torch.bfloat16), needs=needs)))
    assert [line.split("[")[0].strip() for line in text.splitlines()[1:]] == [
        "dz_kernel",
        "dx_dw_kernel",
        "reduce_kernel",
    ]
    text = str(forward.plan(problem()))
    assert text.startswith("fused at M=65536, D=768, R=64: faster than PyTorch on NVIDIA H200")
    assert "fused_kernel[1024] BLOCK_M=64 BLOCK_D=128" in text
