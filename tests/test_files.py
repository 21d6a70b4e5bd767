"""The file format of saved tasks: what a save writes, what a reader refuses, and what a crash leaves."""

import copy
import json
import multiprocessing
import os
import random
import signal
import stat
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from adapter_ops import files, strict_json
from adapter_ops.files import CONFIG_FILE, FORMAT, WEIGHTS_FILE, check_finite, kind_of, read, write

HEADER = {
    "format": FORMAT,
    "library": "0.0",
    "name": "cola",
    "config": {"bottleneck": 4, "scale": 1.5, "leave_out": []},
    "base": {
        "model_type": "bert",
        "name": None,
        "hidden_sizes": [8],
        "layers": {"encoder.layer": 2},
        "digest": "00ff",
    },
    "modules": ["classifier", "pooler"],
    "places": {"ffn": {"output": "output.dense", "entry": None, "norm": "output.LayerNorm"}},
    "labels": {"num_labels": 2, "id2label": {"0": "no", "1": "ja, gewiß"}, "problem_type": None},
}


def tensors(value: float = 1.0, size: int = 8) -> dict[str, torch.Tensor]:
    """A task whose tensors all hold one value."""
    return {
        "adapters.encoder.layer.0.output.down.weight": torch.full((4, size), value),
        "adapters.encoder.layer.0.output.up.weight": torch.full((size, 4), value, dtype=torch.bfloat16),
        "modules.classifier.weight": torch.full((2, size), value, dtype=torch.float64),
        "modules.classifier.bias": torch.full((2,), value, dtype=torch.float16),
        "modules.pooler.num_batches_tracked": torch.tensor(int(value)),
    }


def saved(value: float, size: int = 8) -> tuple[dict, dict[str, torch.Tensor]]:
    """What `write` takes of a save that can be told from others by its value."""
    return {**HEADER, "name": f"task{value}"}, tensors(value, size)


def value_of(folder: Path) -> float:
    """The value of a save, after checking that header and tensors are of the same one."""
    header, found = read(folder)
    value, size = float(found["modules.classifier.bias"][0]), found["modules.classifier.weight"].shape[1]
    assert header == {**HEADER, "name": f"task{value}"}
    assert_equal(found, tensors(value, size))
    return value


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in expected.items())


def leftovers(folder: Path) -> list[str]:
    return sorted(set(os.listdir(folder)) - {CONFIG_FILE, WEIGHTS_FILE})


def put(folder: Path, header: object = HEADER, **replaced: object) -> Path:
    """Writes a weights file whose header `write` would not accept."""
    text = header if isinstance(header, str) else json.dumps({**header, **replaced})
    (folder / WEIGHTS_FILE).write_bytes(save(tensors(), metadata={"adapter_ops": text}))
    return folder


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


SAMPLES = {int: 3, str: "a", dict: {}, list: [], bool: True, float: 1.5, type(None): None}
FIELDS = {  # with their types in JSON
    "format": {int},
    "library": {str},
    "name": {str},
    "config": {dict},
    "base": {dict},
    "base.model_type": {str, type(None)},
    "base.name": {str, type(None)},
    "base.hidden_sizes": {list},
    "base.hidden_sizes.0": {int},
    "base.layers": {dict},
    "base.layers.encoder": {int},
    "base.digest": {str, type(None)},
    "modules": {list},
    "modules.0": {str},
    "places": {dict, type(None)},
    "places.ffn": {dict},
    "places.ffn.output": {str},
    "places.ffn.entry": {str, type(None)},
    "places.ffn.norm": {str, type(None)},
    "labels": {dict, type(None)},
    "labels.num_labels": {int},
    "labels.id2label": {dict, type(None)},
    "labels.id2label.0": {str},
    "labels.problem_type": {str, type(None)},
}
IN_MAPS_AND_LISTS = {"base.hidden_sizes.0", "base.layers.encoder", "modules.0", "places.ffn", "labels.id2label.0"}


def holder(header: dict, path: str):
    """The object or list that has a field, and the field's key in it."""
    *outer, last = path.split(".")
    for key in outer:
        header = header[key]
    return header, int(last) if isinstance(header, list) else last


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_the_header_has_a_type(tmp_path, field):
    for kind, sample in SAMPLES.items():
        header = copy.deepcopy(HEADER)
        where, key = holder(header, field)
        where[key] = sample
        if kind in FIELDS[field]:
            continue
        with pytest.raises(ValueError, match=rf"header of .*{WEIGHTS_FILE}.*{key}.* is .*expected"):
            read(put(tmp_path, header))
        with pytest.raises(ValueError, match=rf"header of .*{WEIGHTS_FILE}.*{key}.* is .*expected"):
            write(tmp_path / "new", header, tensors())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("field", sorted(FIELDS.keys() - IN_MAPS_AND_LISTS))
