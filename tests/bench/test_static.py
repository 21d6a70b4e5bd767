"""The static gate: default configs pass it, and each of its rules fires. No GPU, and no driver."""

import json

import pytest
from helpers import python

from bench.static.cards import CARDS
from bench.static.gate import GROUPED, TASKS
from bench.static.machine_code import Code, trace


@pytest.mark.parametrize(
    "dtype, D, R, arch",
    [
        ("bf16", 768, "128", "sm_80,sm_90,sm_100"),
        ("bf16", 776, "24", "sm_90,sm_120"),  # rows at multiples of 8 elements, not of 16
        ("bf16", 4096, "64", "sm_86"),  # one of GROUPED
        ("fp16", 768, "96", "sm_89"),
        ("fp32", 768, "96", "sm_90"),
    ],
)
def test_defaults_pass(dtype, D, R, arch, tmp_path):
    """A representative part of what `make static` goes through."""
    file = tmp_path / "rows.json"
    out = python(
        "-m", "bench", "static", "--dtype", dtype, "--hidden", str(D), "--bottleneck", R, "--arch", arch, "--json", file
    )
    assert out.splitlines()[-1].endswith(" 0 failures")
    rows = json.loads(file.read_text())["rows"]
    assert {(row["R"], row["arch"]) for row in rows} == {(int(r), a) for r in R.split(",") for a in arch.split(",")}
    for row in rows:
        assert row["resident"] > 0 and row["code"]["loads"] and row["code"]["stores"], row
    assert {row["T"] for row in rows} == ({0, TASKS} if (D, int(R.split(",")[0])) in GROUPED else {0})
    assert {"x_ptr", "residual_ptr", "dy_ptr", "dx_ptr", "y_ptr"} <= {
        name for row in rows for name in row["activations"]
    }


MIXED = """
from bench.static.gate import compile_all
for arch, D, R, dtypes in (
    ("sm_86", 100, 16, ("fp32", "fp32", "bf16")),
    ("sm_100", 100, 64, ("fp32", "fp32", "bf16")),
    ("sm_120", 100, 256, ("fp16", "fp32", "fp16")),
):
    for row in compile_all(D, R, dtypes[0], arch, *dtypes[1:]):
        assert row.resident, row
"""


def test_mixed_dtypes_fit_shared_memory():
    """Tiles are loaded at the width they have in memory, which may be more than that of the products."""
    python("-c", MIXED)


BROKEN = """
import json
from adapter_ops.kernels import configs
from adapter_ops.kernels.problem import Tuning
from bench.static.gate import compile_all

def rows(arch, R=64, D=768, stride=None, **config):
    tiles = (("fused", configs.Config(**config, BLOCK_R=R)),) if config else ()
    found = compile_all(D, R, "bf16", arch, tuning=Tuning("fused", tiles), stride=stride, kernels=("fused_kernel",))
    return [[row.kernel, *row.failures] for row in found]

found = {
    "spill": rows("sm_80", BLOCK_M=128, BLOCK_D=128, num_warps=4, num_stages=2),
    "shared": rows("sm_86", BLOCK_M=64, BLOCK_D=128, num_warps=8, num_stages=5),
    "generation": rows("sm_90", BLOCK_M=32, BLOCK_D=64, num_warps=4, num_stages=2),
    "compiler": rows("sm_80", BLOCK_M=24, BLOCK_D=64, num_warps=4, num_stages=2),
    "odd": rows("sm_80", D=767),
    "scalar": rows("sm_80", stride=767),  # rows one element closer than they are long: every other one is not aligned
}
print(json.dumps(found))
"""


def test_rules_fire():
    found = json.loads(python("-c", BROKEN))
    for name, words in {
        "spill": "spills ",
        "shared": "shared memory over the limit by ",
        "generation": "no HGMMA",
        "compiler": "does not compile: ",
        "scalar": "x_ptr accessed 2 bytes at a time",
    }.items():
        kernel, *failures = found[name][0]
        assert len(failures) == (2 if name == "scalar" else 1)  # the rows of the residual are not aligned either
        assert kernel == "fused_kernel" and failures[0].startswith(words), (name, found[name])
    assert all(len(row) == 1 for row in found["odd"])  # nothing but scalar access is possible


LLIR = """
define void @kernel(ptr addrspace(1) %0, ptr addrspace(1) %1, i32 %2, ptr addrspace(1) %3) {
  %5 = getelementptr i8, ptr addrspace(1) %0, i64 2
  br label %6

6:
  %7 = phi ptr addrspace(1) [ %5, %4 ], [ %10, %6 ]
  %8 = tail call { i32, i32 } asm ";\\0A\\09ld.global.v2.b32 { $0, $1 }, [ $2 + 0 ];", "=r,=r,l"(ptr addrspace(1) %7)
  %9 = extractvalue { i32, i32 } %8, 0
  %10 = getelementptr i8, ptr addrspace(1) %7, i64 64
  store i32 %9, ptr addrspace(1) %1, align 4
  %11 = load <8 x bfloat>, ptr addrspace(1) inttoptr (i64 64 to ptr addrspace(1)), align 16
  %12 = icmp eq ptr addrspace(1) %3, null
  br i1 %12, label %13, label %6
"""


def test_trace_leads_back_to_arguments():
    """Through a loop, not through what was loaded; an address from elsewhere and an argument lost are both told."""
    assert trace(LLIR, {0: "x", 1: "y", 3: "w"}) == ({"x": 8, "y": 4, "w": 0, "?": 16}, 4)


@pytest.mark.parametrize(
    "arch, warps, registers, shared, tensor_memory, programs",
    [
        ("sm_80", 4, 128, 0, 0, 4),  # 16 warps of 128 registers fill the four files
        ("sm_80", 1, 16, 0, 0, 32),
        ("sm_86", 1, 16, 0, 0, 16),
        ("sm_89", 4, 32, 0, 0, 12),  # 48 warps
        ("sm_90", 8, 129, 0, 0, 1),  # 136 registers: three warps a file, twelve in all
        ("sm_90", 4, 32, 75 << 10, 0, 3),  # 3 × 76 KB
        ("sm_90", 4, 32, 228 << 10, 0, 0),
        ("sm_100", 4, 32, 0, 256, 2),
        ("gfx942", 4, 128, 0, 0, 4),  # 512 registers a lane
    ],
)
def test_resident(arch, warps, registers, shared, tensor_memory, programs):
    assert CARDS[arch].resident(Code(warps, registers, 0, shared, tensor_memory, {}, [], [], {}, False)) == programs
