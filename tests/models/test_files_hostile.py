"""What a reader refuses: headers and JSON that are not as specified, damaged files, and other libraries' folders."""

import copy
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers_files import HEADER, header_bytes, put, saved, tensors
from safetensors.torch import save

from adapter_ops.models.files import CONFIG_FILE, FORMAT, WEIGHTS_FILE, kind_of, read, write

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
    "sites": {dict, type(None)},
    "sites.ffn": {dict},
    "sites.ffn.output": {str},
    "sites.ffn.entry": {str, type(None)},
    "sites.ffn.norm": {str, type(None)},
    "labels": {dict, type(None)},
    "labels.num_labels": {int},
    "labels.id2label": {dict, type(None)},
    "labels.id2label.0": {str},
    "labels.problem_type": {str, type(None)},
}
IN_MAPS_AND_LISTS = {"base.hidden_sizes.0", "base.layers.encoder", "modules.0", "sites.ffn", "labels.id2label.0"}


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
