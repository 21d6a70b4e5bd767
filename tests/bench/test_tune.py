"""The tuner without a GPU: what it compiles and drops, who wins, what it writes. Only its timing needs the card."""

import importlib.util
import subprocess
import sys
from dataclasses import astuple

import pytest
from helpers import ROOT, python

from adapter_ops.kernels import configs
from adapter_ops.kernels.configs import Config
from bench.shape import Shape
from bench.static import tune
from bench.static.tune import Job

A, B, C = Config(64, 64, 4, 2), Config(64, 128, 8, 3), Config(128, 64, 8, 3, 64)

JUDGED = """
from bench.static.tune import Config, Job, Shape, passes
good, spills, refused = Config(64, 128, 8, 3), Config(128, 256, 4, 2), Config(24, 64, 4, 2)
for kernel in ("fused", "shrink", "expand", "dz", "dx_dw"):
    assert passes(Job(kernel, Shape(65536, 768, 64), good), "bf16", "sm_90"), kernel
assert not passes(Job("fused", Shape(65536, 768, 64), spills), "bf16", "sm_90")
assert not passes(Job("dz", Shape(65536, 768, 64), refused), "bf16", "sm_90")
"""


def test_gate_prunes():
    python("-c", JUDGED)


@pytest.mark.parametrize("kernel", tune.KERNELS)
@pytest.mark.parametrize("R", [8, 64, 128, 256])
def test_candidates_include_the_table(kernel, R):
    found = list(tune.candidates(kernel, R))
    assert len(found) == len(set(found)) and 3 < len(found) < 200


def test_winner_is_least_behind_at_all_shapes():
    small, large = Shape(65536, 768, 64), Shape(16384, 4096, 64)
    times = {Job("dz", small, A): 1.0, Job("dz", large, A): 4.0, Job("dz", small, B): 1.5, Job("dz", large, B): 2.0}
    times |= {Job("dz", small, C): 0.9}  # did not run at the other shape
    times |= {Job("expand", Shape(65536, 768, 16), C): 1.0}
    assert tune.winners(times) == {"dz": {64: B}, "expand": {16: C}}


def plain(rows):
    return {kernel: {R: astuple(config) for R, config in by_r.items()} for kernel, by_r in rows.items()}


def test_writes_its_block_and_nothing_else(tmp_path):
    file, key = tmp_path / "configs.py", (9, 2)
    before = tune.TABLE.read_text(encoding="utf-8")
    file.write_text(before, encoding="utf-8")
    tune.write(file, key, {"dz": {64: A, 96: C}}, "a card")
    after = file.read_text(encoding="utf-8")
    start, end = "# tuned (9, 2): ", "# end of tuned (9, 2)\n"
    assert before.split(start)[0] == after.split(start)[0] and before.split(end)[1] == after.split(end)[1]
    spec = importlib.util.spec_from_file_location("adapter_ops.kernels.configs_written", file)
    written = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = written  # dataclasses look their module up
    spec.loader.exec_module(written)
    expected = configs.TABLE[key] | {"dz": configs.TABLE[key]["dz"] | {64: A, 96: C}}
    assert plain(written.TABLE[key]) == plain(expected)
    with pytest.raises(ValueError, match="no block"):
        tune.write(file, (8, 2), {}, "a card")
    assert file.read_text(encoding="utf-8") == after


def test_needs_a_gpu():
    run = subprocess.run([sys.executable, "-m", "bench", "tune"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "there is no GPU here" in run.stderr
