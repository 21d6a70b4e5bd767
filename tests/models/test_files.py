"""The file format of saved tasks: what a save writes, what a caller expects of a read, and what a crash leaves."""

import json
import multiprocessing
import os
import random
import signal
import stat
import sys
import time

import pytest
import torch
from helpers_files import HEADER, assert_equal, header_bytes, leftovers, saved, tensors, value_of
from safetensors.torch import save

from adapter_ops.models import disk, files, strict_json
from adapter_ops.models.files import CONFIG_FILE, WEIGHTS_FILE, check_finite, read, write


def test_read_returns_what_write_took(tmp_path):
    write(tmp_path / "new" / "folder", HEADER, tensors(3.0))
    header, found = read(tmp_path / "new" / "folder")
    assert header == HEADER
    assert_equal(found, tensors(3.0))
    assert {tuple(read(tmp_path / "new" / "folder").tensors) for _ in range(10)} == {
        tuple(found)
    }  # always in one order
    assert json.loads((tmp_path / "new" / "folder" / CONFIG_FILE).read_text(encoding="utf-8")) == HEADER


def test_reading_needs_the_weights_file_only(tmp_path):
    write(tmp_path, *saved(1.0))
    (tmp_path / CONFIG_FILE).unlink()
    assert value_of(tmp_path) == 1.0
    (tmp_path / CONFIG_FILE).write_text("of another save", encoding="utf-8")
    assert value_of(tmp_path) == 1.0


def test_tensors_are_written_as_dense_copies(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    given = {
        "adapters.transposed": base.T,
        "adapters.strided": base[::2, ::3],
        "adapters.expanded": base[:1].expand(3, 6),
        "adapters.same": base,
        "adapters.same_again": base.view(-1),
        "adapters.trained": torch.nn.Parameter(base),
        "adapters.negative": torch.imag(torch.tensor([1 + 2j]).conj()),
        "adapters.scalar": torch.tensor(2.5),
        "adapters.empty": torch.empty(0, 3),
    }
    write(tmp_path, HEADER, given)
    with torch.device("meta"):  # the caller's default device makes no difference
        found = read(tmp_path).tensors
    assert_equal(found, given)
    found["adapters.same"].zero_()
    assert found["adapters.same_again"].any()  # no two share memory


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path, HEADER, tensors())
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (CONFIG_FILE, WEIGHTS_FILE)} == {mode}


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.uint64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floating_point_tensors_are_kept(tmp_path, dtype):
    write(tmp_path, HEADER, {"adapters.w": torch.tensor([1.5, -2.0], dtype=dtype)})
    t = read(tmp_path).tensors["adapters.w"]
    assert t.dtype == dtype
    assert t.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_other_dtypes_are_refused_by_write_and_by_read(tmp_path, dtype):
    t = {"adapters.w": torch.ones(2).to(dtype)}
    with pytest.raises(ValueError, match=r"adapters\.w .*dtype.*expected F16 or BF16 or F32 or F64"):
        write(tmp_path, HEADER, t)
    assert os.listdir(tmp_path) == []
    (tmp_path / WEIGHTS_FILE).write_bytes(save(t, metadata={"adapter_ops": json.dumps(HEADER)}))
    with pytest.raises(ValueError, match=r"adapters\.w .*dtype.*expected F16 or BF16 or F32 or F64"):
        read(tmp_path)


def test_int64_is_for_the_counter_of_a_batch_norm(tmp_path):
    write(tmp_path, HEADER, {"modules.norm.num_batches_tracked": torch.tensor(7)})
    assert read(tmp_path).tensors["modules.norm.num_batches_tracked"].item() == 7
    with pytest.raises(ValueError, match="'I64', expected F16 or BF16 or F32 or F64"):
        write(tmp_path, HEADER, {"modules.norm.not_num_batches_tracked": torch.tensor(7)})
    with pytest.raises(ValueError, match="'F32', expected I64"):
        write(tmp_path, HEADER, {"modules.norm.num_batches_tracked": torch.tensor(7.0)})


@pytest.mark.parametrize(
    "name, t, words",
    [
        ("a", torch.ones(2, device="meta"), "meta device"),
        ("a", torch.ones(2).to_sparse(), "layout torch.sparse_coo"),
        ("a", torch.ones(2, dtype=torch.complex128), "complex128"),
        ("__metadata__", torch.ones(2), "name '__metadata__'"),
        ("a" * 1001, torch.ones(2), "1001 characters"),
        ("a", torch.ones((1,) * 9), "shape"),
    ],
)
def test_tensors_without_a_place_in_the_file_are_refused(tmp_path, name, t, words):
    write(tmp_path, *saved(1.0))
    with pytest.raises(ValueError, match=words):
        write(tmp_path, HEADER, {name: t})
    assert value_of(tmp_path) == 1.0
    assert leftovers(tmp_path) == []


