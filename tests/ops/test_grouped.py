"""Adapters of many tasks in one batch: each row has what its task's own adapter gives it, forward and backward."""

import itertools

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_two_times_rule
from helpers_grouped import NAMES, batch, loop, results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from adapter_ops import bottleneck_adapter, grouped, grouped_bottleneck_adapter
from adapter_ops.grouped import formula, forward_op
from adapter_ops.kernels.problem import Options, Weights

# The CPU path; tests/kernels/test_grouped_kernels.py has the kernels.
pytestmark = pytest.mark.usefixtures("aten")


@pytest.mark.parametrize("scale", [None, "task", "channel", 0.5])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_and_gradients_are_those_of_the_tasks_alone(scale, residual, bias):
    given = batch(scale=scale if isinstance(scale, str) else None)
    if not bias:
        given |= {"b_down": None, "b_up": None}
    given = {n: t for n, t in given.items() if t is not None}
    nothing = {} if bias else {"b_down": None, "b_up": None}
    options = {"activation": "silu"} | nothing | ({"scale": scale} if isinstance(scale, float) else {})
    if residual:
        given["residual"] = torch.randn_like(given["x"])
    dy = torch.randn_like(given["x"])
    expected = results(loop, given, dy, **options)
    for name, t in results(grouped_bottleneck_adapter, given, dy, **options).items():
        torch.testing.assert_close(t, expected[name], msg=name)
    if bias:
        assert not expected["w_up"][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "sigmoid"])
def test_two_times_rule(dtype, activation):
    given = batch(M=300, T=4, D=40, R=9, dtype=dtype)
    dy = torch.randn(300, 40)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    eager = results(loop, given, dy, activation=activation)
    oracle = results(loop, wide, dy.to(dtype), activation=activation)
    assert_two_times_rule(results(grouped_bottleneck_adapter, given, dy, activation=activation), eager, oracle)


CASES = {
    "one task": [0] * 9,
    "no task": [-1] * 9,
    "a row a task": [4, 0, 3, 1, 2],
    "fewer rows than tasks": [3, 3],
    "sorted": [-1, 0, 0, 2, 2, 4],
    "no rows": [],
}


@pytest.mark.parametrize("ids", CASES.values(), ids=CASES)
def test_edges(ids):
    given = batch(ids=torch.tensor(ids, dtype=torch.int64))
    dy = torch.randn_like(given["x"])
    found = results(grouped_bottleneck_adapter, given, dy)
    again = results(grouped_bottleneck_adapter, given, dy)
    assert all(torch.equal(found[n], again[n]) for n in found)
    if ids:
        for name, t in results(loop, given, dy).items():
            torch.testing.assert_close(found[name], t, msg=name)
    else:
        assert found["y"].shape == (0, 12) and not any(found[n].any() for n in NAMES)
    if ids and set(ids) == {-1}:
        assert torch.equal(found["y"], given["x"]) and torch.equal(found["x"], dy)


def test_one_task_is_the_single_adapter():
    given = batch(M=20, T=1, ids=[0] * 20)
    single = bottleneck_adapter(given["x"], *(given[n][0] for n in NAMES))
    torch.testing.assert_close(grouped_bottleneck_adapter(**given), single)


def test_a_row_without_a_task_may_hold_anything():
    given = batch(ids=[0, -1, 2])
    given["x"][1] = float("nan")
    for function in (grouped_bottleneck_adapter, by_formula):
        found = results(function, given, torch.ones(3, 12))
        assert found["y"][1].isnan().all() and all(found[n].isfinite().all() for n in NAMES)
        assert torch.equal(found["x"][1], torch.ones(12).double())


def test_a_task_for_each_sequence():
    given = batch(ids=[2, -1, 0])
    x = torch.randn(3, 2, 5, 12).double()
    weights = [given[n] for n in NAMES]
    y = grouped_bottleneck_adapter(x, given["task_ids"], *weights)
    rows = given["task_ids"].int().repeat_interleave(10)
    assert torch.equal(y, grouped_bottleneck_adapter(x.reshape(30, 12), rows, *weights).view_as(x))
    assert torch.equal(y, grouped_bottleneck_adapter(x, rows.view(3, 2, 5), *weights))
    assert torch.equal(y[1], x[1])


