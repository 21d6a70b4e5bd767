"""The file format of saved tasks: a folder is written, read and checked here, without any model.

The weights file carries the whole header in its metadata. The rename of that one file is therefore the point at which
a save takes effect, and a reader needs no other file. README.md beside this module specifies the format.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .disk import replace_files
from .strict_json import check, parse, short

CONFIG_FILE, WEIGHTS_FILE, FORMAT = "adapter_ops.json", "adapter_ops.safetensors", 2
METADATA = "adapter_ops"  # the entry of the weights file's metadata that is the header

Kind = Literal["adapter_ops", "adapter_ops_1", "adapterhub", "peft"]
_OURS: dict[str, Kind] = {METADATA: "adapter_ops", "adapter_config": "adapter_ops_1"}  # by an entry of the metadata

# Patterns for `strict_json.check`, of the header and of a tensor's entry.
_HEADER = {
    "format": int,
    "library": str,
    "name": str,
    "config": dict,
    "base": {
        "model_type": (str, None),
        "name": (str, None),
        "hidden_sizes": [int],
        "layers": {str: int},
        "digest": (str, None),
    },
    "modules": [str],
    "sites": ({str: {"output": str, "entry": (str, None), "norm": (str, None)}}, None),
    "labels": ({"num_labels": int, "id2label": ({str: str}, None), "problem_type": (str, None)}, None),
}
_ENTRY = {"dtype": str, "shape": [int], "data_offsets": [int]}

# The dtypes of tensors, under safetensors' names. I64 is for the counter of a BatchNorm only.
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
_BYTES = {name: dtype.itemsize for dtype, name in _DTYPES.items()}
_FLOATS = tuple(name for dtype, name in _DTYPES.items() if dtype.is_floating_point)
_COUNTER = "num_batches_tracked"

_HEADER_LIMIT = 16 * 2**20  # bytes, enough for a hundred thousand tensors
_NAME_LIMIT = 1000
_DIMENSIONS = 8


class Saved(NamedTuple):
    """What `read` returns: the header, and the tensors by name, on the CPU."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]


