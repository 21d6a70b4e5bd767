"""The paths compute the same thing: values, gradients, second gradients, every subset of what is frozen."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import DTYPES, SUBSETS, Call, as_function, assert_two_times_rule, check, check_exact, slack

from adapter_ops import bottleneck_adapter, explain, ops, reference
from adapter_ops.kernels.activations import ACTIVATIONS
from adapter_ops.kernels.plan import INTERPRETED

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("M", [0, 1, 63, 129])
@pytest.mark.parametrize("R", [1, 8, 12, 24, 64, 96, 200, 300])
@pytest.mark.parametrize("D", [16, 100, 384, 768])
def test_sizes(path, D, R, M):
    check(Call(M, D, R), path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(path, activation, dtype):
    check(Call(65, 48, 12, dtype, activation=activation), path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("own_residual", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3, "one", "channel"])
def test_scale_residual_bias(path, scale, own_residual, bias, dtype):
    check(Call(130, 40, 24, dtype, scale=scale, own_residual=own_residual, bias=bias), path)


@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda s: "-".join(s) or "none")
def test_frozen_inputs(path, wanted):
    check(Call(70, 36, 5), path, wanted)
    check(Call(70, 36, 5, scale="channel", own_residual=True), path, [*wanted, "scale"])
    check(Call(70, 36, 5, scale="one", own_residual=True), path, [*wanted, "residual"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_every_subset(path, activation):
    for wanted in SUBSETS[1:]:
        function, inputs = as_function(Call(3, 5, 2, torch.float64, activation=activation), wanted)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("scale", [0.5, "one", "channel"])
@pytest.mark.parametrize("own_residual", [False, True])
def test_gradcheck_exhaustive(path, scale, own_residual):
    call = Call(5, 7, 3, torch.float64, scale=scale, own_residual=own_residual)
    function, inputs = as_function(call, list(call.inputs))
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradgradcheck(path, activation):
    call = Call(3, 5, 2, torch.float64, activation=activation)
    function, inputs = as_function(call, list(call.inputs))
    assert torch.autograd.gradgradcheck(function, inputs)


def test_fp64(path):
    call = Call(65, 100, 24, torch.float64, scale="channel", own_residual=True)
    check(call, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_parameters(path, dtype):
    """fp32 parameters under 16-bit activations: autocast's values, fp32 gradients."""
    call = Call(65, 96, 12, dtype, torch.float32, scale="channel")

    def eager(call):
        with torch.autocast(call.dy.device.type, dtype):
            return call.gradients(reference.bottleneck_adapter)

    found = call.gradients()
    assert found["y"].dtype == found["x"].dtype == dtype and found["w_up"].dtype == torch.float32
    check(call, path, eager=eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(path, dtype):
    """fp32 x under autocast: products in 16 bits, the residual and y stay fp32."""
    call = Call(65, 96, 12, torch.float32, own_residual=True)
    with torch.autocast(call.dy.device.type, dtype):
        eager, found = call.gradients(reference.bottleneck_adapter), call.gradients()
    assert found["y"].dtype == torch.float32
    assert_two_times_rule(found, eager, call.oracle(), slack(path, dtype))


def test_products_that_are_exact(path):
    """Small integers: every sum is exact, so any slip of an index or a mask shows in a bit."""
    call = Call(131, 50, 21, torch.float32, activation="relu")
    check_exact(call)


def test_repeat_gives_equal_bits(path):
    call = Call(200, 100, 12, scale="channel")
    first, second = call.gradients(), call.gradients()
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("own_residual", [False, True])
@pytest.mark.parametrize("strides", [(37, 37), (40, 56), (40, 37), (37, 48)])
def test_row_strided(path, own_residual, strides):
    """The kernels are told of strides that are multiples of 8."""
    call = Call(66, 20, 6, own_residual=own_residual)
    strided = {}
    for name, stride in zip(("x", "residual")[: 1 + own_residual], strides):
        wide = torch.randn(66, stride)
        wide[:, 3:23] = call.inputs[name]
        strided[name] = wide[:, 3:23]
    dense = call.gradients()
    call.inputs |= strided
    for name, t in call.gradients().items():
        if path != "cpu":
            assert torch.equal(t, dense[name]), name
        else:  # BLAS takes another way through strided rows
            torch.testing.assert_close(t, dense[name])


def test_dense_in_another_order(path):
    """Transposed batches and a last dimension that is not dense give what their contiguous copies give."""
    call = Call(1, 20, 6)
    x = torch.randn(3, 5, 20)
    for view in (x.transpose(0, 1), x.permute(1, 0, 2)[:, ::2], torch.randn(20, 7).t()):
        torch.testing.assert_close(call(x=view), call(x=view.contiguous()))
        assert call(x=view).shape == view.shape


@pytest.mark.parametrize("shape", [(20,), (7, 20), (2, 3, 4, 20), (2, 0, 20)])
def test_leading_dimensions(path, shape):
    call = Call(1, 20, 6)
    x = torch.randn(shape, requires_grad=True)
    y = call(x=x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    torch.testing.assert_close(y, call(reference.bottleneck_adapter, x=x))


def test_stride_zero_gradient(path):
    call = Call(65, 20, 6)
    call.dy = torch.ones(1, 1).expand(65, 20)
    check(call, path)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_come_out_where_eager_puts_them(path, value, activation):
    call = Call(70, 20, 6, activation=activation)
    call.inputs["x"][3, 5] = value
    # On the CPU eager's fp32 gelu(inf) is NaN (oneDNN); on a GPU, and in fp64, it is inf, and the kernels follow that.
    dtype = None if path == "cpu" else torch.float64
    eager, found = call.gradients(reference.bottleneck_adapter, dtype=dtype), call.gradients()
    for name in eager:
        for where in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(where(found[name]), where(eager[name])), (name, where)


def test_inputs_are_not_written(path):
    call = Call(65, 20, 6, own_residual=True, scale="channel")
    before = {n: (t.clone(), t._version) for n, t in call.inputs.items()}
    dy = call.dy.clone()
    call.gradients()
    for name, (copy, version) in before.items():
        assert torch.equal(call.inputs[name], copy) and call.inputs[name]._version == version, name
    assert torch.equal(call.dy, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_for_backward_is_x_and_z(path, dtype):
    call = Call(65, 20, 6, dtype)
    saved = []
    inputs = {n: t.requires_grad_() for n, t in call.inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    parameters = {t.data_ptr() for n, t in inputs.items() if n != "x"}
    activations = [t for t in saved if t is not None and t.data_ptr() not in parameters]
    assert [tuple(t.shape) for t in activations] == [(65, 20), (65, 6)]
    assert all(t.dtype == dtype for t in activations)
    assert activations[0].data_ptr() == inputs["x"].data_ptr()


def test_a_written_input_is_noticed(path):
    call = Call(65, 20, 6)
    y = call(w_up=call.inputs["w_up"].requires_grad_())
    with torch.no_grad():
        call.inputs["w_up"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_gradients_through_a_penalty(path):
    """A gradient penalty, as users write it, against the reference."""

    def penalty(function):
        call_inputs = {n: t.detach().requires_grad_() for n, t in call.inputs.items()}
        y = call(function, **call_inputs)
        (dx,) = torch.autograd.grad(y.square().sum(), call_inputs["x"], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(call_inputs.values()), materialize_grads=True)

    call = Call(9, 20, 6, scale="one")
    for found, expected in zip(penalty(bottleneck_adapter), penalty(reference.bottleneck_adapter)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_compile_gives_eagers_values_and_gradients(path):
    from adapter_ops import BottleneckAdapter

    torch.compiler.reset()
    model = torch.nn.Sequential(
        BottleneckAdapter(20, 6, init_std=0.2),
        BottleneckAdapter(20, 3, init_std=0.2, scale="channel"),
    )
    compiled = torch.compile(model, fullgraph=True)
    for shape in ((2, 33, 20), (2, 50, 20)):
        x = torch.randn(shape, requires_grad=True)
        expected, found = model(x), compiled(x)
        torch.testing.assert_close(found, expected)
        inputs = [x, *model.parameters()]
        for f, e in zip(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
            torch.testing.assert_close(f, e)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected)
    with torch.autocast(x.device.type, torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("scale", [0.5, "channel"])
@pytest.mark.parametrize("own_residual", [False, True])
def test_opcheck(path, scale, own_residual):
    call = Call(9, 20, 6, scale=scale, own_residual=own_residual)
    t = {n: v.requires_grad_() for n, v in call.inputs.items()}
    weights = (t["w_down"], t["b_down"], t["w_up"], t["b_up"], t.get("scale"))
    options = ("gelu", 1.0 if isinstance(scale, str) else scale, torch.float32)
    torch.library.opcheck(ops.forward_op, (t["x"], t.get("residual"), *weights, *options, True))
    frozen = [w if w is None else w.detach() for w in weights]
    z = torch.randn(9, 6)
    needs = [True, True, False, True, True, isinstance(scale, str)]
    torch.library.opcheck(ops.backward_op, (call.dy, t["x"].detach(), z, *frozen, *options, needs, not own_residual))


def test_export(path):
    from adapter_ops import BottleneckAdapter

    model = torch.nn.Sequential(BottleneckAdapter(20, 6, init_std=0.2))
    x = torch.randn(3, 20)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_func_transforms_take_the_reference():
    call = Call(9, 20, 6)
    y = torch.func.vmap(lambda row: call(x=row))(call.inputs["x"])
    torch.testing.assert_close(y, call())
    g = torch.func.grad(lambda x: call(x=x).sum())(call.inputs["x"])
    call.dy = torch.ones_like(call.dy)
    torch.testing.assert_close(g, call.gradients()["x"])


# Which path, and why.


NOT_INTERPRETED = """
import torch
from adapter_ops import explain
from adapter_ops.backend import SMALL, SMALL_INFERENCE
x, w = torch.zeros(4, 20), torch.zeros(6, 20)
assert explain(x, w).name == "reference" and "small" in explain(x, w).reason
with torch.no_grad():
    assert explain(x, w).name == "reference"
    assert explain(torch.zeros(SMALL_INFERENCE // 20 + 1, 20), w)[:2] == ("cpu", "the tensors are on the CPU")
assert explain(torch.zeros(SMALL // 20 + 1, 20), w).name == "cpu"
"""


def test_backend_of_cpu_tensors():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", NOT_INTERPRETED], env=environment, check=True)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is off")
def test_backend_of_cpu_tensors_in_the_interpreter():
    x, w = torch.zeros(4, 20), torch.zeros(6, 20)
    assert explain(x, w).name == "triton" and "TRITON_INTERPRET" in explain(x, w).reason
    assert explain(torch.zeros(4, 20), torch.zeros(5000, 20)).name == "triton"


def test_backend_of_other_tensors():
    path = explain(torch.zeros(4, 20, device="meta"), torch.zeros(6, 20, device="meta"))
    assert path.name == "reference" and "'meta'" in path.reason
    path = explain(torch.zeros(4, 1 << 16, device="cpu"), torch.zeros(1, 1).expand(1 << 15, 1 << 16))
    assert path.name == "reference" and "2^31" in path.reason


def test_required_path(monkeypatch):
    x, w = torch.zeros(4, 20, device="meta"), torch.zeros(6, 20, device="meta")
    monkeypatch.setenv("ADAPTER_OPS_REQUIRE", "reference")
    assert explain(x, w).name == "reference"
    monkeypatch.setenv("ADAPTER_OPS_REQUIRE", "triton")
    with pytest.raises(RuntimeError, match=r"ADAPTER_OPS_REQUIRE=triton.*'reference'.*device type 'meta'"):
        bottleneck_adapter(x, w, None, w.t(), None)


def test_a_required_path_that_there_is_not(monkeypatch):
    """`explain` answers all the same; the call says which names there are."""
    x, w = torch.zeros(4, 20), torch.zeros(6, 20)
    free = explain(x, w)
    for required in ("tritn", "triton", "reference", "cpu"):
        monkeypatch.setenv("ADAPTER_OPS_REQUIRE", required)
        assert explain(x, w) == free
    monkeypatch.setenv("ADAPTER_OPS_REQUIRE", "tritn")
    compiled = torch.compile(bottleneck_adapter, backend="aot_eager")
    for function in (bottleneck_adapter, compiled):
        with pytest.raises(
            RuntimeError, match="ADAPTER_OPS_REQUIRE=tritn names no backend; known: triton, cpu, reference"
        ):
            function(x, w, None, w.t(), None)


def test_a_required_path_under_a_transform(monkeypatch):
    x, w = torch.zeros(4, 20), torch.zeros(6, 20)
    monkeypatch.setenv("ADAPTER_OPS_REQUIRE", "triton")
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="eager")):
        with pytest.raises(Exception, match=r"ADAPTER_OPS_REQUIRE=triton.*'reference'.*torch.func"):
            wrap(torch.func.vmap(lambda x: bottleneck_adapter(x, w, None, w.t(), None)))(x)


def test_small_cpu_call_equals_the_cpu_path(use_path):
    call = Call(9, 20, 6)
    use_path("cpu")
    lean = call.gradients()
    use_path("reference")
    for name, t in call.gradients().items():
        torch.testing.assert_close(t, lean[name])


def write_add(y, other):
    y += 1
    return y


IN_PLACE = {
    "y += 1": write_add,
    "relu_": lambda y, other: y.relu_(),
    "h += y": lambda y, other: other.add_(y),
    "y += y": lambda y, other: y.add_(y.detach()),
    "y *= h": lambda y, other: y.mul_(other),
    "a view": lambda y, other: (y[..., 1:].zero_(), y)[1],
}


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("shape", [(9, 20), (3, 3, 20), (20,)], ids=str)
@pytest.mark.parametrize("write", IN_PLACE)
def test_the_output_may_be_written(path, write, shape, backend):
    """As a residual block does by h += adapter(h), and an activation with inplace=True."""
    call = Call(1, 20, 6)
    call.inputs["x"] = torch.randn(shape)
    torch.compiler.reset()

    def run(function):
        inputs = {n: t.detach().requires_grad_() for n, t in call.inputs.items()}
        y = IN_PLACE[write](call(function, **inputs), inputs["x"].sin())
        return y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))

    function = bottleneck_adapter if backend is None else torch.compile(bottleneck_adapter, backend=backend)
    for found, expected in zip(run(function), run(reference.bottleneck_adapter)):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert (call(function) + 1).equal(write_add(call(function), None))
