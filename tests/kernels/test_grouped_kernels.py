"""The kernels with an index: each row has what its task's own adapter gives it, forward and backward."""

import contextlib
import itertools

import pytest
import torch
import torch._dynamo.testing
from helpers import DTYPES, assert_two_times_rule, slack
from helpers_grouped import NAMES, batch, by_task, results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from adapter_ops import bottleneck_adapter, grouped, grouped_bottleneck_adapter, ops
from adapter_ops.kernels import backward, forward
from adapter_ops.kernels import grouped as tables
from adapter_ops.kernels.activations import ACTIVATIONS
from adapter_ops.kernels.configs import blocks
from adapter_ops.kernels.plan import INTERPRETED, Launch, target
from adapter_ops.kernels.problem import Needs, Options, Target, Weights, backward_problem, forward_problem

pytestmark = [
    pytest.mark.usefixtures("one_thread", "kernels"),
    pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is off: the kernels are compiled"),
]

# Sizes that take the pair of split.py, the fused kernel, and backward with R in blocks; D and R fill no tile.
FORMS = {"split": (37, 21, 5), "fused": (90, 70, 11), "blocks of R": (9, 5, 130)}


@pytest.fixture
def kernels(use_path):
    use_path("triton")


def sized(form, **others):
    M, D, R = FORMS[form]
    return batch(**{"M": M, "T": 3, "D": D, "R": R, **others})


def check(given, dy, **options):
    expected = results(by_task, given, dy, **options)
    found = results(grouped_bottleneck_adapter, given, dy, **options)
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, msg=name, equal_nan=True)
    return found


def test_the_sizes_take_the_forms_they_are_for():
    for form, (M, D, R) in FORMS.items():
        x, weights = torch.zeros(M, D), Weights(torch.zeros(5, R, D), None, torch.zeros(5, D, R), None, None)
        options, card = Options("gelu", 1.0, torch.float32), target(x.device)
        made = forward.plan(forward_problem(x, None, weights, options, True, card))
        assert made.form == ("fused" if form == "fused" else "split")
        needs = Needs(*[True] * 5, False)
        made = backward.plan(backward_problem(x, x, torch.zeros(M, R), weights, options, needs, True, card))
        names = [launch.kernel.__name__ for launch in made.launches]
        assert ("expand_kernel" in names) == (form == "blocks of R"), names


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "scale, residual, bias", [(None, False, True), ("task", True, True), ("channel", False, False)]
)
def test_rows_and_gradients_are_those_of_the_tasks_alone(form, scale, residual, bias):
    given = sized(form, scale=scale)
    nothing = {} if bias else {"b_down": None, "b_up": None}
    given = {n: t for n, t in given.items() if n not in nothing}
    if residual:
        given["residual"] = torch.randn_like(given["x"])
    check(given, torch.randn_like(given["x"]), activation="silu", **nothing)


@pytest.mark.parametrize("form", ["split", "fused"])
def test_a_number_as_scale_of_the_products_alone(form):
    given = sized(form) | {"residual": torch.randn(FORMS[form][:2]).double()}
    check(given, torch.randn_like(given["x"]), scale=-0.3)