@pytest.mark.parametrize("activation", ["gelu", "sigmoid"])
def test_bottlenecks_of_different_sizes(activation):
    given = batch(T=3, R=6, ids=[0, 1, 2, 1, 0, 2, 2])
    sizes = torch.tensor([6, 2, 0])
    for t, size in enumerate(sizes.tolist()):
        given["w_down"][t, size:], given["b_down"][t, size:], given["w_up"][t, :, size:] = [float("nan")] * 3
    dy = torch.randn_like(given["x"])
    found = results(grouped_bottleneck_adapter, given, dy, sizes=sizes, activation=activation)
    for m, t in enumerate(given["task_ids"].tolist()):
        R = sizes[t]
        own = given["w_down"][t, :R], given["b_down"][t, :R], given["w_up"][t, :, :R], given["b_up"][t]
        x = given["x"][m : m + 1]
        y = bottleneck_adapter(x, *own, activation=activation) if R else x + own[3]
        torch.testing.assert_close(found["y"][m : m + 1], y)
    for t, size in enumerate(sizes.tolist()):
        for rest in (found["w_down"][t, size:], found["b_down"][t, size:], found["w_up"][t, :, size:]):
            assert not rest.any()
        assert found["w_up"][t, :, :size].all()


def by_formula(x, task_ids, w_down, b_down, w_up, b_up, scale=None, residual=None, activation="gelu"):
    weights = Weights(w_down, b_down, w_up, b_up, scale)
    return formula(x, task_ids, residual, weights, Options(activation, 1.0, x.dtype))


def test_the_formula_is_the_same():
    given = batch(scale="channel") | {"residual": torch.randn(37, 12).double()}
    dy = torch.randn_like(given["x"])
    expected = results(loop, given, dy)
    for name, t in results(by_formula, given, dy).items():
        torch.testing.assert_close(t, expected[name], msg=name)


@pytest.mark.parametrize("frozen", [(), ("x",), ("w_down", "b_down"), ("x", "w_up", "b_up", "scale")])
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck_and_gradgradcheck(frozen, residual):
    given = batch(M=6, T=3, D=5, R=2, ids=[2, -1, 0, 2, 2, 0], scale="task")
    if residual:
        given["residual"] = torch.randn(6, 5).double()
    names = [n for n in given if n not in ("task_ids", *frozen)]
    tensors = [given[n].requires_grad_() for n in names]
    call = lambda *values: grouped_bottleneck_adapter(**given | dict(zip(names, values)))  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors) and torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_autocast_and_mixed_dtypes(parameters):
    given = batch(M=64, dtype=torch.float32)
    given |= {n: given[n].to(parameters) for n in NAMES}
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_bottleneck_adapter(**given)
        expected = loop(**given, function=bottleneck_adapter)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_opcheck():
    given = batch(M=11, dtype=torch.float32, scale="task")
    inputs = [given[n].requires_grad_() for n in ("w_down", "b_down", "w_up", "b_up", "scale")]
    options = ("gelu", 1.0, torch.float32, True)
    torch.library.opcheck(forward_op, (given["x"].requires_grad_(), given["task_ids"], None, *inputs, *options))


def test_compiled_without_a_break_or_a_recompilation_when_the_mix_changes():
    given = batch(M=24, dtype=torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(grouped_bottleneck_adapter, fullgraph=True, backend=counter)
    for ids in (torch.randint(-1, 5, (24,)), torch.zeros(24, dtype=torch.int64), torch.arange(24) % 5):
        given["task_ids"] = ids
        dy = torch.randn(24, 12)
        expected = results(grouped_bottleneck_adapter, given, dy)
        for name, t in results(compiled, given, dy).items():
            torch.testing.assert_close(t, expected[name], msg=name)
    assert counter.frame_count == 1


def test_transforms():
    given = batch(M=6)
    rest = {n: t for n, t in given.items() if n != "x"}
    call = lambda x: grouped_bottleneck_adapter(x, **rest)  # noqa: E731
    jacobian = torch.func.jacrev(call)(given["x"])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(call, given["x"]))
    torch.testing.assert_close(torch.func.jacfwd(call)(given["x"]), jacobian)


def changed(**others):
    return {**batch(M=4, ids=[0, 1, 2, -1]), **others}


