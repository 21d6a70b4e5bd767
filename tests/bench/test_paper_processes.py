"""python -m bench paper in several processes: what a killed one leaves, runs that are shared, torchrun."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers_paper import MARKS, a_row, arguments, rows_of

from bench.paper import lab, runs, studies
from bench.paper.command import main

pytestmark = MARKS
ROOT = Path(__file__).parents[2]


def test_a_killed_run_ends_as_if_it_had_not_been(tiny, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(arguments(tiny, whole, "--commit", "c"))
    command = [sys.executable, "-m", "bench", "paper", *arguments(tiny, killed, "--commit", "c")]
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = killed / "runs.csv"
    while not (file.exists() and file.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(rows_of(file)) < len(rows_of(whole / "runs.csv"))
    with open(file, "a") as half:
        half.write("gt-all,half a li")
    main(arguments(tiny, killed, "--commit", "c"))
    assert rows_of(file) == rows_of(whole / "runs.csv")


def test_two_at_once_share_the_runs(tiny, tmp_path):
    """Each run is one process's, and together they are those of a process alone."""
    main(arguments(tiny, tmp_path / "alone", "--commit", "c"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench", "paper", *arguments(tiny, tmp_path / "two", "--commit", "c")]
    two = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    tables = [process.communicate(timeout=300)[0].replace("two", "alone") for process in two]
    assert [process.returncode for process in two] == [0, 0] and tables[0] == tables[1]
    alone, shared = (sorted(map(str, rows_of(tmp_path / name / "runs.csv"))) for name in ("alone", "two"))
    assert shared == alone


HOLDER = """
import sys, time
from pathlib import Path
from bench.paper.runs import Cell, claim
with claim(Path(sys.argv[1]), eval(sys.argv[2])) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


def test_runs_of_other_processes_come_last(tiny, tmp_path, monkeypatch):
    """What another process ends is not run again here. What one was killed in is."""
    ran = []

    def row_of(cell):
        return dataclasses.replace(a_row(studies.HEAD, 0.0, 0, 0.5, 0.5), **vars(cell))

    def train(self, variant, cell):
        ran.append(cell)
        self.write(self.results, [row_of(cell)])

    monkeypatch.setattr(lab.Lab, "train", train)
    bench = lab.Lab(lab.Options(str(tiny), str(tiny / "animals.csv"), (0, 1), tmp_path), {})
    ended, killed, *others = (bench.cell(studies.HEAD, rate, 0) for rate in studies.RATES["head"])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), repr(cell)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for cell in (ended, killed)
    ]
    assert [holder.stdout.readline() for holder in holders] == ["True\n"] * 2

    def end():
        runs.Table(tmp_path / "runs.csv", runs.Result).add([row_of(ended)])
        for holder in holders:
            holder.kill()
            holder.wait()

    waits = iter([lambda: None, end])
    monkeypatch.setattr(lab.time, "sleep", lambda seconds: next(waits)())
    bench.run([studies.HEAD])
    assert ran == [*others, killed, bench.cell(studies.HEAD, ended.learning_rate, 1)]
    assert next(waits, None) is None, "it was waited for until the processes were gone"


def test_two_processes_give_the_losses_of_one(tiny, tmp_path):
    """The last batch has one text, so one of the two has none."""
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import json, os, sys, torch
from torch import distributed
from adapter_ops import AdapterConfig, add_adapter
from bench.paper.data import load_data
from bench.paper.finetune import finetune, load_model, predict, rank_and_world, tokenise

if "LOCAL_RANK" in os.environ:
    distributed.init_process_group("gloo")
data = load_data({str(tiny / "animals.csv")!r}).cut(81, 9)
torch.manual_seed(rank_and_world()[0])  # what the processes start from differs; DDP takes the first's
model, tokenizer = load_model({str(tiny)!r}, data.labels, dropout=0.0)
add_adapter(model, "t", AdapterConfig(bottleneck=4))
texts = tokenise(tokenizer, data)
run = finetune(model, tokenizer, texts.train, learning_rate=1e-2, epochs=2, batch_size=16, watch=texts.test)
outputs = predict(model, tokenizer, texts.test, batch_size=2)
if rank_and_world()[0] == 0:
    print("RESULT", json.dumps([run.losses, run.scores, outputs.tolist()]))
if distributed.is_initialized():
    distributed.barrier()
sys.stdout.flush()
os._exit(0)  # once in hundreds of runs gloo's threads abort a process that ends by itself, also after their group does
"""
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for launcher in ([sys.executable], torchrun):
        environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        run = subprocess.run([*launcher, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(re.search("RESULT (.*)", run.stdout)[1]))
    (losses, scores, outputs), (other_losses, other_scores, other_outputs) = found
    assert len(losses) == 12 and losses[-1] < losses[0]
    torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_outputs, outputs, rtol=1e-4, atol=1e-5)
    assert other_scores == scores


def test_a_study_under_torchrun_writes_each_row_once(tiny, tmp_path):
    options = ("--dtype", "fp32", "--dropout", "0", "--commit", "c")
    main(arguments(tiny, tmp_path / "one", *options))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "bench", "paper", *arguments(tiny, tmp_path / "two", *options)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    one, two = (rows_of(tmp_path / name / "runs.csv", ("seconds", "device")) for name in ("one", "two"))
    assert [float(row.pop("loss")) for row in two] == pytest.approx([float(row.pop("loss")) for row in one], rel=1e-4)
    assert two == one
