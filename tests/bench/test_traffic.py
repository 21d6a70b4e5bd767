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

from adapter_ops.kernels.plan import INTERPRETED
from adapter_ops.kernels.problem import Needs, Tuning
from bench.shape import Shape
from bench.static import formulas, traffic

ROOT = Path(__file__).parents[2]
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="TRITON_INTERPRET is off; test_command counts in a process of its own"
)


# The resident form, which no interpreter runs, is left out.
UNRUN = traffic.INTERPRETER._replace(interpreted=False, unmeasured=True, capability=(8, 0))


def form(phase, one):
    """The row of README's table that a launch belongs to."""
    a = one.arguments
    if one.kernel == "shrink_kernel":
        detail = f", S {'=' if a['grid'][1] == 1 else '>'} 1"
    elif one.kernel == "expand_kernel":
        detail = ", dx" * (phase == "backward")
    elif one.kernel == "dx_dw_kernel":
        detail = f", Q {'=' if a['R'] <= a['BLOCK_R'] else '>'} 1"
    else:
        detail = ""
    return f"`{one.kernel.removesuffix('_kernel')}`{detail}"


def readme():
    """Form -> its two columns."""
    text = (ROOT / "kernels/README.md").read_text().partition("\n## Bytes\n")[2].partition("\n## ")[0]
    return {kernel: columns for kernel, *columns in re.findall(r"\| (`\w+`.*?) \| `(.+?)` \| `(.+?)` \|", text)}


def check(shape, **arguments):
    launches = list(itertools.chain(*traffic.step(Shape.parse(shape), traffic.INTERPRETER, **arguments).values()))
    assert launches
    for one in launches:
        assert one.counted == one.formula(), one.kernel


@interpreted
def test_counted_cases_reach_every_form():
    forms, blocks_of_r = set(), set()
    for shape, arguments in traffic.COUNTED:
        for phase, launches in traffic.step(Shape.parse(shape), UNRUN, **arguments).items():
            for one in (one for one in launches if one.kernel != "table_kernel"):
                forms.add(form(phase, one))
                if "BLOCK_R" in one.arguments:
                    blocks_of_r.add((form(phase, one), one.arguments["R"] > one.arguments["BLOCK_R"]))
    assert forms == readme().keys() - {f"`{name.removesuffix('_kernel')}`" for name in formulas.NOT_COUNTED}
    either = ("`shrink`, S = 1", "`shrink`, S > 1", "`expand`", "`dz`", "`reduce`")
    assert blocks_of_r >= set(itertools.product(either, (False, True)))


@interpreted
@pytest.mark.parametrize("shape, arguments", traffic.COUNTED, ids=str)
def test_counted_equals_formula(shape, arguments):
    check(shape, **arguments)


@interpreted
@pytest.mark.parametrize("shape, most", [("67x52x11", 6), ("65x20x130", 2)])  # R in one block, and in two
def test_subsets_of_gradients(shape, most):
    for wanted in itertools.product((False, True), repeat=len(Needs._fields)):
        needs = " ".join(itertools.compress(Needs._fields, wanted))
        for own_residual in (False, True) if wanted[0] else (False,):  # it decides whether dx reads dy
            if sum(wanted) <= most:
                check(shape, needs=needs, own_residual=own_residual, scale="channel")


