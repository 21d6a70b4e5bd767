"""What the tests of the file format share: a header, tensors, and folders that hold them."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save

from adapter_ops.models.files import CONFIG_FILE, FORMAT, WEIGHTS_FILE, read

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
    "sites": {"ffn": {"output": "output.dense", "entry": None, "norm": "output.LayerNorm"}},
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


def header_bytes(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text