BAD = [
    (dict(x=None), TypeError, "x must be a tensor, not NoneType"),
    (
        dict(task_ids=torch.zeros(4)),
        TypeError,
        "task_ids has dtype torch.float32, expected one of torch.int32",
    ),
    (dict(task_ids=torch.zeros(3).long()), ValueError, r"task_ids has shape \(3,\), expected the first .*\(4, 12\)"),
    (dict(task_ids=torch.zeros(4, 12).long()), ValueError, r"task_ids has shape \(4, 12\)"),
    (dict(task_ids=torch.tensor([0, 5, 1, 1])), ValueError, "task_ids has values from 0 to 5, expected -1 to 4"),
    (dict(task_ids=torch.tensor([0, -2, 1, 1])), ValueError, "task_ids has values from -2 to 1, expected -1 to 4"),
    (dict(w_down=torch.zeros(4, 12).double()), ValueError, r"w_down has shape \(4, 12\), expected \[tasks, bottleneck"),
    (dict(x=torch.zeros(4, 13).double()), ValueError, r"x has shape \(4, 13\), w_down \(5, 4, 12\) expects"),
    (dict(w_up=torch.zeros(5, 4, 12).double()), ValueError, r"w_up has shape \(5, 4, 12\), expected \(5, 12, 4\)"),
    (dict(b_up=torch.zeros(12).double()), ValueError, r"b_up has shape \(12,\), expected \(5, 12\)"),
    (dict(b_up=torch.zeros(5, 12)), TypeError, "b_up has dtype torch.float32, w_down has torch.float64"),
    (dict(scale=torch.ones(12).double()), ValueError, r"scale has shape \(12,\), expected \(5,\) or \(5, 12\)"),
    (dict(scale=float("inf")), ValueError, "scale is inf, must be finite"),
    (dict(residual=torch.zeros(4, 11)), ValueError, r"residual has shape \(4, 11\), expected \(4, 12\)"),
    (dict(sizes=torch.tensor([1, 2, 3, 4, 5])), ValueError, "sizes has values from 1 to 5, expected 0 to 4"),
    (dict(activation="gelo"), ValueError, "unknown activation 'gelo'"),
    (dict(w_up=torch.zeros(5, 12, 4, device="meta").double()), ValueError, "w_up is on meta, x is on cpu"),
]


@pytest.mark.parametrize("others, error, message", BAD)
def test_bad_input(others, error, message):
    with pytest.raises(error, match=message):
        grouped_bottleneck_adapter(**changed(**others))


def test_another_backend_may_be_required(monkeypatch):
    monkeypatch.setenv("ADAPTER_OPS_REQUIRE", "triton")
    with pytest.raises(RuntimeError, match="but this call would take the backend 'cpu': "):
        grouped_bottleneck_adapter(**changed())
    monkeypatch.setenv("ADAPTER_OPS_REQUIRE", "cpu")
    grouped_bottleneck_adapter(**changed())


def test_every_order_of_few_rows():
    given = batch(M=5, ids=[0, 1, 1, -1, 4])
    expected = grouped_bottleneck_adapter(**given)
    for order in itertools.permutations(range(5)):
        shuffled = given | {"x": given["x"][list(order)], "task_ids": given["task_ids"][list(order)]}
        torch.testing.assert_close(grouped_bottleneck_adapter(**shuffled), expected[list(order)])


@pytest.mark.parametrize("ids", [[0, 5, 1, 1], [0, -2, 1, 1]])
def test_a_compiled_call_checks_its_ids_when_it_runs(ids):
    torch._dynamo.reset()
    compiled = torch.compile(grouped_bottleneck_adapter, fullgraph=True, backend="aot_eager")
    compiled(**changed())
    with pytest.raises(ValueError, match=f"task_ids has values from {min(ids)} to {max(ids)}, expected -1 to 4"):
        compiled(**changed(task_ids=torch.tensor(ids)))


def test_a_compiled_call_takes_the_backend_that_is_required(monkeypatch):
    monkeypatch.setenv("ADAPTER_OPS_REQUIRE", "triton")
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="but this call would take the backend 'cpu': "):
        torch.compile(grouped_bottleneck_adapter, fullgraph=True, backend="aot_eager")(**changed())


def test_flops_of_the_ops_are_counted():
    given = batch(M=11)
    inputs = [given["x"].requires_grad_(), given["task_ids"], None, *(given[n].requires_grad_() for n in NAMES), None]
    with FlopCounterMode(display=False) as counter:
        y = forward_op(*inputs, "gelu", 1.0, torch.float64, True)[0]
    assert counter.get_total_flops() == 2 * 2 * 11 * 12 * 4
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 11 * 12 * 4


@pytest.mark.parametrize("M, capturing, sorts", [(8, False, False), (4096, False, True), (4096, True, False)])
def test_a_gpu_without_kernels_gathers_no_more_than_it_can_hold(monkeypatch, M, capturing, sorts):
    monkeypatch.setattr(grouped, "op_calls", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with FakeTensorMode():
        x, w_down, w_up = (torch.empty(s, device="cuda") for s in ((M, 768), (3, 64, 768), (3, 768, 64)))
    weights = Weights(w_down, None, w_up, None, None)
    assert grouped._has_implementation(x, None, weights, Options("gelu", 1.0, x.dtype)) is sorts
