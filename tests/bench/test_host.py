"""The GPU path on the host, without a GPU: what every kind of call launches, and how many instructions a call takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.host import build
from bench.host.launches import Descriptor, Launch, Pointer, differences, log

ROOT = Path(__file__).parents[2]

# Instructions a call over eager PyTorch's, at 64x768x64 in bf16; in chain of forward and backward of eight in a row.
LIMITS = {"fwd": 0.6, "fwd+bwd": 0.8, "chain": 0.72}


def host(*arguments):
    """stdout of python -m bench host, which makes the GPU path believe that there is a GPU."""
    if lack := build.missing(count="--count" in arguments):
        pytest.skip(lack)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ADAPTER_OPS_REQUIRE")}
    command = [sys.executable, "-W", "ignore", "-m", "bench", "host", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_every_kind_of_call_launches_what_triton_dispatches():
    *cases, summary, verdict = host("--check").splitlines()
    assert verdict == "all launches are equal" and summary.startswith(f"{len(cases)} cases") and len(cases) >= 40
    assert any("resident_kernel" in case for case in cases)


def test_instructions():
    found = {
        mode: ratio
        for mode, (_, _, ratio) in json.loads(host("--count", "--json", "--modes", ",".join(LIMITS))).items()
    }
    assert found.keys() == LIMITS.keys()
    assert all(found[mode] <= limit for mode, limit in LIMITS.items()), found


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None if name in ("g++", "valgrind") else name)
    assert build.missing() == "the rig needs g++"
    assert build.missing(count=True) == "the rig needs g++ and valgrind"


X, Y, Z, H = (Pointer(n << 20, (n << 20) + 4096) for n in (1, 2, 3, 4))
BOXES = Descriptor(X, (768, 64, 0, 0, 0), (1536, 0, 0, 0), (64, 64, 0, 0, 0), (9, 2))
LAUNCHES = [
    Launch("shrink_kernel", 7, (4, 2, 1), (128, 1, 1), 512, 0, 0, 0, (X, Z, H, 64)),
    Launch("expand_kernel", 8, (24, 1, 1), (128, 1, 1), 512, 0, 0, 0, (BOXES, H, Z, Y, 64)),
]


def logged(launches, x=X, y=Y):
    return log(launches, {"x": x, "y": y})


def changed(i, **fields):
    return [launch._replace(**fields) if j == i else launch for j, launch in enumerate(LAUNCHES)]


def test_logs_have_names_for_pointers():
    found = logged(LAUNCHES)
    assert found.rows[0][-4:] == ("x", "p0", "p1", 64)
    assert found.rows[1][-5:] == (("x", *BOXES[1:]), "p1", "p0", "y", 64)
    inside = logged(changed(0, parameters=(Pointer(X.address + 2, X.end), Z, H, 64)))
    assert inside.rows[0][-4] == "x + 2 bytes"


def test_logs_with_other_addresses_are_equal():
    x, y, z, h = (Pointer(p.address + (6 << 20), p.end + (6 << 20)) for p in (X, Y, Z, H))
    moved = [
        LAUNCHES[0]._replace(parameters=(x, z, h, 64)),
        LAUNCHES[1]._replace(parameters=(BOXES._replace(base=x), h, z, y, 64)),
    ]
    assert differences(logged(LAUNCHES), logged(moved, x, y)) == []


@pytest.mark.parametrize(
    "found, message",
    [
        (changed(0, kernel="dz_kernel"), "launches dz_kernel, expand_kernel; expected shrink_kernel, expand_kernel"),
        (changed(0, number=9), "launch 0, shrink_kernel: number is 9, expected 7"),
        (changed(1, grid=(12, 1, 1)), "launch 1, expand_kernel: grid is (12, 1, 1), expected (24, 1, 1)"),
        (changed(1, block=(256, 1, 1)), "launch 1, expand_kernel: block is (256, 1, 1), expected (128, 1, 1)"),
        (changed(0, shared=0), "launch 0, shrink_kernel: shared is 0, expected 512"),
        (changed(0, stream=-1), "launch 0, shrink_kernel: stream is -1, expected 0"),
        (changed(0, device=1), "launch 0, shrink_kernel: device is 1, expected 0"),
        (changed(0, parameters=(X, Z, H, 65)), "launch 0, shrink_kernel: parameter 3 is 65, expected 64"),
        (changed(0, parameters=(X, Z, H)), "launch 0, shrink_kernel: parameter 3 is nothing, expected 64"),
        (changed(1, parameters=(BOXES, Z, H, Y, 64)), "launch 1, expand_kernel: parameter 1 is p0, expected p1"),
        (changed(1, parameters=(BOXES, H, Z, X, 64)), "launch 1, expand_kernel: parameter 3 is x, expected y"),
        (
            changed(1, parameters=(BOXES._replace(base=Z), H, Z, Y, 64)),
            "launch 1, expand_kernel: parameter 0 is ('p0',",
        ),
        (changed(1, parameters=(BOXES._replace(box=(64, 128, 0, 0, 0)), H, Z, Y, 64)), "(64, 128, 0, 0, 0)"),
        (LAUNCHES[:1], "launches shrink_kernel; expected shrink_kernel, expand_kernel"),
        (
            [*LAUNCHES, LAUNCHES[1]],
            "launches shrink_kernel, expand_kernel, expand_kernel; expected shrink_kernel, expand_kernel",
        ),
    ],
)
def test_a_difference_is_found(found, message):
    wrong = differences(logged(LAUNCHES), logged(found))
    assert len(wrong) == 1 or found[1].parameters[1] == Z, wrong
    assert message in wrong[0]


def test_memory_without_a_name_lies_at_the_same_place_of_its_allocation():
    h = Pointer(H.address + 16, H.end)
    found = [LAUNCHES[0]._replace(parameters=(X, Z, h, 64)), LAUNCHES[1]._replace(parameters=(BOXES, h, Z, Y, 64))]
    wrong = differences(logged(LAUNCHES), logged(found))
    assert wrong == ["p1 has 4080 bytes to the end, expected 4096"]
