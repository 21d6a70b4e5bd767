"""Edges of the ops: strides, sizes, dtypes and settings that no ordinary call has."""

import pytest
import torch
from helpers import Call, assert_two_times_rule, check, relative_error

from adapter_ops import bottleneck_adapter, calls, cpu, reference
from adapter_ops.kernels import forward
from adapter_ops.kernels.plan import target
from adapter_ops.kernels.problem import Needs, Options, Weights, forward_problem


@pytest.mark.parametrize(
    "own_residual, scale, bias", [(False, 1.0, True), (True, "channel", True), (False, 0.3, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_enough_for_onednn(use_path, dtype, own_residual, scale, bias):
    """x, h and dz all have 2^16 elements or more, so every product on the CPU path is oneDNN's."""
    use_path("cpu")
    call = Call(700, 130, 200, dtype, scale=scale, own_residual=own_residual, bias=bias)
    check(call, "cpu")


@pytest.mark.parametrize("M, D, R", [(65, 20, 6), (700, 130, 200)])
@pytest.mark.parametrize("name", ["w_down", "b_down", "w_up", "b_up", "scale"])
def test_strided_parameters(path, name, M, D, R):
    """The larger call is one of oneDNN's on the CPU; for the kernels its 130 columns and R of 200 are several tiles."""
    call = Call(min(M, 130) if path == "interpreter" else M, D, R, scale="channel")
    wide = torch.stack([torch.randn_like(call.inputs[name]), call.inputs[name]], -1)
    call.inputs[name] = wide[..., 1]
    check(call, path)


def test_gradcheck_where_x_depends_on_the_parameters(path):
    """One adapter applied twice, and one tensor in two places."""
    call = Call(5, 6, 6, torch.float64)
    call.inputs["w_up"] = call.inputs["w_down"]

    def second(function):
        inputs = {n: t.detach().requires_grad_() for n, t in call.inputs.items()}
        inputs["w_up"] = inputs["w_down"]
        y = call(function, **inputs | {"x": call(function, **inputs)})
        wanted = [t for n, t in inputs.items() if n != "w_up"]
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)]

    for found, expected in zip(second(bottleneck_adapter), second(reference.bottleneck_adapter)):
        torch.testing.assert_close(found, expected)


def test_a_wider_scale_does_not_lift_y(path, use_path):
    call = Call(9, 20, 6, torch.bfloat16, torch.float32, scale="channel")
    assert call().dtype == torch.bfloat16
    use_path("reference")
    assert call().dtype == torch.bfloat16


def test_one_element_scale_of_any_rank(path):
    call = Call(9, 20, 6, scale="one")
    expected = call()
    call.inputs["scale"] = call.inputs["scale"].view(1, 1, 1)
    assert call().shape == (9, 20) and torch.equal(call(), expected)
    assert call.gradients()["scale"].shape == (1, 1, 1)


def test_precision_follows_both_of_pytorchs_settings():
    def precision(dtype=torch.float32):
        t = Call(4, 8, 2, dtype).inputs
        weights = Weights(t["w_down"], t["b_down"], t["w_up"], t["b_up"], None)
        card = target(t["x"].device)
        plan = forward.plan(forward_problem(t["x"], None, weights, Options("gelu", 1.0, dtype), True, card))
        (found,) = {launch.constants["PRECISION"] for launch in plan.launches}
        return found

    try:
        for setting, expected in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert precision() == expected
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("high")
        assert precision() == "tf32" and precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_rows_further_apart_than_32_bits_reach():
    t = torch.empty_strided((2, 4), (1 << 24, 1), device="meta")
    assert calls.rows(t).stride(0) == 4


@pytest.mark.parametrize("subset", [(), ("x",), ("w_up",), ("scale",), ("b_down", "b_up"), Needs._fields])
def test_backward_returns_what_is_asked_for_in_its_dtype(path, subset):
    """Autograd would cast and drop in silence; the torch.library op does not."""
    call = Call(33, 20, 6, torch.float32, torch.float64 if path == "cpu" else torch.float32, scale="channel")
    t = call.inputs
    for dtype in (torch.float32, torch.bfloat16):
        weights = Weights(t["w_down"], t["b_down"], t["w_up"], t["b_up"], t["scale"])
        options = Options("gelu", 1.0, dtype)
        z = torch.randn(33, 6).to(dtype)
        names = Needs._fields
        needs = Needs(*(n in subset for n in names))
        of_path = calls.CPUCalls(options) if path == "cpu" else calls.KernelCalls(options, target(z.device))
        found = of_path.backward(call.dy, t["x"], z, weights, needs, False)
        for name, gradient in zip(names, found, strict=True):
            assert (gradient is not None) == (name in subset), name
            assert gradient is None or (gradient.dtype, gradient.shape) == (t[name].dtype, t[name].shape), name


def test_row_strided_gradient(path):
    call = Call(65, 20, 6)
    for dy in (torch.randn(65, 37)[:, 3:23], torch.randn(20).expand(65, 20)):
        call.dy = dy
        check(call, path)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "x_dtype, residual_dtype", [(torch.float16, torch.float32), (torch.float32, torch.float16)], ids=str
)
def test_residual_of_another_dtype(path, x_dtype, residual_dtype, compiled):
    call = Call(65, 20, 6, x_dtype, own_residual=True, scale=0.5)
    call.inputs["residual"] = call.inputs["residual"].to(residual_dtype)
    call.dy = call.dy.float()
    torch.compiler.reset()
    function = bottleneck_adapter
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, found = call.gradients(reference.bottleneck_adapter), call.gradients(function)
    assert found["y"].dtype == torch.float32
    assert_two_times_rule(found, eager, call.oracle())