def test_every_field_of_the_header_has_to_be_there(tmp_path, field):
    header = copy.deepcopy(HEADER)
    where, key = holder(header, field)
    del where[key]
    with pytest.raises(ValueError, match=f"lacks the field '{key}'"):
        read(put(tmp_path, header))


@pytest.mark.parametrize("field", sorted(path for path, kinds in FIELDS.items() if type(None) in kinds))
def test_fields_that_may_be_null(tmp_path, field):
    header = copy.deepcopy(HEADER)
    where, key = holder(header, field)
    where[key] = None
    write(tmp_path, header, tensors())
    assert read(tmp_path).header == header


def test_unknown_fields_are_kept_and_ignored(tmp_path):
    header = {**HEADER, "since_2_1": {"a": [1.5, None]}}
    assert read(put(tmp_path, header)).header == header


@pytest.mark.parametrize("number, words", [(3, "update adapter_ops"), (1, ""), (-1, "")])
def test_another_format_number_is_refused_before_anything_else(tmp_path, number, words):
    with pytest.raises(ValueError, match=f"is of format {number}, .* reads format {FORMAT}.*{words}"):
        read(put(tmp_path, {"format": number}))


JSON = {
    "deep lists": ("[" * 100_000, "deeper than 32 levels"),
    "deep objects": ('{"a":' * 100_000, "deeper than 32 levels"),
    "depth 33": ("[" * 33 + "1" + "]" * 33, "deeper than 32 levels"),
    "1e400": ('{"a": -1e400}', "-1e400' is not a finite number"),
    "NaN": ('{"a": NaN}', "'NaN' is not a finite number"),
    "Infinity": ('{"a": -Infinity}', "'-Infinity' is not a finite number"),
    "large integer": ('{"a": 9223372036854775808}', "does not fit into 64 bits"),
    "long integer": ("1" * 5000, "does not fit into 64 bits"),
    "key twice": ('{"a": [{"b": 1, "b": 1}]}', "the key 'b' twice"),
    "nothing": ("", "no valid JSON"),
    "cut off": ('{"a": 1', "no valid JSON"),
    "list": ("[]", "expected an object"),
    "null": ("null", "expected an object"),
}


@pytest.mark.parametrize("text, words", JSON.values(), ids=JSON)
def test_json_is_read_strictly(tmp_path, text, words):
    with pytest.raises(ValueError, match=words) as caught:
        read(put(tmp_path, text))
    assert WEIGHTS_FILE in str(caught.value)
    (tmp_path / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text.encode())  # the file's own header
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path)
    assert WEIGHTS_FILE in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, {1: 0, "1": 0}, "\ud800", 2**64])
def test_write_refuses_a_header_that_read_would_refuse(tmp_path, value):
    with pytest.raises(ValueError, match=WEIGHTS_FILE):
        write(tmp_path, {**HEADER, "config": {"scale": value}}, tensors())
    assert os.listdir(tmp_path) == []


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


