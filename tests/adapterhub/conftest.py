"""The fixtures of the tests of AdapterHub."""

import json

import pytest
import torch
from hub_helpers import bert, classifier, randomise

from adapter_ops import backend, ops
from adapter_ops.integrations.adapterhub import save_adapterhub
from adapter_ops.models.tasks import add_adapter


@pytest.fixture(autouse=True)
def no_small_calls(monkeypatch):
    """Small calls would take plain PyTorch, and what was kept of them too."""
    monkeypatch.setattr(backend, "SMALL", 0)
    monkeypatch.setattr(backend, "SMALL_INFERENCE", 0)
    ops.RUNS.clear()


@pytest.fixture
def folder(tmp_path):
    """A folder with a random "pfeiffer" adapter "a" for bert()."""
    model = bert()
    add_adapter(model, "a", "pfeiffer", modules=())
    randomise(model, "adapter_ops")
    save_adapterhub(model, tmp_path / "a", "a")
    return tmp_path / "a"


@pytest.fixture
def saved(tmp_path):
    """A model with a task "a" of three classes, and the folder that AdapterHub would read."""
    model = classifier(3, id2label={0: "x", 1: "y", 2: "z"})
    add_adapter(model, "a", "pfeiffer")
    randomise(model, "adapter_ops")
    save_adapterhub(model, tmp_path / "a", "a")
    return model, tmp_path / "a"


@pytest.fixture
def flexible(saved, tmp_path):
    """The same with a head of AdapterHub's own classes: its default, of two layers."""
    folder = tmp_path / "a"
    own = torch.load(folder / "pytorch_model_head.bin")
    config = dict(head_type="classification", layers=2, activation_function="tanh", use_pooler=False, num_labels=3)
    info = dict(model_class="BertAdapterModel", model_type="bert", hidden_size=32, name="a", config=config)
    (folder / "head_config.json").write_text(json.dumps(info))
    tensors = {"heads.a.1.weight": torch.randn(32, 32), "heads.a.1.bias": torch.randn(32)}
    tensors |= {f"heads.a.4.{leaf}": own[f"classifier.{leaf}"] for leaf in ("weight", "bias")}
    torch.save(tensors, folder / "pytorch_model_head.bin")
    return folder
