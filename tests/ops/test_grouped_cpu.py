"""How the CPU path of the grouped op divides its rows, and that every way to compute a task gives the same."""

import pytest
import torch
from helpers import check_rule
from helpers_grouped import batch, by_task, results

from adapter_ops import grouped_bottleneck_adapter
from adapter_ops.grouped_cpu import _padded_size, _parts

pytestmark = pytest.mark.usefixtures("aten", "one_thread")

# Rows of each task: one size, sizes that are padded to one, batches with a task that has none, with a task that goes
# by itself between them, more tasks than one batch holds, and tasks that all go by themselves.
LENGTHS = {
    "equal": [7] * 5,
    "unequal": [7, 5, 6, 7, 1],
    "absent": [7, 0, 6, 7, 0],
    "one large": [7, 5, 700, 6, 7],
    "several batches": [40] * 30,
    "several batches, unequal": [40, 39, 0] * 10,
    "all large": [600, 700],
}


@pytest.mark.parametrize("taskless", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_row_has_one_place(lengths, taskless):
    t = torch.arange(taskless + sum(lengths)) + 1
    found, seen = torch.zeros_like(t), []
    for part in _parts([taskless, *lengths], torch.device("cpu")):
        tasks = torch.arange(len(lengths))[part.tasks].tolist()
        assert len(tasks) == 1 or len(tasks) * part.size <= 512  # which stay in a processor's cache
        seen += tasks
        gathered = part.gather(t, None)
        assert gathered.shape == (len(tasks), part.size)
        for task, row in zip(tasks, gathered):
            start = taskless + sum(lengths[:task])
            assert row.tolist() == [*range(start + 1, start + 1 + lengths[task])] + [0] * (part.size - lengths[task])
        place = part.place(found)
        place.copy_(gathered)
        part.put(found, place)
    assert torch.equal(found[taskless:], t[taskless:]) and not found[:taskless].any()
    assert seen == [task for task, n in enumerate(lengths) if n]


def test_padding_costs_less_than_calls():
    assert _padded_size([64] * 64) == 64
    assert _padded_size([70, 58, 64]) == 70
    assert _padded_size([5, 5, 5, 5000]) == 5
    assert _padded_size([3]) == _padded_size([]) == _padded_size([2000, 2000]) == 0


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_values_and_gradients(lengths, shuffled):
    ids = torch.arange(-1, len(lengths)).repeat_interleave(torch.tensor([3, *lengths]))
    ids = ids[torch.randperm(len(ids))] if shuffled else ids
    given = batch(T=len(lengths), ids=ids, D=12, R=5)
    dy = torch.randn_like(given["x"])
    found = results(grouped_bottleneck_adapter, given, dy)
    for name, t in results(by_task, given, dy).items():
        torch.testing.assert_close(found[name], t, msg=name)


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    "x_dtype, dtype, autocast", [(BF16, BF16, None), (F16, F16, None), (BF16, F32, BF16), (F32, F32, BF16)], ids=str
)
@pytest.mark.parametrize("scale", [None, "task", "channel", 0.5])
@pytest.mark.parametrize("residual", [False, True])
def test_two_times_rule_of_a_batch(x_dtype, dtype, autocast, scale, residual):
    """A padded batch and a task by itself, in 16 bits, also with fp32 parameters; over five calls, as the gradient of a
    scale has four elements alone."""
    drawn = []
    for _ in range(5):
        ids = torch.arange(4).repeat_interleave(torch.tensor([60, 55, 58, 600]))[torch.randperm(773)]
        given = batch(T=4, ids=ids, D=40, R=9, dtype=x_dtype, scale=scale if isinstance(scale, str) else None)
        options = {"scale": scale} if isinstance(scale, float) else {}
        given |= {name: t.to(dtype) for name, t in given.items() if name not in ("x", "task_ids")}
        if residual:
            given["residual"] = torch.randn_like(given["x"])
        dy = torch.randn_like(given["x"])
        wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            eager = results(by_task, given, dy, **options)
            found = results(grouped_bottleneck_adapter, given, dy, **options)
        drawn.append((found, eager, results(by_task, wide, dy, **options)))
    check_rule(drawn, 0.0)