def write(folder: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a task into a folder, which is made if it does not exist.

    Both files are replaced as `disk.replace_files` does it, the weights first. A save that is interrupted at any point
    leaves the old task or the new one, whole.

    Args:
        folder: where to. Other files in it are left alone.
        header: the fields that README.md specifies; "format" is `FORMAT`.
        tensors: by name, of dtype float16, bfloat16, float32 or float64. Those whose names end in
            "num_batches_tracked", which a BatchNorm has, are int64. They are written as dense copies: they may be on
            any device, share memory and have any strides.

    Raises:
        ValueError: a header or a tensor that `read` would refuse, or a tensor that holds no values of its own, such as
            one on the meta device. Nothing is written then.
        OSError: the system cannot write. The files that are in place stay whole, and nothing temporary is left.
    """
    folder = Path(folder)
    path = folder / WEIGHTS_FILE
    try:
        text = json.dumps(dict(header), indent=2, ensure_ascii=False, allow_nan=False)
        config = f"{text}\n".encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the header for {path} cannot be written as JSON: {error}") from error
    data = save({name: _dense(name, t, path) for name, t in tensors.items()}, metadata={METADATA: text})
    _read_head(io.BytesIO(data), len(data), path)  # a reader's checks, before anything is changed
    replace_files(folder, {WEIGHTS_FILE: data, CONFIG_FILE: config})


def read(
    folder: str | os.PathLike[str], *, limit: Callable[[dict[str, Any]], Mapping[str, tuple[int, ...]]] | None = None
) -> Saved:
    """Reads a task from a folder that `write` wrote, and checks all of it before it builds any tensor.

    The weights file is opened once and each of its bytes is read once, so a save that takes place meanwhile is seen
    whole or not at all.

    Args:
        folder: holds adapter_ops.safetensors. No other file is read.
        limit: called with the header before any weights are read; returns the shapes of the tensors that the caller
            takes. The file must hold each of them in this shape, and only those are returned. Without it, every tensor
            of the file is returned. A module of header["modules"] may be left out whole; any other tensor that is not
            named is an error.

    Raises:
        FileNotFoundError: no such folder, or no adapter_ops.safetensors in it.
        ValueError: the file is damaged, of another format or not what `write` writes; a tensor is missing, surplus or
            not of the shape that `limit` gives; or the folder holds an adapter of another library.
    """
    folder = Path(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise _refusal(folder)
    with open(path, "rb") as file:
        head = _read_head(file, os.fstat(file.fileno()).st_size, path)
        names = set(head.shapes)
        if limit is not None:
            names = _compare(head, limit(head.header), path)
        body = file.read(head.size)
    if len(body) != head.size:
        raise ValueError(f"{path} ends after {len(body)} of {head.size} bytes of weights")
    try:
        with torch.device("cpu"):  # whatever the caller's default device is
            tensors = load(head.raw + body)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return Saved(head.header, {name: tensors[name] for name in head.shapes if name in names})


def read_header(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a saved task, with the errors and checks of `read`. Its weights are not read."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise _refusal(path.parent)
    with open(path, "rb") as file:
        return _read_head(file, os.fstat(file.fileno()).st_size, path).header


def check_finite(saved: Saved) -> None:
    """Raises ValueError if any tensor holds NaN or infinity; the message names the first of them with their counts."""
    bad = []
    for name, t in saved.tensors.items():
        nan, infinite = int(t.isnan().sum()), int(t.isinf().sum())
        if nan or infinite:
            bad.append(f"{name} ({nan} NaN and {infinite} infinite of {t.numel()})")
    if bad:
        raise ValueError(
            f"the task {saved.header['name']!r} has {len(bad)} tensors with values that are not finite, of "
            f"{len(saved.tensors)}: {', '.join(bad[:3])}"
        )


def kind_of(folder: str | os.PathLike[str]) -> Kind | None:
    """Which library's adapter a folder holds, by what its files contain and not by their names.

    Returns:
        "adapter_ops" for what `write` writes, "adapter_ops_1" for this library's format before the first release,
        "adapterhub" or "peft" for an adapter of the package `adapters` or `peft`, and None for anything else, such as a
        folder that does not exist. This library's own files come first where a folder holds several.
    """
    return _identify(Path(folder))[0]


class _Head(NamedTuple):
    """What stands before the weights in a file that passed every check."""

    raw: bytes
    header: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    size: int  # bytes of weights


def _read_head(file: BinaryIO, size: int, path: Path) -> _Head:
    """Reads and checks a weights file up to the weights. `size` is that of the whole file, in bytes."""
    raw, entries, metadata = _read_entries(file, size, path)
    if METADATA not in metadata:
        raise _refusal(path.parent)
    where = f"the header of {path}"
    header = parse(metadata[METADATA], where)
    number = header.get("format") if isinstance(header, dict) else None
    if type(number) is int and number != FORMAT:
        newer = ": update adapter_ops" if number > FORMAT else ""
        raise ValueError(f"{path} is of format {number}, and this version of adapter_ops reads format {FORMAT}{newer}")
    check(header, _HEADER, where)
    size -= len(raw)
    shapes: dict[str, tuple[int, ...]] = {}
    spans = []
    for name, entry in entries.items():
        if len(name) > _NAME_LIMIT:
            raise ValueError(f"{path} has a tensor whose name has {len(name)} characters, the limit is {_NAME_LIMIT}")
        where = f"the entry of {name!r} in {path}"
        check(entry, _ENTRY, where)
        dtype, shape, offsets = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        _check_dtype(name, dtype, path)
        if len(shape) > _DIMENSIONS or any(n < 0 for n in shape) or math.prod(max(n, 1) for n in shape) >= 2**63:
            raise ValueError(f"{where} has shape {entry['shape'][: _DIMENSIONS + 1]}, which no tensor has")
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _BYTES[dtype]:
            raise ValueError(f"{where} has shape {shape} and dtype {dtype}, which do not fit offsets {offsets[:3]}")
        shapes[name] = shape
        spans.append((*offsets, name))
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise ValueError(f"the entry of {name!r} in {path} begins at byte {begin}, expected {end}")
        end = stop
    if end != size:
        raise ValueError(f"{path} has {size} bytes of weights, but its tensors take {end}")
    return _Head(raw, header, shapes, size)


def _read_entries(file: BinaryIO, size: int, path: Path) -> tuple[bytes, dict[str, Any], dict[str, str]]:
    """The start of a safetensors file: its bytes, its tensors' entries and its metadata."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError(f"{path} is cut off or no safetensors file: its {size} bytes do not hold its header")
    if length > _HEADER_LIMIT:
        raise ValueError(f"{path} has a header of {length} bytes, the limit is {_HEADER_LIMIT}")
    raw = file.read(length)
    where = f"the safetensors header of {path}"
    entries = parse(raw, where)
    check(entries, {str: dict}, where)
    metadata = entries.pop("__metadata__", {})
    check(metadata, {str: str}, where)
    return start + raw, entries, metadata


def _check_dtype(name: str, dtype: str, path: Path) -> None:
    expected = ("I64",) if name.rpartition(".")[2] == _COUNTER else _FLOATS
    if dtype not in expected:
        raise ValueError(f"{name} in {path} has dtype {short(dtype)}, expected {' or '.join(expected)}")


def _compare(head: _Head, expected: Mapping[str, tuple[int, ...]], path: Path) -> set[str]:
    """The names to take. Raises ValueError where the file does not hold what the caller expects."""
    if missing := expected.keys() - head.shapes.keys():
        raise ValueError(f"{path} lacks {len(missing)} of {len(expected)} tensors: {', '.join(sorted(missing)[:3])}")
    taken = {module for name in expected for module in _modules_above(name)}
    left_out = set(head.header["modules"]) - taken
    surplus = [name for name in head.shapes if name not in expected and left_out.isdisjoint(_modules_above(name))]
    if surplus:
        raise ValueError(
            f"{path} has {len(surplus)} tensors that do not belong to this model: {', '.join(sorted(surplus)[:3])}"
        )
    for name, shape in expected.items():
        if head.shapes[name] != tuple(shape):
            raise ValueError(f"{name} in {path} has shape {head.shapes[name]}, the model has {tuple(shape)}")
    return set(expected)


def _modules_above(name: str) -> list[str]:
    """The paths of a tensor and of every module that it is in, if it is a module's: "a.b" and "a" of "modules.a.b"."""
    start, *parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))] if start == "modules" else []