@triton.jit
def spread_kernel(source_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    value = tl.load(source_ptr + offs // 2, mask=offs < N, other=0.0) + tl.load(source_ptr + 3)
    tl.store(out_ptr + offs, value, mask=offs < N)


@interpreted
def test_meter_on_a_kernel_counted_by_hand():
    source, out = torch.zeros(8, dtype=torch.float16), torch.zeros(8)
    with traffic.counting() as accesses:
        spread_kernel[(1,)](source, out, 5, BLOCK=8)
    # Elements 0 0 1 1 2 and 3 of two bytes; five stores of four bytes, three masked off.
    counted = traffic.attributed(accesses, {"source_ptr": source, "out_ptr": out})
    assert counted == {"read source_ptr": (12, 8), "write out_ptr": (20, 20)}


def test_sums_in_the_readme():
    sums, reached = readme(), set()
    dtypes = (torch.bfloat16, torch.float32)
    for shape in ("301x130x70", "65536x768x64", "65536x512x24", "5000x1000x200", "9001x1000x300", "16x4096x64"):
        size = Shape.parse(shape)
        for x, parameter in ((x, p) for x in dtypes for p in dtypes if p.itemsize >= x.itemsize):
            for phase, launches in traffic.step(size, traffic.HOPPER, dtype=x, parameter_dtype=parameter).items():
                for one in launches:
                    a, grid = one.arguments, one.arguments["grid"]
                    names = vars(size) | {"e": x.itemsize, "p": parameter.itemsize, "G": grid[0]}
                    names |= {"S": a.get("S", grid[-1]), "P": a.get("P") or cdiv(size.M, a.get("BLOCK_M", 1))}
                    names |= {"C": cdiv(size.D, a.get("BLOCK_D", 1)), "Q": cdiv(size.R, a.get("BLOCK_R", size.R))}
                    found = tuple(eval(column.replace("·", "*"), names) for column in sums[form(phase, one)])
                    assert found == traffic.total([one.formula()]), (shape, x, parameter, one.kernel)
                    reached.add(form(phase, one))
    assert reached == sums.keys()


def test_every_kernel_has_a_formula():
    kernels = re.findall(r"^def (\w+_kernel)\(", "".join(p.read_text() for p in ROOT.glob("kernels/*.py")), re.M)
    assert sorted(kernels) == sorted(formulas.FORMULAS)


def test_compulsory_bytes_are_near_the_floor():
    launches, md = traffic.step(Shape(65536, 768, 64), traffic.HOPPER), 65536 * 768
    moved = {phase: traffic.total(one.formula() for one in of_phase) for phase, of_phase in launches.items()}
    assert moved["forward"].compulsory <= 1.06 * 4 * md
    assert moved["backward"].compulsory <= 1.55 * 6 * md


def moved(*arguments, **options):
    """The sums of both passes, by formula; of the form of forward that both of one adapter and of tasks have."""
    of_phases = traffic.step(*arguments, tuning=Tuning("fused"), **options).items()
    return {phase: traffic.total(one.formula() for one in launches) for phase, launches in of_phases}


@pytest.mark.parametrize("size", [(768, 64), (1024, 32), (4096, 16)], ids=str)
def test_rows_of_many_tasks_move_little_more_than_those_of_one(size):
    """With 64 rows a task: forward asks for as much as that of one task, and both move what a call for each task would.

    What is compulsory can be no less than those calls, because every task has parameters of its own.
    """
    T = 1024
    shape, alone = Shape(64 * T, *size), Shape(64, *size)
    found = moved(shape, traffic.HOPPER, counts=(0, *[64] * T))
    one_task, calls = moved(shape, traffic.HOPPER), moved(alone, traffic.HOPPER)
    assert found["forward"].logical <= 1.1 * one_task["forward"].logical
    for phase, total in found.items():
        assert total.compulsory <= 1.1 * T * calls[phase].compulsory, phase
        assert total.logical <= 1.1 * T * calls[phase].logical, phase


FEW = slice(4, None, 9)  # of COUNTED; test_counted_equals_formula has them all
COMMAND = f"""
import sys
from bench import commands
load = commands.importlib.import_module
def few(name):
    module = load(name)
    if name == "bench.static.traffic":
        module.COUNTED = module.COUNTED[{FEW.start}::{FEW.step}]
    return module
commands.importlib.import_module = few
sys.exit(commands.main(sys.argv[1:]))
"""


def run(*arguments):
    """The command with FEW cases, without the tests' TRITON_INTERPRET: it has to switch the interpreter on itself."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMMAND, "traffic", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_command():
    found = run("--shapes", "65536x768x64,4096x1000x10,64x64x1000")
    assert found.returncode == 0, found.stderr
    for shape, arguments in traffic.COUNTED[FEW]:
        assert " ".join([shape, *(f"{name}={value}" for name, value in arguments.items())]) + "\n" in found.stdout
    assert found.stdout.count(" OK\n") > 3 * len(traffic.COUNTED[FEW]) and "MISMATCH" not in found.stdout
    assert re.search(r"65536×768×64    forward .*  resident\*\n", found.stdout)
    assert re.search(r"4096×1000×10   backward .*  dz dx_dw reduce\n", found.stdout)
    assert re.search(r"64×64×1000    forward .*  shrink expand\n", found.stdout)


@interpreted
def test_mismatch_is_printed_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(traffic, "COUNTED", [("150x20x6", {"save_z": False})])
    monkeypatch.setitem(formulas.FORMULAS, "fused_kernel", lambda a: ({"x_ptr": 1}, {"y_ptr": 1}))
    assert traffic.main(["--shapes", "64x64x8"]) == 1
    printed = capsys.readouterr().out
    assert "MISMATCH" in printed and "read x_ptr: counted Bytes(logical=12000, compulsory=6000)" in printed