def test_tanh_near_zero(path):
    call = Call(33, 16, 16, torch.float32, activation="tanh", bias=False)
    call.inputs["w_down"] = call.inputs["w_up"] = torch.eye(16)
    call.inputs["x"] = torch.logspace(-6, 0, 33 * 16).view(33, 16)
    call.inputs["residual"] = torch.zeros(33, 16)
    found, expected = call(), torch.tanh(call.inputs["x"].double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_fp64_ignores_autocast(path):
    call = Call(9, 20, 6, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(call(), call(reference.bottleneck_adapter))
        assert call().dtype == torch.float64


def test_forward_mode_takes_the_reference():
    call = Call(9, 20, 6)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(call.inputs["x"], torch.ones(9, 20))
        found = torch.autograd.forward_ad.unpack_dual(call(x=x)).tangent
        expected = torch.autograd.forward_ad.unpack_dual(call(reference.bottleneck_adapter, x=x)).tangent
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1e-3, "one", "channel"])
def test_small_scale_in_fp16(use_path, scale):
    """scale · W_up would be subnormal in fp16."""
    use_path("cpu")
    call = Call(65, 48, 12, torch.float16, scale=scale)
    call.inputs["w_up"] = call.inputs["w_up"] * 1e-2
    if isinstance(scale, str):
        call.inputs["scale"] = call.inputs["scale"] * 1e-3
    wanted = ["w_down", "b_down"] if scale != "channel" else ["w_up"]
    check(call, "cpu", wanted)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("R", [8, 200])
