"""Damaged and hostile folders in AdapterHub's format: an error that says why, and a model that is as it was."""

import random
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hub_helpers import assert_rejected, bert, rewrite, state_of
from safetensors.torch import save_file

from adapter_ops.integrations.adapterhub import load_adapterhub


def test_files_that_cannot_be_read(folder, tmp_path):
    weights, safe, config = (folder / n for n in ("pytorch_adapter.bin", "adapter.safetensors", "adapter_config.json"))
    tensors, good = torch.load(weights), weights.read_bytes()
    for bad in (good[: len(good) // 2], good[:-50], b"", b"x"):
        weights.write_bytes(bad)
        assert_rejected(folder, "pytorch_adapter.bin cannot be read")
    torch.save({"key": tmp_path}, weights)  # a pickle of more than tensors
    assert_rejected(folder, "pytorch_adapter.bin cannot be read")
    torch.save([1], weights)
    assert_rejected(folder, "pytorch_adapter.bin cannot be read")
    torch.save(dict.fromkeys(tensors), weights)
    assert_rejected(folder, "no dense tensor")
    torch.save({key: t.to_sparse() for key, t in tensors.items()}, weights)
    assert_rejected(folder, "no dense tensor")
    torch.save({key: t.to("meta") for key, t in tensors.items()}, weights)
    assert_rejected(folder, "no dense tensor")
    save_file(tensors, safe)
    load_adapterhub(bert(), folder)  # safetensors comes first
    safe.write_bytes(safe.read_bytes()[:-20])
    assert_rejected(folder, "adapter.safetensors cannot be read")
    safe.unlink(), weights.unlink()
    assert_rejected(folder, "pytorch_adapter.bin", FileNotFoundError)
    config.write_text(config.read_text()[:-20])
    weights.touch()
    assert_rejected(folder, "adapter_config.json is no adapter's config")
    config.write_text('{"config": "pfeiffer", "name": "a"}')
    assert_rejected(folder, r"adapter_config.json is no adapter's config, which has the fields config \(dict\)")
    config.unlink()
    assert_rejected(folder, "adapter_config.json", FileNotFoundError)
    assert_rejected(folder / "nowhere", "nowhere", FileNotFoundError)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("safe", [False, True])
def test_dtypes_that_are_refused(dtype, safe, folder):
    tensors = {key: t.to(dtype) for key, t in torch.load(folder / "pytorch_adapter.bin").items()}
    if safe:
        save_file(tensors, folder / "adapter.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_adapter.bin")
    assert_rejected(folder, f"dtype {dtype}, expected one of bfloat16, float16, float32, float64")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_that_are_converted(dtype, folder):
    tensors = {key: t.to(dtype) for key, t in torch.load(folder / "pytorch_adapter.bin").items()}
    torch.save(tensors, folder / "pytorch_adapter.bin")
    model = bert()
    load_adapterhub(model, folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_files_are_read_once(folder, monkeypatch):
    read, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or real(path))
    load_adapterhub(bert(), folder)
    assert read == ["adapter_config.json", "pytorch_adapter.bin"]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
def test_sizes_never_allocate(folder):
    """A config or a file that says more than it holds is refused before anything of that size is made."""
    import resource

    rewrite(folder, reduction_factor=3.2e-5)  # three layers of 256 MB
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, limit[1]))
    try:
        assert_rejected(folder, r"shape \(2, 32\), expected \(1000000, 32\)")
        rewrite(folder, reduction_factor=1e-9)
        assert_rejected(folder, "reduction_factor=1e-09")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    rewrite(folder, reduction_factor=16)
    weights = folder / "pytorch_adapter.bin"
    with zipfile.ZipFile(weights) as source:
        entries = {entry.filename: source.read(entry) for entry in source.infolist()}
    with zipfile.ZipFile(weights, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in entries.items():
            bomb.writestr(name, content if "/data/" not in name else bytes(2**22))
    assert_rejected(folder, "compressed")


def test_json_that_nests_or_has_no_finite_numbers(folder):
    file = folder / "adapter_config.json"
    good = file.read_text()
    for bad in ("[" * 10**5, '{"a":' * 10**5, "[" * 10**5 + "]" * 10**5, "NaN", "Infinity", "9" * 5000, "1e400"):
        file.write_text(good.replace('"dropout": 0.0', f'"dropout": {bad}'))
        assert_rejected(folder, "config|dropout")
    for depth in (300, 900):
        file.write_text(good.replace('"dropout": 0.0', '"dropout": ' + "[" * depth + "]" * depth))
        assert_rejected(folder, "config|dropout")


def test_random_damage(folder):
    """Thousands of mutated files: ValueError or FileNotFoundError, or a load; the model is unchanged after an error."""
    rng = random.Random(0)
    model = bert()
    before = state_of(model)
    errors = 0
    save_file(torch.load(folder / "pytorch_adapter.bin"), folder.parent / "safe")
    originals = {path.name: path.read_bytes() for path in folder.iterdir()}
    originals["adapter.safetensors"] = (folder.parent / "safe").read_bytes()
    for trial in range(900):
        name = list(originals)[trial % 3]
        (folder / "adapter.safetensors").unlink(missing_ok=True)
        for file, content in originals.items():
            if file == name or file != "adapter.safetensors":
                (folder / file).write_bytes(content)
        data = bytearray(originals[name])
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            start = 0 if name == "adapter_config.json" or rng.random() < 0.5 else len(data) - 1500
            for _ in range(rng.choice((1, 1, 3, 20))):
                data[rng.randrange(max(start, 0), min(start + 1500, len(data)))] = rng.randrange(256)
        (folder / name).write_bytes(data)
        try:
            load_adapterhub(model, folder, f"t{trial}")
        except (ValueError, FileNotFoundError):
            errors += 1
            assert state_of(model) == before
        else:
            model = bert()
            before = state_of(model)
    assert errors > 300