def header_bytes(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


# Damaged and hostile files


@pytest.fixture
def little_memory():
    """Lets the process allocate 256 MiB more than it has, where the system says how much that is."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def mutants(content: bytes):
    """Damaged copies of a weights file, and what was done to each."""
    rng = random.Random(0)
    length = int.from_bytes(content[:8], "little")
    entries, weights = json.loads(content[8 : 8 + length]), content[8 + length :]
    yield from (("cut off", content[: rng.randrange(len(content))]) for _ in range(300))
    yield from (("longer", content + bytes(n)) for n in (1, 8, 4096))
    for _ in range(2500):
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 3))):
            flipped[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
        yield "bits flipped", bytes(flipped)
    for n in (0, 1, 7, 8, 9, length - 1, length + 1, len(content), 2**31, 2**32, 10**8 + 1, 2**63, 2**64 - 1):
        yield "length of the header", n.to_bytes(8, "little") + content[8:]
    huge = [2**40], [2**62, 2**62], [2**62] * 9, [0, 2**62, 2**62], [-1, -32], [2**64], [1.0], [True], ["4"], 4, None
    ranges = [0, 2**62], [2**62, 2**62 + 4], [-4, 4], [8, 4], [0], [0, 1, 2], [0, 2**64], [0.0, 4.0], {}, None
    names = [name for name in entries if name != "__metadata__"]
    for name in names:
        for field, values in (
            ("shape", huge),
            ("data_offsets", (*ranges, entries[names[0]]["data_offsets"], entries[names[-1]]["data_offsets"])),
            ("dtype", ("I8", "BOOL", "F8_E4M3", "C64", "f32", "", None, 4, "F" * 10**6)),
        ):
            for value in values:
                if entries[name][field] != value:
                    yield field, header_bytes({**entries, name: {**entries[name], field: value}}) + weights
                less = {k: v for k, v in entries[name].items() if k != field}
                yield f"no {field}", header_bytes({**entries, name: less}) + weights
        yield "tensor left out", header_bytes({k: v for k, v in entries.items() if k != name}) + weights
        yield "an entry of another type", header_bytes({**entries, name: []}) + weights
    for metadata in ({}, [], None, {"adapter_ops": 1}, {"adapter_ops": {}}, {"other": ""}):
        yield "metadata", header_bytes({**entries, "__metadata__": metadata}) + weights
    many = {f"adapters.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    yield "many tensors and gaps", header_bytes({**many, **entries, "z": 1}) + weights


def test_damaged_files_raise_value_error_and_take_neither_memory_nor_time(tmp_path, little_memory):
    write(tmp_path, *saved(1.0))
    path = tmp_path / WEIGHTS_FILE
    content = path.read_bytes()
    outcomes: Counter[tuple[str, str]] = Counter()
    for what, mutant in mutants(content):
        path.write_bytes(mutant)
        start = time.process_time()
        try:
            read(tmp_path)
            outcomes[what, "read"] += 1
        except ValueError as error:
            assert WEIGHTS_FILE in str(error)
            assert len(str(error)) < 1000
            outcomes[what, "refused"] += 1
        kind_of(tmp_path)
        assert time.process_time() - start < 2, what
    assert sum(outcomes.values()) > 3000
    assert {what for what, outcome in outcomes if outcome == "read"} <= {"bits flipped"}  # in a name or a field's text


@pytest.mark.parametrize(
    "first, second, weights, words",
    [
        ([0, 8], [4, 12], 12, "'b' in .* begins at byte 4, expected 8"),
        ([0, 8], [0, 8], 8, "'b' in .* begins at byte 0, expected 8"),
        ([0, 8], [12, 20], 20, "'b' in .* begins at byte 12, expected 8"),
        ([4, 12], [12, 20], 20, "'a' in .* begins at byte 4, expected 0"),
        ([0, 8], [8, 16], 15, "has 15 bytes of weights, but its tensors take 16"),
        ([0, 8], [8, 16], 17, "has 17 bytes of weights, but its tensors take 16"),
        ([0, 8], [8, 12], 12, r"shape \(2,\) and dtype F32, which do not fit offsets \[8, 12\]"),
    ],
)
def test_tensors_lie_one_behind_the_other_and_fill_the_file(tmp_path, first, second, weights, words):
    entries = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": offsets} for name, offsets in (("a", first), ("b", second))
    }
    start = header_bytes({**entries, "__metadata__": {"adapter_ops": json.dumps(HEADER)}})
    (tmp_path / WEIGHTS_FILE).write_bytes(start + bytes(weights))
    with pytest.raises(ValueError, match=words):
        read(tmp_path)


@pytest.mark.parametrize("length", [16 * 2**20 + 1, 10**8])
def test_a_header_over_the_limit_is_not_parsed(tmp_path, length):
    with open(tmp_path / WEIGHTS_FILE, "wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(length + 8)
    with pytest.raises(ValueError, match="the limit is 16777216"):
        read(tmp_path)


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / WEIGHTS_FILE)
    with pytest.raises(FileNotFoundError, match=WEIGHTS_FILE):
        read(tmp_path)


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
    here, elsewhere, day = files.host(), "00000000", 24 * 3600
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


# Which library's folder


ADAPTERHUB = {
    "config": {"mh_adapter": True, "output_adapter": True, "reduction_factor": 16, "non_linearity": "relu"},
    "hidden_size": 8,
    "model_class": "BertModel",
    "model_name": None,
    "model_type": "bert",
    "name": "cola",
    "version": "adapters.1.3.0",
}
PEFT = {"base_model_name_or_path": "bert-base-uncased", "peft_type": "LORA", "r": 8, "task_type": None}
OLD = {"format": 1, "name": "cola", "base": {"model_type": "bert"}, "modules": [], "config": {"bottleneck": 4}}


@pytest.mark.parametrize("name", ["adapter_config.json", CONFIG_FILE])
@pytest.mark.parametrize(
    "fields, kind",
    [
        (ADAPTERHUB, "adapterhub"),
        ({**ADAPTERHUB, "hidden_size": None}, "adapterhub"),
        ({k: v for k, v in ADAPTERHUB.items() if k != "version"}, "adapterhub"),
        (PEFT, "peft"),
        ({**PEFT, "peft_type": "IA3"}, "peft"),
        (OLD, "adapter_ops_1"),
        (HEADER, "adapter_ops"),
        ({**HEADER, "format": 3}, "adapter_ops"),
        ({"model_type": "bert", "hidden_size": 8}, None),  # a model's config.json
        ({"config": {}}, None),
        ([], None),
        (3, None),
    ],
)
def test_kinds_are_told_apart_by_the_fields_of_the_json_file(tmp_path, name, fields, kind):
    (tmp_path / name).write_text(json.dumps(fields), encoding="utf-8")
    assert kind_of(tmp_path) == kind


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "adapter.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    "metadata, kind",
    [({"adapter_ops": "{}"}, "adapter_ops"), ({"adapter_config": "{}"}, "adapter_ops_1"), ({"format": "pt"}, None)],
)
def test_kinds_are_told_apart_by_the_metadata_of_the_weights(tmp_path, name, metadata, kind):
    (tmp_path / name).write_bytes(save({"w": torch.ones(2).bool()}, metadata=metadata))
    assert kind_of(tmp_path) == kind


def test_kind_of_a_folder_without_an_adapter(tmp_path):
    assert kind_of(tmp_path) is None
    assert kind_of(tmp_path / "nowhere") is None
    (tmp_path / WEIGHTS_FILE).write_bytes(b"damaged")
    (tmp_path / "adapter_config.json").write_text("[" * 100_000, encoding="utf-8")
    assert kind_of(tmp_path) is None
    write(tmp_path, HEADER, tensors())
    assert kind_of(tmp_path) == "adapter_ops"


def test_this_librarys_files_come_first_beside_anothers(tmp_path):
    write(tmp_path, HEADER, tensors())
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTERHUB), encoding="utf-8")
    assert kind_of(tmp_path) == "adapter_ops"
    assert read(tmp_path).header == HEADER


@pytest.mark.parametrize("misnamed", [False, True], ids=["", "weights under our name"])
@pytest.mark.parametrize(
    "fields, words",
    [
        (ADAPTERHUB, r"AdapterHub: use adapter_ops\.integrations\.adapterhub\.load_adapterhub"),
        (PEFT, r"PEFT adapter \(peft_type 'LORA'\), which adapter_ops does not read"),
        (OLD, "format 1, which was never released .* save the task again"),
    ],
)
def test_read_says_what_a_folder_of_another_format_holds(tmp_path, fields, words, misnamed):
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields), encoding="utf-8")
    (tmp_path / (WEIGHTS_FILE if misnamed else "adapter_model.safetensors")).write_bytes(save({"w": torch.ones(2)}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json .*{words}"):
        read(tmp_path)


def test_read_names_the_file_that_is_missing(tmp_path):
    for folder, words in (
        (tmp_path / "nowhere", "nowhere does not exist, expected a folder with adapter_ops.safetensors"),
        (tmp_path, "has no adapter_ops.safetensors$"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            read(folder)
    write(tmp_path, HEADER, tensors())
    with pytest.raises(FileNotFoundError, match="is a file, expected a folder with"):
        read(tmp_path / WEIGHTS_FILE)
    os.rename(tmp_path / WEIGHTS_FILE, tmp_path / "adapter.safetensors")
    with pytest.raises(FileNotFoundError, match=r"though adapter\.safetensors is of its format"):
        read(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(save({"w": torch.ones(2)}))
    (tmp_path / "adapter.safetensors").unlink()
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match="no metadata 'adapter_ops', so adapter_ops did not write it"):
        read(tmp_path)