def test_large_without_gradients(use_path, R, dtype, activation):
    """Without gradients oneDNN may apply the activation itself; NaN and infinities come out where eager has them."""
    use_path("cpu")
    call = Call(700, 130, R, dtype, activation=activation)
    call.inputs["x"][3:6, 5] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    oracle = call(reference.bottleneck_adapter, **{n: t.double() for n, t in call.inputs.items()})
    with torch.no_grad():
        found, eager = call(), call(reference.bottleneck_adapter)
    for where in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(where(found), where(eager))
    rows = slice(6, None)
    assert_two_times_rule({"y": found[rows]}, {"y": eager[rows]}, {"y": oracle[rows]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thin_bottleneck_large_enough_for_onednn(use_path, dtype):
    use_path("cpu")
    check(Call(700, 130, 8, dtype), "cpu")


@pytest.mark.parametrize("scale, wanted", [(1.0, None), (0.3, ["w_up"]), ("one", ["b_up"]), ("channel", ["scale"])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("repeated", [False, True])
def test_large_gradient(use_path, monkeypatch, repeated, dtype, scale, wanted):
    """Where a 16-bit dy is large, the CPU path takes db_up from the product that gives dW_up.

    Equal rows are the worst a sum over tokens can meet: every rounding goes the same way.
    """
    use_path("cpu")
    monkeypatch.setattr(cpu, "_LARGE", 1)
    call = Call(2049, 40, 24, dtype, scale=scale)
    if repeated:
        call.dy = call.dy[:1].expand_as(call.dy)
    check(call, "cpu", wanted)
    for gradient in call.gradients(wanted=wanted).values():
        assert gradient.is_contiguous() and gradient.untyped_storage().nbytes() == gradient.nbytes


@pytest.mark.parametrize("M", [9, 9000])
@pytest.mark.parametrize("which", ["x", "residual", "dy"])
def test_rows_that_overlap(path, which, M):
    """Tensor.unfold makes them; oneDNN refuses their strides in a weight gradient."""
    if path == "interpreter" and M > 9:
        pytest.skip("oneDNN is called from 2^16 elements on, and by the CPU path only")
    call = Call(M, 48, 12, own_residual=True)
    for step in (3, 0):
        overlapping = torch.randn(M * 3 + 48).unfold(0, 48, 3)[:M] if step else torch.randn(1, 48).expand(M, 48)
        if which == "dy":
            call.dy = overlapping
        else:
            call.inputs[which] = overlapping
        check(call, path)


@pytest.mark.parametrize("M, D, R", [(1025, 256, 32), (2500, 768, 64), (20000, 128, 16), (70000, 64, 8)])
@pytest.mark.parametrize("kind", ["random", "mean 1", "equal rows"])
def test_long_sums_over_tokens_in_fp32(use_path, kind, M, D, R):
    """Where the rows of x and dy are equal, every rounding of a sum goes the same way."""
    use_path("cpu")
    call = Call(M, D, R)
    if kind == "mean 1":
        call.inputs["x"], call.dy = call.inputs["x"] + 1, torch.ones_like(call.dy)
    if kind == "equal rows":
        call.inputs["x"], call.dy = (t[:1].expand(M, D).contiguous() for t in (call.inputs["x"], call.dy))
    check(call, "cpu", ["w_down", "w_up", "b_down", "b_up"])


def test_errors_in_fp32_do_not_grow_with_the_tokens():
    """Equal rows again: a sum over all tokens at once would lose a digit more for every few thousand of them."""
    a, b = torch.randn(1, 16), torch.randn(1, 40)
    errors = []
    for M in (1024, 1 << 17):
        rows = [t.expand(M, -1).contiguous() for t in (a, b)]
        errors.append(relative_error(cpu._outer(*rows), M * (a.double().t() @ b.double())))
    assert errors[1] <= 1.5 * errors[0] + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_errors_with_a_scale_of_each_channel_are_those_of_eager(use_path, dtype):
    """The gradients that the scale has a part in lose no more digits than eager's, over sixty calls of a few channels.

    Where W_up is scaled and rounded, instead of dy, or where the sums that the gradient of the scale consists of are
    rounded, errors are 1.3 to 1.7 times eager's.
    """
    use_path("cpu")
    squares = {}
    for seed in range(60):
        torch.manual_seed(seed)
        call = Call(66, 33, 4, dtype, activation="sigmoid", scale="channel")
        found, eager, oracle = call.gradients(), call.gradients(reference.bottleneck_adapter), call.oracle()
        for name in ("b_down", "b_up", "scale"):
            pair = squares.setdefault(name, [0.0, 0.0])
            pair[0] += relative_error(found[name], oracle[name]) ** 2
            pair[1] += relative_error(eager[name], oracle[name]) ** 2
    for name, (ours, eagers) in squares.items():
        assert ours <= 1.1**2 * eagers, f"{name}: {(ours / eagers) ** 0.5:.2f} times eager's"