def test_fake_tensors_are_refused(tmp_path):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(2)
    with pytest.raises(ValueError, match="FakeTensor"):
        write(tmp_path, HEADER, {"a": fake})


def test_check_finite_names_tensors_and_counts(tmp_path):
    nan, inf = float("nan"), float("inf")
    given = {
        "adapters.a": torch.tensor([nan, 1.0, inf]),
        "adapters.b": torch.ones(2),
        "adapters.c": torch.full((2,), -inf),
    }
    write(tmp_path, HEADER, given)
    found = read(tmp_path)
    with pytest.raises(
        ValueError, match=r"'cola' has 2 tensors .* of 3: adapters\.a \(1 NaN and 1 infinite of 3\), .*\.c"
    ):
        check_finite(found)
    write(tmp_path, HEADER, tensors())
    check_finite(read(tmp_path))


# What a caller expects


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors().items()}


def test_limit_gets_the_header_and_bounds_every_tensor(tmp_path):
    write(tmp_path, HEADER, tensors())
    seen = []
    found = read(tmp_path, limit=lambda header: seen.append(header) or shapes())
    assert seen == [HEADER]
    assert found.tensors.keys() == tensors().keys()
    name = "adapters.encoder.layer.0.output.down.weight"
    with pytest.raises(ValueError, match=rf"{name} in .* has shape \(4, 8\), the model has \(4, 9\)"):
        read(tmp_path, limit=lambda header: {**shapes(), name: (4, 9)})
    with pytest.raises(ValueError, match=r"lacks 1 of 6 tensors: adapters\.more"):
        read(tmp_path, limit=lambda header: {**shapes(), "adapters.more": (1,)})
    with pytest.raises(ValueError, match=f"1 tensors that do not belong to this model: {name}"):
        read(tmp_path, limit=lambda header: {k: shape for k, shape in shapes().items() if k != name})


def test_limit_may_leave_out_a_module_but_no_part_of_one(tmp_path):
    write(tmp_path, HEADER, {**tensors(), "modules.norm.weight": torch.ones(8)})
    expected = {k: s for k, s in {**shapes(), "modules.norm.weight": (8,)}.items() if "classifier" not in k}
    assert read(tmp_path, limit=lambda header: expected).tensors.keys() == expected.keys()
    with pytest.raises(ValueError, match=r"1 tensors that do not belong to this model: modules\.classifier\.bias"):
        read(tmp_path, limit=lambda header: {**expected, "modules.classifier.weight": (2, 8)})
    del expected["modules.norm.weight"]  # which header["modules"] does not list
    with pytest.raises(ValueError, match=r"1 tensors that do not belong to this model: modules\.norm\.weight"):
        read(tmp_path, limit=lambda header: expected)


def test_limit_refuses_before_the_weights_are_read(tmp_path):
    entry = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    start = header_bytes({"__metadata__": {"adapter_ops": json.dumps(HEADER)}, "adapters.w": entry})
    with open(tmp_path / WEIGHTS_FILE, "wb") as file:
        file.write(start)
        file.truncate(len(start) + 2**40)  # a sparse file of one tebibyte
    with pytest.raises(ValueError, match=r"has shape \(274877906944,\), the model has \(4,\)"):
        read(tmp_path, limit=lambda header: {"adapters.w": (4,)})


# Saves at the same time, and saves that die


def test_a_save_at_any_point_of_a_read_is_seen_whole_or_not_at_all(tmp_path):
    old, new = saved(1.0), saved(2.0, size=12)
    lines: set[tuple[object, int]] = set()  # of the two modules, as far as the read got
    due = 0

    def trace(frame, event, _):
        if frame.f_code.co_filename not in (files.__file__, strict_json.__file__):
            return None
        before = len(lines)
        lines.add((frame.f_code, frame.f_lineno))
        if before < len(lines) == due:
            sys.settrace(None)
            write(tmp_path, *new)  # as another process might, exactly here
        return trace

    def read_with_save_at(line: int) -> float:
        nonlocal due
        lines.clear()
        due = line
        write(tmp_path, *old)
        sys.settrace(trace)
        try:
            return value_of(tmp_path)
        finally:
            sys.settrace(None)

    assert read_with_save_at(0) == 1.0
    total = len(lines)
    assert total > 80
    assert {read_with_save_at(line) for line in range(1, total + 1)} == {1.0, 2.0}


FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def start(function, *arguments):
    """Starts a process that runs a function."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def save_and_read(folder, me, writes):
    torch.set_num_threads(1)
    for i in range(writes):
        write(folder, *saved(float(me * writes + i), size=8 + me))
        value_of(folder)


@FORK
def test_processes_that_save_and_read_one_folder_at_once(tmp_path):
    write(tmp_path, *saved(0.0))
    processes = [start(save_and_read, tmp_path, me, 50) for me in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert value_of(tmp_path) in {me * 50.0 + 49 for me in range(4)}
    assert leftovers(tmp_path) == []


def save_until_killed(folder, size, started):
    torch.set_num_threads(1)
    started.set()
    while True:
        for value in (1.0, 2.0):
            write(folder, *saved(value, size))


@FORK
def test_a_folder_loads_after_a_save_was_killed_at_any_time(tmp_path):
    rng = random.Random(0)
    write(tmp_path, *saved(0.0))
    killed_in_a_save = 0
    for _ in range(30):
        started = multiprocessing.get_context("fork").Event()
        process = start(save_until_killed, tmp_path, 20_000, started)
        assert started.wait(60)
        time.sleep(0.05 * rng.random())
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        value_of(tmp_path)
        killed_in_a_save += bool(leftovers(tmp_path))
        write(tmp_path, *saved(3.0))
        assert leftovers(tmp_path) == []
    assert killed_in_a_save


def save_and_die(folder, name, call):
    """Kills this process at a numbered call of a function of `os`."""
    calls, real = 0, getattr(os, name)

    def counted(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(os, name, counted)
    write(folder, *saved(2.0))


@FORK
@pytest.mark.parametrize(
    "name, call, value, left",
    [("fsync", 1, 1.0, 1), ("fsync", 2, 1.0, 2), ("replace", 1, 1.0, 2), ("replace", 2, 2.0, 1), ("fsync", 3, 2.0, 0)],
)
def test_a_save_takes_effect_when_the_weights_are_renamed(tmp_path, name, call, value, left):
    write(tmp_path, *saved(1.0))
    process = start(save_and_die, tmp_path, name, call)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert value_of(tmp_path) == value
    assert len(leftovers(tmp_path)) == left
    write(tmp_path, *saved(3.0))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name, call, value", [("fsync", 1, 1.0), ("fsync", 2, 1.0), ("replace", 1, 1.0)])
def test_an_error_leaves_the_old_files_and_nothing_temporary(tmp_path, monkeypatch, name, call, value):
    write(tmp_path, *saved(1.0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls, real = 0, getattr(os, name)

    def fails(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, name, fails)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, *saved(2.0))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_folder_in_a_files_place_stops_a_save_before_it_changes_anything(tmp_path, name):
    write(tmp_path, *saved(1.0))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    other = tmp_path / ({CONFIG_FILE, WEIGHTS_FILE} - {name}).pop()
    before = other.read_bytes()
    with pytest.raises(IsADirectoryError, match=name):
        write(tmp_path, *saved(2.0))
    assert other.read_bytes() == before
    assert leftovers(tmp_path) == []


def temporary(folder, process, host, file=WEIGHTS_FILE, age=0.0):
    """A temporary file such as a killed save leaves. Returns its name."""
    path = folder / f".{file}.{process}.{host}{random.randbytes(8).hex()}.tmp"
    path.write_bytes(b"half a file")
    os.utime(path, (time.time() - age,) * 2)
    return path.name


@FORK
def test_only_temporary_files_that_nobody_needs_are_removed(tmp_path):
    ended = start(time.sleep, 0)
    ended.join()
    here, elsewhere, day = disk.host(), "00000000", 24 * 3600
    needed = [
        temporary(tmp_path, os.getpid(), here),  # this process, another thread
        temporary(tmp_path, os.getppid(), here, CONFIG_FILE),
        temporary(tmp_path, 1, here),  # another user's, where the tests do not run as root
        temporary(tmp_path, ended.pid, elsewhere, age=day - 60),  # a process of that number may run there
        temporary(tmp_path, 4294967296, here),  # no number of a process
    ]
    others = [".adapter_ops.safetensors.tmp", ".adapter_ops.safetensors.1.00.tmp", "adapter_ops.safetensors.1.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"not of this library")
        os.utime(tmp_path / name, (0, 0))
    temporary(tmp_path, ended.pid, here)
    temporary(tmp_path, ended.pid, here, CONFIG_FILE)
    temporary(tmp_path, ended.pid, elsewhere, age=day + 60)
    temporary(tmp_path, os.getpid(), here, age=day + 60)
    write(tmp_path, HEADER, tensors())
    assert leftovers(tmp_path) == sorted(needed + others)
