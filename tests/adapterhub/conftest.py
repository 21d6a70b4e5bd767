"""The fixtures of the tests of AdapterHub."""

import pytest
from hub_helpers import bert, randomise

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