def _dense(name: str, t: Tensor, path: Path) -> Tensor:
    """A copy of a tensor as the file holds it: on the CPU, contiguous, with memory of its own."""
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"{path} can hold no tensor with the name {name!r}")
    if t.is_meta:
        raise ValueError(f"{name} for {path} is on the meta device, which holds no values")
    _check_dtype(name, _DTYPES.get(t.dtype, str(t.dtype)), path)
    if t.layout is not torch.strided:
        raise ValueError(f"{name} for {path} has layout {t.layout}, expected torch.strided")
    copy = t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if type(copy) is not Tensor:
        raise ValueError(f"{name} for {path} is a {type(copy).__name__}, expected a plain tensor that holds all values")
    return copy


def _identify(folder: Path) -> tuple[Kind | None, Path, dict[str, Any]]:
    """The kind of adapter in a folder, the file that shows it, and that file's fields."""
    for name in (WEIGHTS_FILE, "adapter.safetensors", "adapter_model.safetensors", CONFIG_FILE, "adapter_config.json"):
        path = folder / name
        if path.is_file():
            with open(path, "rb") as file, contextlib.suppress(ValueError):
                if path.suffix == ".json":
                    fields = parse(file.read(_HEADER_LIMIT), str(path))
                    kind = _kind_of_fields(fields)
                else:  # the other libraries' weights say nothing about themselves
                    fields = _read_entries(file, os.fstat(file.fileno()).st_size, path)[2]
                    kind = next((k for key, k in _OURS.items() if key in fields), None)
                if kind is not None:
                    return kind, path, fields
    return None, folder, {}


def _kind_of_fields(fields: Any) -> Kind | None:
    """The kind of a JSON file."""
    if not isinstance(fields, dict):
        return None
    if isinstance(fields.get("peft_type"), str):
        return "peft"
    if not isinstance(fields.get("config"), dict):
        return None
    if type(fields.get("format")) is int and "modules" in fields:
        return "adapter_ops_1" if fields["format"] == 1 else "adapter_ops"
    return "adapterhub" if isinstance(fields.get("model_type"), str) and "hidden_size" in fields else None


def _refusal(folder: Path) -> Exception:
    """Why a folder, which holds no weights file of this library, cannot be read, and what to do instead."""
    kind, path, fields = _identify(folder)
    weights = folder / WEIGHTS_FILE
    if kind == "adapterhub":
        return ValueError(
            f"{path} belongs to an adapter of AdapterHub: use adapter_ops.integrations.adapterhub.load_adapterhub"
        )
    if kind == "peft":
        return ValueError(
            f"{path} belongs to a PEFT adapter (peft_type {short(fields['peft_type'])}), which adapter_ops does not "
            "read: load it with the package peft"
        )
    if kind == "adapter_ops_1":
        return ValueError(
            f"{path} was written in format 1, which was never released and is no longer read (this version of "
            f"adapter_ops reads format {FORMAT}): save the task again with this version"
        )
    if weights.is_file():
        return ValueError(f"{weights} has no metadata {METADATA!r}, so adapter_ops did not write it")
    if folder.is_dir():
        hint = f", though {path.name} is of its format: the weights are missing or misnamed" if kind else ""
        return FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}{hint}")
    problem = "is a file" if folder.exists() else "does not exist"
    return FileNotFoundError(f"{folder} {problem}, expected a folder with {WEIGHTS_FILE}")
