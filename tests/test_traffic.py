"""The traffic meter, and the formulas it holds the kernels to."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton import cdiv

from adapter_ops.kernels import launch
from adapter_ops.kernels.launch import Needs
from bench import traffic
from bench.cases import Shape

ROOT = Path(__file__).parent.parent
interpreted = pytest.mark.skipif(
    not launch.INTERPRETED, reason="TRITON_INTERPRET is off; test_command counts in a process of its own"
)


def check(shape, **arguments):
    with traffic.recorded(run=True) as launches:
        traffic.step(Shape.parse(shape), **arguments)
    assert launches
    for one in launches:
        assert one.counted == one.formula(), one.kernel


@interpreted
@pytest.mark.parametrize("shape, arguments", traffic.COUNTED, ids=str)
def test_counted_equals_formula(shape, arguments):
    check(shape, **arguments)


@interpreted
def test_every_subset_of_gradients():
    for wanted in itertools.product((False, True), repeat=len(Needs._fields)):
        needs = " ".join(itertools.compress(Needs._fields, wanted))
        for own_residual in (False, True) if wanted[0] else (False,):  # it decides whether dx reads dy
            check("67x52x11", needs=needs, own_residual=own_residual, scale="channel")


@triton.jit
def spread_kernel(source_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(source_ptr + offs // 2, mask=offs < N, other=0.0) + tl.load(source_ptr + 3)
    tl.store(out_ptr + offs, value, mask=offs < N)


@interpreted
def test_meter_on_a_kernel_counted_by_hand():
    source, out = torch.zeros(8, dtype=torch.float16), torch.zeros(8)
    with traffic.recorded(run=True) as launches:
        spread_kernel[(1,)](source, out, 5, BLOCK=8)
    # Elements 0 0 1 1 2 and 3 of two bytes; five stores of four bytes, three masked off.
    assert launches[0].counted == {"read source_ptr": (12, 8), "write out_ptr": (20, 20)}


@pytest.mark.parametrize("shape", ["301x130x70", "65536x768x64", "5000x1000x200"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_sums_in_the_readme(shape, dtypes):
    text = (ROOT / "kernels/README.md").read_text()
    sums = {kernel: columns for kernel, *columns in re.findall(r"\| `(\w+)` \| `(.+?)` \| `(.+?)` \|", text)}
    size, (x, parameter) = Shape.parse(shape), dtypes
    launches = {one.kernel: one for one in traffic.planned(size, dtype=x, parameter_dtype=parameter)}
    assert {f"{kernel}_kernel" for kernel in sums} == launches.keys() == traffic.FORMULAS.keys()
    weights = launches["weights_kernel"].arguments
    names = vars(size) | {"e": x.itemsize, "p": parameter.itemsize}
    names |= {"C": cdiv(size.D, weights["BLOCK_D"]), "S": weights["grid"][1]}
    for kernel, columns in sums.items():
        one = launches[f"{kernel}_kernel"]
        programs = {"P": cdiv(size.M, one.arguments.get("BLOCK_M", size.M))}
        found = tuple(eval(column.replace("·", "*"), names | programs) for column in columns)
        assert found == traffic.total([one.formula()]), kernel


def test_compulsory_bytes_are_near_the_floor():
    moved, md = traffic.model(Shape(65536, 768, 64)), 65536 * 768
    assert moved["forward"].compulsory <= 1.06 * 4 * md
    assert moved["backward"].compulsory <= 1.55 * 6 * md


def run(*arguments):
    """The command, without the tests' TRITON_INTERPRET: it has to switch the interpreter on by itself."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.traffic", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_command():
    found = run("--shapes", "65536x768x64,4096x1000x10")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(" OK\n") > 3 * len(traffic.COUNTED) and "MISMATCH" not in found.stdout
    assert "65536×768×64    forward" in found.stdout and "4096×1000×10   backward" in found.stdout


@interpreted
def test_mismatch_is_printed_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(traffic, "COUNTED", [("33x20x6", {"save_z": False})])
    monkeypatch.setitem(traffic.FORMULAS, "forward_kernel", lambda a: ({"x_ptr": 1}, {"y_ptr": 1}))
    assert traffic.main(["--shapes", "64x64x8"]) == 1
    printed = capsys.readouterr().out
    assert "MISMATCH" in printed and "read x_ptr: counted Bytes(logical=2640, compulsory=1320)" in printed


def test_a_bottleneck_the_kernels_do_not_hold(capsys):
    with pytest.raises(SystemExit):
        traffic.main(["--shapes", "64x64x100000"])
    assert "the kernels hold a bottleneck of at most" in capsys.readouterr().err
