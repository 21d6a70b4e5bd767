"""python -m adapter_ops: what it prints, and that its self-check finds what is wrong."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Call as Inputs
from helpers import assert_two_times_rule

import adapter_ops
from adapter_ops import __main__ as cli
from adapter_ops import cpu
from adapter_ops.backend import Backend
from bench.host import build

ROOT = Path(__file__).parent.parent
SMALL = (cli.Call(64, 48, 24, torch.float32), cli.Call(64, 96, 32, torch.bfloat16, full=True))
GRADIENTS = ("dx", "dw_down", "db_down", "dw_up", "db_up", "dscale")  # as a backend returns them


def python(*arguments, **variables):
    """A process of its own, without what the tests set, on the CPU."""
    ours = ("TRITON_INTERPRET", "ADAPTER_OPS_REQUIRE", "ADAPTER_OPS_UNMEASURED")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | {"CUDA_VISIBLE_DEVICES": ""} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def small(monkeypatch, aten):
    """The report of small calls, all of which take the CPU backend."""
    monkeypatch.setattr(cli, "typical", lambda device: SMALL)
    monkeypatch.setattr(cli, "devices", lambda: {"cpu": "a processor"})


def test_the_report():
    run = python("-m", "adapter_ops")
    assert run.returncode == 0 and run.stderr == "", run.stdout + run.stderr
    head, *rest = run.stdout.splitlines()
    assert len(rest) < 24 and run.stdout.isascii() and "\x1b" not in run.stdout
    for text in (
        f"adapter_ops {adapter_ops.__version__}",
        f"Python {platform.python_version()}",
        f"PyTorch {torch.__version__}",
        "Triton ",
        "transformers ",
    ):
        assert text in head
    fp32 = [line.split()[:4] for line in rest if line.startswith("  4096x768x64 float32")]
    assert fp32 == [["4096x768x64", "float32", mode, "cpu"] for mode in ("forward", "training")]
    assert sum(line.endswith("  right") for line in rest) == 2 * len(cli.CALLS)
    with torch.no_grad():
        large, one = (backend_without_interpreter(M) for M in (4096, 1))
    assert f"  cpu: {large}" in rest and f"  reference: {one}" in rest
    assert "self-check: 4 calls are right" in rest
    assert "With a bug report send this output" in run.stdout and "explain(" in run.stdout


def backend_without_interpreter(M):
    code = f"import torch, adapter_ops as a; print(a.explain(torch.zeros({M}, 768), torch.zeros(64, 768)).reason)"
    return python("-c", code).stdout.strip()


def test_the_interpreter_has_calls_that_it_can_do():
    assert cli.typical("cpu") == (cli.INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else cli.CALLS)
    assert cli.typical("cuda:0") == cli.CALLS


def test_no_network_and_no_file():
    code = """