def two_times_rule(dtype, parameters=None, M=37, D=40, R=9, activation="gelu"):
    given = batch(M=M, T=3, D=D, R=R, dtype=dtype)
    given |= {n: given[n].to(parameters or dtype) for n in NAMES}
    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    dy = torch.randn(M, D).to(dtype)
    calls = (grouped_bottleneck_adapter, given), (by_task, given), (by_task, wide)
    found, eager, oracle = (results(function, inputs, dy, activation=activation) for function, inputs in calls)
    assert_two_times_rule(found, eager, oracle, slack("interpreter", dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_times_rule_of_activations(activation):
    for dtype in DTYPES:
        two_times_rule(dtype, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_times_rule_of_the_fused_kernel(dtype):
    two_times_rule(dtype, M=150)
    two_times_rule(dtype, M=70, D=33, R=130, activation="sigmoid")


def test_autocast_with_a_residual_in_float32():
    given = batch(M=37, dtype=torch.float32) | {"residual": torch.randn(37, 12)}
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_bottleneck_adapter(**given)
        expected = by_task(**given)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


CASES = {
    "one task": ([0] * 9, 1),
    "no task": ([-1] * 9, 2),
    "a row a task": ([4, 0, 3, 1, 2], 5),
    "more tasks than a block of the table": ([69, 3, 69, 64, 63, -1, 3], 70),
    "fewer rows than tasks": ([3, 3], 5),
    "sorted": ([-1, 0, 0, 2, 2, 4], 5),
    "tiles of one task and a row": ([1] * 65 + [0, -1] + [2] * 64, 4),
    "tiles without a task": ([-1] * 70 + [1] * 3, 2),
    "no rows": ([], 3),
}


@pytest.mark.parametrize("case", CASES)
def test_edges(case):
    ids, T = CASES[case]
    dtype = torch.int64 if T == 5 else torch.int32
    given = batch(T=T, D=5, R=3, ids=torch.tensor(ids, dtype=dtype)[torch.randperm(len(ids))])
    dy = torch.randn_like(given["x"])
    found = check(given, dy)
    again = results(grouped_bottleneck_adapter, given, dy)
    assert all(torch.equal(found[n], again[n]) for n in found)
    if set(ids) == {-1}:
        assert torch.equal(found["y"], given["x"]) and torch.equal(found["x"], dy)


@pytest.mark.parametrize("form", ["split", "fused"])
def test_repeat_gives_equal_bits(form):
    given = sized(form, dtype=torch.float32, scale="channel")
    dy = torch.randn_like(given["x"])
    first, again = (results(grouped_bottleneck_adapter, given, dy) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_one_task_has_the_bits_of_the_single_adapter():
    for M in (20, 150):
        given = batch(M=M, T=1, ids=[0] * M, dtype=torch.float32)
        single = {n: given[n] for n in ("x", *NAMES)}
        dy = torch.randn(M, 12)
        found = results(grouped_bottleneck_adapter, given, dy)
        expected = results(lambda x, **w: bottleneck_adapter(x, *(w[n][0] for n in NAMES)), single, dy)
        for name, t in expected.items():
            assert torch.equal(found[name], t) or (M > 64 and name in NAMES), name  # the slices of M differ
            torch.testing.assert_close(found[name], t)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("residual", [False, True])
def test_rows_without_a_task_may_hold_anything(form, residual):
    given = sized(form)
    idle = given["task_ids"] == -1
    if residual:
        given["residual"] = torch.randn_like(given["x"])
    given["x"][idle] = float("nan")
    dy = torch.randn_like(given["x"])
    dy[idle] = float("nan")
    found = check(given, dy)
    assert all(found[n].isfinite().all() for n in NAMES)
    assert torch.equal(found["x"][idle], torch.zeros_like(dy[idle])) if residual else found["x"][idle].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_task_without_rows_may_hold_anything(form):
    given = sized(form, scale="channel")
    given["task_ids"][given["task_ids"] == 1] = 0
    for name in (*NAMES, "scale"):
        given[name][1] = float("nan")
    found = results(grouped_bottleneck_adapter, given, torch.randn_like(given["x"]))
    assert all(t.isfinite().all() for t in found.values()) and not any(found[n][1].any() for n in (*NAMES, "scale"))


@pytest.mark.parametrize("form", ["split", "fused"])
def test_strided_rows(form):
    given = sized(form)
    given["residual"] = torch.randn_like(given["x"])
    dy = torch.randn_like(given["x"])[:, :1].expand_as(given["x"])  # as of y.sum().backward(), which has strides of 0
    expected = results(by_task, given, dy)
    for name in ("x", "residual"):
        wide = torch.randn(len(dy), 100).double()
        wide[:, 3 : 3 + dy.shape[1]] = given[name]
        given[name] = wide[:, 3 : 3 + dy.shape[1]].requires_grad_()
    for t in (given[n] for n in NAMES):
        t.requires_grad_()
    y = grouped_bottleneck_adapter(**given)
    found = dict(
        zip(("x", "residual", *NAMES), torch.autograd.grad(y, [given[n] for n in ("x", "residual", *NAMES)], dy))
    )
    torch.testing.assert_close(y, expected["y"])
    for name, t in found.items():
        torch.testing.assert_close(t, expected[name], msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_z_is_by_position_and_zero_for_rows_without_a_task(form):
    given = sized(form)
    weights = [given[n] for n in NAMES]
    _, z, order, counts = grouped._forward(
        given["x"], given["task_ids"], None, *weights, None, "gelu", 1.0, torch.float64, True
    )
    ids = given["task_ids"][order]
    expected = torch.einsum("md,mrd->mr", given["x"][order], weights[0][ids]) + weights[1][ids]
    torch.testing.assert_close(z, torch.where(ids[:, None] < 0, 0, expected))
    assert counts[0] == (ids < 0).sum()


def test_a_task_for_each_sequence():
    given = batch(ids=[2, -1, 0])
    x = torch.randn(3, 2, 5, 12).double()
    weights = [given[n] for n in NAMES]
    y = grouped_bottleneck_adapter(x, given["task_ids"], *weights)
    rows = given["task_ids"].repeat_interleave(10)
    assert torch.equal(y, grouped_bottleneck_adapter(x.view(30, 12), rows, *weights).view_as(x))
    assert torch.equal(y[1], x[1])


def test_bottlenecks_of_different_sizes():
    given = batch(T=3, R=6, ids=[0, 1, 2, 1, 0, 2, 2])
    sizes = torch.tensor([6, 2, 0])
    cut = {n: t.clone() for n, t in given.items()}
    for t, size in enumerate(sizes.tolist()):
        for tensors, value in ((given, float("nan")), (cut, 0.0)):
            for w in (tensors["w_down"][t, size:], tensors["b_down"][t, size:], tensors["w_up"][t, :, size:]):
                w.fill_(value)
    dy = torch.randn_like(given["x"])
    found = results(grouped_bottleneck_adapter, given, dy, sizes=sizes, activation="sigmoid")
    expected = results(by_task, cut, dy, activation="sigmoid")
    for name in ("y", "x", "b_up"):
        torch.testing.assert_close(found[name], expected[name], msg=name)
    for t, size in enumerate(sizes.tolist()):
        torch.testing.assert_close(found["w_down"][t, :size], expected["w_down"][t, :size])
        torch.testing.assert_close(found["w_up"][t, :, :size], expected["w_up"][t, :, :size])
        assert not any(
            w.any() for w in (found["w_down"][t, size:], found["b_down"][t, size:], found["w_up"][t, :, size:])
        )


INPUTS = ("x", *NAMES, "scale", "residual")
SUBSETS = [s for n in (1, 6, 2) for s in itertools.combinations(INPUTS, n)]


@pytest.mark.parametrize("form", ["split", "fused"])
def test_frozen_inputs(form):
    """Gradients of one input and of all but one, and of some pairs, by value."""
    M, D, R = (9, 5, 3) if form == "split" else (70, 5, 3)
    given = batch(M=M, T=2, D=D, R=R, scale="task") | {"residual": torch.randn(M, D).double()}
    dy = torch.randn(M, D).double()
    expected = results(by_task, given, dy)
    for wanted in SUBSETS[:14] + SUBSETS[14::7] if form == "split" else SUBSETS[:7]:
        inputs = given | {n: given[n].clone().requires_grad_() for n in wanted}
        y = grouped_bottleneck_adapter(**inputs)
        for name, t in zip(wanted, torch.autograd.grad(y, [inputs[n] for n in wanted], dy)):
            torch.testing.assert_close(t, expected[name], msg=f"{name} of {wanted}")


@pytest.mark.parametrize("M, residual", [(6, True), (67, False)])
def test_gradcheck_and_gradgradcheck(M, residual):
    given = batch(M=M, T=2, D=5, R=2, scale="task")
    if residual:
        given["residual"] = torch.randn(M, 5).double()
    names = [n for n in given if n != "task_ids"]
    tensors = [given[n].requires_grad_() for n in names]
    call = lambda *values: grouped_bottleneck_adapter(**given | dict(zip(names, values)))  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert M > 64 or torch.autograd.gradgradcheck(call, tensors, fast_mode=True)  # no kernel makes second derivatives


def test_opcheck_and_compiled():
    given = batch(M=6, T=2, D=5, R=2, dtype=torch.float32, scale="task")
    inputs = [given[n].requires_grad_() for n in (*NAMES, "scale")]
    arguments = given["x"].requires_grad_(), given["task_ids"], None, *inputs, "gelu", 1.0, torch.float32, True
    torch.library.opcheck(grouped.forward_op, arguments)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(grouped_bottleneck_adapter, fullgraph=True, backend=counter)
    for ids in ([0] * 6, [1, 0, -1, 1, 0, 1]):
        given["task_ids"] = torch.tensor(ids)
        expected = results(grouped_bottleneck_adapter, given, torch.ones(6, 5))
        for name, t in results(compiled, given, torch.ones(6, 5)).items():
            assert torch.equal(t, expected[name]), name
    assert counter.frame_count == 1


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def launched(monkeypatch, M, T):
    """Names of the kernels and of PyTorch's operations, in order, of a forward and a backward; no kernel runs."""
    given = batch(M=M, T=T, D=8, R=4, ids=torch.arange(M) % (T + 1) - 1, dtype=torch.float32)
    options = ("gelu", 1.0, torch.float32)
    weights = [*(given[n] for n in NAMES), None]
    with Counter() as counter:
        monkeypatch.setattr(Launch, "__call__", lambda one, _: counter.names.append(one.kernel.__name__))
        _, z, *index = grouped._forward(given["x"], given["task_ids"], None, *weights, *options, True)
        grouped._backward(given["x"], given["x"], z, *index, *weights, *options, [True] * 5 + [False], True)
    return counter.names


@pytest.mark.parametrize("M", [40, 300])
def test_launches_do_not_depend_on_the_number_of_tasks(monkeypatch, M):
    counts = [launched(monkeypatch, M, T) for T in (1, 5, 200)]
    assert counts[0] == counts[1] == counts[2]
    assert sum(name.endswith("_kernel") for name in counts[0]) == (8 if M == 40 else 7), counts[0]


def test_the_index_waits_for_no_value():
    """A fake tensor on a GPU that is not there has no values to wait for."""
    with FakeTensorMode():
        order, counts = grouped._index(torch.empty(7, dtype=torch.int32, device="cuda"), 5)
    assert order.shape == (7,) and counts.shape == (6,) and counts.device.type == "cuda"


def test_the_index_is_stable_and_leaves_out_what_is_out_of_range():
    ids = torch.tensor([2, 0, -1, 7, 2, 0, -1, 2])
    order, counts = grouped._index(ids, 4)
    assert order.tolist() == [2, 6, 1, 5, 0, 4, 7, 3] and counts.tolist() == [2, 2, 0, 3, 0]


@pytest.mark.parametrize("side", [1, 16, 64, 100])
@pytest.mark.parametrize("T", [1, 3, 63, 64, 150])
def test_tiles_cover_each_position_once(side, T):
    counts = torch.randint(0, 3 * side + 2, (T + 1,)) * (torch.rand(T + 1) < 0.6)
    counts[-1] = side + 1
    M = int(counts.sum())
    x, weights = torch.empty(M, 4), Weights(torch.empty(T, 2, 4), None, torch.empty(T, 4, 2), None, None)
    p = forward_problem(x, None, weights, Options("gelu", 1.0, torch.float32), True, target(x.device))
    (launch,), memory = tables.tables(p, side)
    made = {name: torch.full(m.shape, -9, dtype=m.dtype) for name, m in memory.items()}
    launch({"counts": counts, **made})
    rows, ends = made[f"tiles_{side}"].tolist(), made[f"ends_{side}"].tolist()
    assert len(rows) <= blocks(M, side) + T
    stops = counts.cumsum(0).tolist()
    expected = []
    for group, (count, stop) in enumerate(zip(counts.tolist(), stops)):
        expected += [[group - 1, at, min(at + side, stop)] for at in range(stop - count, stop, side)]
        assert ends[group] == len(expected)
    assert rows[: len(expected)] == expected and all(row[0] == -2 for row in rows[len(expected) :])


def test_on_a_card_the_kernels_are_off_until_one_has_run_them():
    x, weights = torch.zeros(65536, 64), Weights(torch.zeros(5, 16, 64), None, torch.zeros(5, 64, 16), None, None)
    options = Options("gelu", 1.0, torch.bfloat16)
    for unmeasured in (False, True):
        card = Target((9, 0), 132, unmeasured=unmeasured)
        plan = forward.plan(forward_problem(x.bfloat16(), None, weights, options, True, card))
        assert plan.form == ("fused" if unmeasured else "pytorch") and "ADAPTER_OPS_UNMEASURED" in plan.reason
    single = Weights(weights.w_down[0], None, weights.w_up[0], None, None)
    assert forward.plan(forward_problem(x.bfloat16(), None, single, options, True, Target((9, 0), 132))).launches


def test_a_required_backend_and_the_logger(monkeypatch, caplog):
    caplog.set_level("INFO", "adapter_ops")
    monkeypatch.setattr(ops, "_told", {})
    given = batch(M=5)
    monkeypatch.setenv("ADAPTER_OPS_REQUIRE", "cpu")
    with pytest.raises(RuntimeError, match="but this call would take the backend 'triton': a test asks for it"):
        grouped_bottleneck_adapter(**given)
    monkeypatch.setenv("ADAPTER_OPS_REQUIRE", "triton")
    grouped_bottleneck_adapter(**given), grouped_bottleneck_adapter(**given)
    (text,) = (r.getMessage() for r in caplog.records if r.name == "adapter_ops")
    assert text.startswith("A batch of several tasks with D=12 and R=4 takes the backend 'triton'")
    monkeypatch.delenv("ADAPTER_OPS_REQUIRE")
    # A build of PyTorch without CUDA has not all of the operations that follow, not even for fake tensors.
    with FakeTensorMode(), contextlib.suppress(RuntimeError):
        there = {n: torch.empty(t.shape, dtype=t.dtype, device="cuda") for n, t in given.items()}
        grouped_bottleneck_adapter(**there)
    record = caplog.records[-1]
    assert record.levelname == "WARNING"
    assert "falls back from the kernels to the backend 'reference'" in record.getMessage()
