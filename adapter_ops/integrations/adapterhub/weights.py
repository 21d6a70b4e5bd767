"""Files with tensors of AdapterHub's: read from bytes, checked and written."""

import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ...functional import DTYPES


def read_tensors(file: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors in the bytes of a weights file, whose name says its format.

    Raises ValueError where they cannot be read. Nothing but tensors is unpickled.
    """
    try:
        if file.suffix == ".safetensors":
            tensors = safetensors.torch.load(data)
        else:
            if zipfile.is_zipfile(io.BytesIO(data)):
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    if sum(entry.file_size for entry in archive.infolist()) > len(data):
                        raise ValueError("it is compressed, as torch.save never does it")
            tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        first = r"(attention|layer)_text_(task|lang)_adapters"  # the modules' name in AdapterHub's first releases
        return {re.sub(first, "adapters", key): t for key, t in tensors.items()}
    except Exception as error:  # zip, pickle and safetensors have errors of no common class
        raise ValueError(f"{file} cannot be read: {type(error).__name__}: {error}") from error


def check_tensor(what: str, t: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError, which begins with `what`, for anything but a dense tensor of this shape and a known dtype."""
    if not isinstance(t, Tensor) or t.layout is not torch.strided or t.is_meta:
        raise ValueError(f"{what} is no dense tensor")
    if t.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in sorted(DTYPES, key=str))
        raise ValueError(f"{what} has dtype {t.dtype}, expected one of {known}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{what} has shape {tuple(t.shape)}, expected {shape}")


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a weights file, as AdapterHub saves it by default."""
    data = io.BytesIO()
    torch.save({key: t.cpu().clone() for key, t in tensors.items()}, data)
    return data.getvalue()