import os, sys
from adapter_ops import __main__ as cli
def watch(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.system", "os.exec")):
        found.append((event, arguments))
    if event == "open" and (set(arguments[1] or "") & set("wax+") or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        found.append((event, arguments))
found = []
sys.addaudithook(watch)
status = cli.main([])
assert not found, found
open("/dev/null", "w").close()
assert found  # the hook sees files
sys.exit(status)
"""
    run = python("-B", "-c", code)
    assert run.returncode == 0, run.stdout + run.stderr


def test_bad_arguments_are_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--device", "cuda"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err == "python -m adapter_ops: error: unrecognized arguments: --device cuda\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "Exit status: 0 if every result is right, 1 if one is not" in out


def test_right_calls(small, capsys):
    assert cli.main([]) == 0
    assert "self-check: 2 calls are right" in capsys.readouterr().out


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_wrong_gradient_of_the_cpu_backend(small, capsys, monkeypatch, name):
    right = cpu.backward

    def wrong(*arguments):
        gradients = right(*arguments)
        i = GRADIENTS.index(name)
        if gradients[i] is not None:
            gradients[i] = gradients[i] * 1.02
        return gradients

    monkeypatch.setattr(cpu, "backward", wrong)
    assert cli.main([]) == 1
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "WRONG: " in line]
    count = 1 if name == "dscale" else 2  # only one of the calls has a scale
    assert len(lines) == count and f"self-check: {count} of 2 calls are WRONG" in out
    assert all(" training " in line and line.endswith(f"WRONG: {name}") for line in lines)


def test_a_wrong_y_of_the_cpu_backend(small, capsys, monkeypatch):
    right = cpu.forward

    def wrong(*arguments):
        y, z = right(*arguments)
        y[-1, -1] += 1
        return y, z

    monkeypatch.setattr(cpu, "forward", wrong)
    assert cli.main([]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "WRONG: y" in line]
    assert len(lines) == 4  # two calls, forward and training


@pytest.mark.parametrize("name", ["dresidual", "dx"])
def test_a_wrong_gradient_from_anywhere(small, capsys, monkeypatch, name):
    """A gradient that no backend makes, and one that is NaN."""

    def wrong(**inputs):
        t = inputs.get(name[1:], inputs["x"])
        if t.requires_grad:
            t.register_hook(lambda g: g * 1.02 if name == "dresidual" else g * float("nan"))
        return adapter_ops.bottleneck_adapter(**inputs)

    monkeypatch.setattr(cli, "bottleneck_adapter", wrong)
    assert cli.main([]) == 1
    assert f"WRONG: {name}\n" in capsys.readouterr().out


def test_a_call_that_raises(small, capsys, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no kernel image\nand much more")

    monkeypatch.setattr(cpu, "backward", fail)
    assert cli.main([]) == 1
    out, err = capsys.readouterr()
    assert out.count("WRONG: RuntimeError: no kernel image\n") == 2 and "much more" not in out
    assert "Traceback" in err and "much more" in err and "a test asks for it" in out


def test_a_required_backend_that_would_not_run():
    run = python("-m", "adapter_ops", ADAPTER_OPS_REQUIRE="triton")
    assert run.returncode == 1 and "environment: ADAPTER_OPS_REQUIRE=triton" in run.stdout
    assert "WRONG: RuntimeError: ADAPTER_OPS_REQUIRE=triton, but this call would take" in run.stdout
    assert "self-check: 4 of 4 calls are WRONG" in run.stdout


def test_what_explain_says_is_printed(small, capsys, monkeypatch):
    backends = {True: Backend("cpu", "it trains"), False: Backend("reference", "it does not")}
    monkeypatch.setattr(cli, "explain", lambda **inputs: backends[torch.is_grad_enabled()])
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  cpu: it trains" in lines and "  reference: it does not" in lines
    named = [line.split()[2:4] for line in lines if line.startswith("  64x48x24 float32")]
    assert named == [["forward", "reference"], ["training", "cpu"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_is_that_of_the_tests(dtype):
    """Errors on both sides of the limit get the same verdict here and in helpers.py."""
    inputs = Inputs(64, 24, 5, dtype=dtype)
    eager = inputs.gradients(adapter_ops.reference.bottleneck_adapter)
    oracle = inputs.oracle()
    wide = {name: t.double() for name, t in eager.items()}  # results of its dtype, so that no error is rounded away
    verdicts = set()
    for name, expected in oracle.items():
        off = eager[name].double() - expected
        for factor in (0.5, 1.9, 2.1, 4, 30, float("nan")):
            found = oracle | {name: expected + factor * off}
            here = all(row.right for row in cli.errors(found, wide, oracle))
            try:
                assert_two_times_rule(found, wide, oracle)
                there = True
            except AssertionError:
                there = False
            assert here == there, (name, factor)
            verdicts.add(here)
    assert verdicts == {True, False}


def test_another_shape_or_dtype_is_wrong():
    t = torch.ones(3, 4)
    for found in (torch.ones(4, 3), torch.ones(3, 4, dtype=torch.float64), torch.ones(12)):
        assert not cli.errors({"y": found}, {"y": t}, {"y": t.double()})[0].right
    assert cli.errors({"y": t.clone()}, {"y": t}, {"y": t.double()})[0].right


RIG = """
from bench.host import rig
rig.start()
import os, sys
from adapter_ops import __main__ as cli
status = cli.main([])
sys.stdout.flush()
os._exit(status)
"""


def test_a_gpu_that_computes_nothing():
    """On the rig: both cards are named, and the kernels run on one of them. No result says anything there."""
    if lack := build.missing():
        pytest.skip(lack)
    run = python("-W", "ignore", "-c", RIG, ADAPTER_OPS_UNMEASURED="0")
    assert run.returncode in (0, 1) and "Traceback" not in run.stderr, run.stdout + run.stderr
    assert "\ncuda:0: a rig of sm_90, compute capability 9.0, 132 multiprocessors; cuda:1 the same\n" in run.stdout
    rows = [line for line in run.stdout.splitlines() if line.startswith("  4096x768x64 bfloat16  ")]
    assert len(rows) == 2 and all("triton (" in row for row in rows), run.stdout
    assert "  triton: faster than PyTorch on NVIDIA H200" in run.stdout
    assert "CUDA 13.0" in run.stdout and "\ncpu:" not in run.stdout


@pytest.mark.gpu
def test_the_gpu_here():
    run = python("-m", "adapter_ops", CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\ncuda:0: " in run.stdout and "NVIDIA driver" in run.stdout
