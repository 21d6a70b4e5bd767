"""Calls that PyTorch itself changes: torch.func, batched gradients, tracers, dispatch modes.

They have to give what PyTorch's own operations give, in eager mode and compiled.
"""

import contextlib
import itertools

import pytest
import torch
from helpers import Call, Named, Wrapper, relative_error
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from adapter_ops import BottleneckAdapter, backend, bottleneck_adapter, explain, reference
from adapter_ops.kernels.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")

# torch.func


def scalar(f):
    return lambda *t: f(*t).square().sum()


TRANSFORMS = {
    "grad": lambda f, x, w, v: torch.func.grad(scalar(f), argnums=(0, 1))(x, w),
    "vjp": lambda f, x, w, v: torch.func.vjp(f, x, w)[1](v),
    "jvp": lambda f, x, w, v: torch.func.jvp(f, (x, w), (v, torch.ones_like(w)))[1],
    "jacfwd": lambda f, x, w, v: torch.func.jacfwd(f, argnums=1)(x, w),
    "jacrev": lambda f, x, w, v: torch.func.jacrev(f, argnums=1)(x, w),
    "hessian": lambda f, x, w, v: torch.func.hessian(scalar(f), argnums=1)(x, w),
    "vmap": lambda f, x, w, v: torch.func.vmap(f, (0, None))(x, w),
    "gradients of each row": lambda f, x, w, v: torch.func.vmap(torch.func.grad(scalar(f), argnums=1), (0, None))(x, w),
    "jvp of grad": lambda f, x, w, v: torch.func.jvp(lambda x: torch.func.grad(scalar(f))(x, w), (x,), (v,))[1],
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("scale, own_residual", [(1.0, False), ("channel", True)])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_func_transforms(path, transform, scale, own_residual, compiled):
    call = Call(4, 6, 3, scale=scale)
    x, w, v = call.inputs["x"], call.inputs["w_up"], call.dy

    def transformed(function):
        return lambda x, w, v: TRANSFORMS[transform](
            lambda x, w: call(function, x=x, w_up=w, **({"residual": x.cos()} if own_residual else {})), x, w, v
        )

    torch.compiler.reset()
    found = transformed(bottleneck_adapter)
    if compiled:
        found = torch.compile(found, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(found(x, w, v), transformed(reference.bottleneck_adapter)(x, w, v))


def test_compiled_call_and_compiled_transform_do_not_share_code(path):
    """The same compiled function is run without and with a transform around it."""
    torch.compiler.reset()
    adapter = BottleneckAdapter(6, 3, init_std=0.5)
    x = torch.randn(4, 6)

    def run(x, tangent):
        return torch.func.jvp(adapter, (x,), (x,))[1] if tangent else adapter(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tangent in (False, True, False):
        torch.testing.assert_close(compiled(x, tangent), run(x, tangent))


def test_compiled_inside_a_dual_level(path):
    call = Call(4, 6, 3)

    def tangent(function):
        def run(x, v):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(call(function, x=forward_ad.make_dual(x, v))).tangent

        return run

    torch.compiler.reset()
    compiled = torch.compile(tangent(bottleneck_adapter), fullgraph=True, backend="aot_eager")
    x, v = call.inputs["x"], call.dy
    torch.testing.assert_close(compiled(x, v), tangent(reference.bottleneck_adapter)(x, v))


def test_an_exported_adapter_refuses_forward_mode(path):
    """The op has no tangents; without an error they would be zero."""
    adapter = BottleneckAdapter(6, 3, init_std=0.5)
    x = torch.randn(4, 6)
    exported = torch.export.export(adapter, (x,))
    with pytest.raises(RuntimeError, match=r"forward-mode.*run_decompositions"):
        torch.func.jvp(exported.module(), (x,), (x,))
    plain = exported.run_decompositions(torch._decomp.get_decompositions([torch.ops.adapter_ops.forward])).module()
    torch.testing.assert_close(torch.func.jvp(plain, (x,), (x,)), torch.func.jvp(adapter, (x,), (x,)))


# Batched gradients: forward has run on a fast path, and backward meets a dy with one more dimension.


def batched_and_looped(call, function, wanted):
    inputs = {n: t.detach().requires_grad_(n in wanted) for n, t in call.inputs.items()}
    y = call(function, **inputs)
    dys = torch.stack([call.dy, torch.randn_like(y), torch.zeros_like(y)]).to(y.dtype)
    leaves = [inputs[n] for n in wanted]
    batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    looped = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    return batched, [torch.stack(t) for t in zip(*looped)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batched_gradients_of_each_activation(path, activation, compiled):
    call = Call(9, 20, 6, activation=activation, own_residual=True, scale="channel")
    torch.compiler.reset()
    function = bottleneck_adapter
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    batched, looped = batched_and_looped(call, function, list(call.inputs))
    for b, e in zip(batched, looped):
        assert relative_error(b, e) <= 1e-6


@pytest.mark.parametrize("scale, own_residual", [(1.0, False), (0.3, True), ("one", False), ("channel", True)])
def test_batched_gradients_of_each_subset(path, scale, own_residual):
    call = Call(9, 20, 6, scale=scale, own_residual=own_residual)
    for wanted in itertools.chain(*(itertools.combinations(call.inputs, n) for n in (1, 2, len(call.inputs)))):
        for b, e in zip(*batched_and_looped(call, bottleneck_adapter, wanted)):
            assert relative_error(b, e) <= 1e-6


@pytest.mark.parametrize("dtype, parameter_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_batched_gradients_of_other_dtypes(path, dtype, parameter_dtype):
    call = Call(9, 20, 6, dtype, parameter_dtype, scale="one")
    eps = torch.finfo(torch.bfloat16).eps
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            pairs = zip(*batched_and_looped(call, bottleneck_adapter, list(call.inputs)))
        for b, e in pairs:
            assert b.dtype == e.dtype and relative_error(b, e.double()) < 2 * eps


def test_vectorised_jacobian_and_hessian(path):
    call = Call(3, 5, 2, torch.float64)
    names = list(call.inputs)

    def function(*t):
        return call(**dict(zip(names, t)))

    inputs = tuple(call.inputs.values())
    for of in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        f = function if of is torch.autograd.functional.jacobian else scalar(function)
        torch.testing.assert_close(of(f, inputs, vectorize=True), of(f, inputs))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_mode_over_backward(path, activation):
    """Backward is linear in dy, so its tangent is backward of dy's tangent."""
    call = Call(9, 20, 6, activation=activation)
    inputs = {n: t.requires_grad_() for n, t in call.inputs.items()}
    y, v = call(**inputs), torch.randn(9, 20)

    def pull(dy):
        return torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True)

    tangents = torch.func.jvp(pull, (call.dy,), (v,))[1]
    for found, expected in zip(tangents, pull(v)):
        torch.testing.assert_close(found, expected)


# Dispatch modes


class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_pytorchs_own_operations(path):
    call = Call(9, 20, 6)
    inputs = {n: t.requires_grad_() for n, t in call.inputs.items()}
    for around in (True, False):
        if not around:
            y = call(**inputs)
        with Record() as mode:
            if around:
                y = call(**inputs)
            y.sum().backward()
        assert mode.seen == {"aten"}


PRODUCTS = {"x": 2, "w_down": 2, "b_down": 1, "w_up": 1, "b_up": 0}  # of backward, of each gradient on its own


@pytest.mark.parametrize("wanted", [*([n] for n in PRODUCTS), list(PRODUCTS)], ids="-".join)
def test_flops_are_counted(path, wanted):
    """Forward has two products of 2·M·D·R operations, backward at most four."""
    call = Call(9, 20, 6)
    product = 2 * 9 * 20 * 6
    backward = (4 if len(wanted) > 1 else PRODUCTS[wanted[0]]) * product
    inputs = {n: t.requires_grad_(n in wanted) for n, t in call.inputs.items()}
    with FlopCounterMode(display=False) as counter:
        call(**inputs).sum().backward()
    assert counter.get_total_flops() == 2 * product + backward
    y = call(**inputs)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == backward
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(**inputs)
    assert counter.get_total_flops() == 2 * product


@pytest.mark.parametrize("wanted", [*([n] for n in PRODUCTS), list(PRODUCTS)], ids="-".join)
def test_flops_of_the_ops_are_counted(path, wanted):
    """An exported model calls the ops, which the counter knows."""
    adapter = BottleneckAdapter(20, 6)
    x = torch.randn(3, 3, 20)
    exported = torch.export.export(adapter, (x,)).module()
    product = 2 * 9 * 20 * 6
    names = {"down.weight": "w_down", "down.bias": "b_down", "up.weight": "w_up", "up.bias": "b_up"}
    for name, parameter in exported.named_parameters():
        parameter.requires_grad_(names[name] in wanted)
    with FlopCounterMode(display=False) as counter:
        y = exported(x.requires_grad_("x" in wanted))
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == (4 if len(wanted) > 1 else PRODUCTS[wanted[0]]) * product


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_fake_tensors(path, grad):
    """Inside of their mode, and passed on from it."""
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        x, *weights = (torch.empty(s, requires_grad=True) for s in ((1000, 768), (64, 768), (64,), (768, 64), (768,)))
        y = bottleneck_adapter(x, *weights)
        assert y.shape == (1000, 768)
        if grad:
            y.sum().backward()
            assert [t.grad.shape for t in (x, *weights)] == [t.shape for t in (x, *weights)]
    with torch.set_grad_enabled(grad):
        assert type(bottleneck_adapter(x, *weights)) is type(x)


# Tracers


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace(path, grad):
    adapter = BottleneckAdapter(64, 8, init_std=0.2)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(adapter, torch.randn(backend.SMALL // 64 + 1, 64))
    assert "bottleneck" not in str(traced.inlined_graph) and "Python" not in str(traced.inlined_graph)
    x = torch.randn(5, 64)
    torch.testing.assert_close(traced(x), adapter(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("scale", [0.5, "channel"])
def test_export_keeps_the_op_and_decomposes_it(path, scale, strict):
    adapter = BottleneckAdapter(20, 6, init_std=0.2, scale=scale)
    x = torch.randn(2, 3, 20)
    exported = torch.export.export(adapter, (x,), strict=strict)

    def namespaces(program):
        targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
        return {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}

    assert "adapter_ops" in namespaces(exported) and "adapter_ops" in namespaces(exported.run_decompositions())
    # What torch.onnx.export adds to the default decompositions.
    table = torch.export.default_decompositions()
    table.update({op: f for op, f in torch._decomp.decomposition_table.items() if hasattr(op, "_schema")})
    decomposed = exported.run_decompositions(table)
    assert "adapter_ops" not in namespaces(decomposed)
    for program in (exported, exported.run_decompositions(), decomposed):
        torch.testing.assert_close(program.module()(x), adapter(x))


def test_a_compiled_call_is_not_decomposed(path, monkeypatch):
    """Neither the op nor, where sizes are symbolic, its fake."""

    def decomposition(*arguments):
        raise AssertionError("the compiled call went through the decomposition")

    monkeypatch.setitem(torch._decomp.decomposition_table, torch.ops.adapter_ops.forward.default, decomposition)
    torch.compiler.reset()
    adapter = BottleneckAdapter(20, 6, init_std=0.2, scale=0.5)  # dynamic=True makes a symbol of the scale too
    compiled = torch.compile(adapter, dynamic=True, fullgraph=True, backend="aot_eager")
    for M in (3, 5):
        x = torch.randn(M, 20, requires_grad=True)
        torch.testing.assert_close(compiled(x), adapter(x))


def test_compiles_where_the_environment_says_ci(monkeypatch):
    """Inductor refuses there what has a decomposition and no lowering."""
    from torch._inductor import lowering

    op = torch.ops.adapter_ops.forward.default
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(lowering, "FALLBACK_ALLOW_LIST", lowering.FALLBACK_ALLOW_LIST.copy())
    monkeypatch.setattr("torch._inductor.graph.FALLBACK_ALLOW_LIST", lowering.FALLBACK_ALLOW_LIST)
    lowering.lowerings.pop(op, None)
    torch.compiler.reset()
    adapter = BottleneckAdapter(20, 6, init_std=0.2)
    x = torch.randn(7, 20)
    with torch._inductor.utils.fresh_inductor_cache():
        torch.testing.assert_close(torch.compile(adapter, fullgraph=True)(x), adapter(x))
    assert op in lowering.lowerings


# Why: `explain` gives the reason that the call acts on.


def test_explain_gives_the_reason():
    x, w = torch.zeros(4, 20), torch.zeros(6, 20)
    assert explain(x, w).name != "reference"
    with forward_ad.dual_level():
        assert "forward-mode" in explain(x, w).reason
    with Record():
        assert explain(x, w) == backend._MODE
    seen = []
    torch.func.vmap(lambda x: seen.append(explain(x, w)) or x)(x)
    torch.jit.trace(lambda x: seen.append(explain(x, w)) or x, x)
    assert seen[:2] == [backend._FUNC, backend._TRACE]
    for operand, kind in (
        (x.as_subclass(Named), "Named"),
        (Wrapper(x), "Wrapper"),
        (FakeTensorMode().from_tensor(x), "FakeTensor"),
        (x.to_sparse_csr(), "torch.sparse_csr"),
        (x.to_mkldnn(), "torch._mkldnn"),
    ):
        for path in (explain(operand, w), explain(torch.zeros(4, 4), operand)):
            assert path.name == "reference" and kind in path.reason
    assert "nested" in explain(torch.nested.nested_tensor([x, x]), w).reason
