"""The pair of kernels for few tokens and large bottlenecks, and backward with R in blocks."""

import pytest
import torch
from helpers import DTYPES, SUBSETS, Call, as_function, assert_two_times_rule, check, check_exact, slack

from adapter_ops import reference
from adapter_ops.kernels import backward
from adapter_ops.kernels.activations import ACTIVATIONS
from adapter_ops.kernels.plan import target
from adapter_ops.kernels.problem import Needs, Options, Weights, backward_problem

pytestmark = pytest.mark.usefixtures("one_thread")

# With tiles of 128 columns for M ≤ 64 and fewer above, D = 300 takes up to three splits, the last of them ragged.
FORMS = pytest.mark.parametrize("splits", [1, 2, 3], indirect=True)


@FORMS
@pytest.mark.parametrize("M", [1, 16, 63, 64, 65, 129])
@pytest.mark.parametrize("R", [1, 24, 130])
@pytest.mark.parametrize("D", [7, 300])
def test_sizes_of_the_pair(path, splits, D, R, M):
    check(Call(M, D, R), path)


@pytest.mark.parametrize("splits", [1, 3], indirect=True)
@pytest.mark.parametrize("M", [17, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own_residual, bias", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("scale", [0.3, "one", "channel"])
def test_scale_residual_bias_of_the_pair(path, splits, scale, own_residual, bias, dtype, M):
    check(Call(M, 300, 24, dtype, scale=scale, own_residual=own_residual, bias=bias), path)


@pytest.mark.parametrize("splits", [1, 3], indirect=True)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_pair(path, splits, activation):
    check(Call(17, 300, 12, activation=activation), path)


@pytest.mark.parametrize("splits", [0, 1, 3], indirect=True)
def test_products_that_are_exact_in_every_form(path, splits):
    for M, R in ((16, 21), (131, 21), (131, 140)):
        call = Call(M, 301, R, torch.float32, activation="relu")
        check_exact(call)


@FORMS
def test_repeat_of_the_pair_gives_equal_bits(path, splits):
    for M in (16, 130):
        call = Call(M, 300, 140, scale="channel")
        first, second = call.gradients(), call.gradients()
        assert all(torch.equal(first[n], second[n]) for n in first)


@FORMS
def test_inference_of_the_pair_equals_training(path, splits):
    """Without a gradient no z is stored, which changes nothing else."""
    call = Call(17, 300, 24)
    with torch.no_grad():
        y = call()
    assert torch.equal(y, call.gradients()["y"])


@FORMS
def test_row_strided_pair(path, splits):
    call = Call(66, 300, 6, own_residual=True)
    dense = call.gradients()
    for name in ("x", "residual"):
        wide = torch.randn(66, 317)
        wide[:, 3:303] = call.inputs[name]
        call.inputs[name] = wide[:, 3:303]
    for name, t in call.gradients().items():
        assert torch.equal(t, dense[name]), name


@pytest.mark.parametrize("splits", [1, 3], indirect=True)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_through_the_pair(path, splits, value, activation):
    call = Call(20, 300, 20, activation=activation)
    call.inputs["x"][3, 5] = value
    eager, found = call.gradients(reference.bottleneck_adapter, dtype=torch.float64), call.gradients()
    for name in eager:
        for where in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(where(found[name]), where(eager[name])), (name, where)


@pytest.mark.parametrize("splits", [0, 1, 3], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes_of_the_pair(path, splits, dtype):
    """fp32 parameters under 16-bit activations, and fp32 activations under autocast."""
    for x_dtype in (dtype, torch.float32):
        call = Call(17, 300, 12, x_dtype, torch.float32, scale="channel", own_residual=x_dtype == torch.float32)
        with torch.autocast(call.dy.device.type, dtype):
            eager, found = call.gradients(reference.bottleneck_adapter), call.gradients()
        assert found["y"].dtype == x_dtype and found["w_up"].dtype == torch.float32
        assert_two_times_rule(found, eager, call.oracle(), slack(path, dtype))


@FORMS
@pytest.mark.parametrize("scale", [0.5, "one", "channel"])
def test_gradcheck_of_the_pair(path, splits, scale):
    call = Call(3, 260, 2, torch.float64, scale=scale)
    function, inputs = as_function(call, list(call.inputs))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


# Bottlenecks past one tile, at the configs that are chosen for them.


@pytest.mark.parametrize("M", [0, 1, 16, 64, 65, 129])
@pytest.mark.parametrize("R", [256, 257, 512])
@pytest.mark.parametrize("D", [33])
def test_large_bottleneck(path, D, R, M):
    check(Call(M, D, R), path)


@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda s: "-".join(s) or "none")
def test_frozen_inputs_at_a_large_bottleneck(path, wanted):
    check(Call(17, 36, 140), path, wanted)
    check(Call(17, 36, 140, scale="channel", own_residual=True), path, [*wanted, "scale"])
    check(Call(17, 36, 140, scale="one", own_residual=True), path, [*wanted, "residual"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("own_residual", [False, True])
@pytest.mark.parametrize("scale", [0.3, "one", "channel"])
def test_scale_residual_dtype_at_a_large_bottleneck(path, scale, own_residual, dtype):
    check(Call(130, 40, 300, dtype, scale=scale, own_residual=own_residual), path)


def test_expand_ignores_what_it_does_not_need(path):
    """dx of a residual of its own takes no dy."""
    if path == "cpu":
        pytest.skip("a test of one Triton kernel, which the CPU path does not have")
    call = Call(5, 30, 300, own_residual=True)
    t = call.inputs
    weights = Weights(t["w_down"], None, t["w_up"], None, None)
    needs = Needs(True, False, False, False, False, False)
    options, card = Options("identity", 1.0, torch.float32), target(t["x"].device)
    problem = backward_problem(call.dy, t["x"], torch.zeros(5, 300), weights, options, needs, False, card)
    plan = backward.plan(problem)
    (launch,) = (one for one in plan.launches if one.arguments.get("y_ptr") == "dx")
    assert launch.arguments["residual_ptr"] is None
    tensors = plan.tensors((torch.full_like(call.dy, float("nan")), t["x"], torch.zeros(5, 300), *weights))
    tensors["dz"].normal_()
    launch(tensors)
    torch.testing.assert_close(tensors["dx"], tensors["dz"] @ t["w_down"])
