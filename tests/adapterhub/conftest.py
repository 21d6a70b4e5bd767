"""The fixtures of the tests of AdapterHub."""

import pytest
from hub_helpers import bert, randomise

from adapter_ops import ops
from adapter_ops.inject import add_adapter
from adapter_ops.integrations.adapterhub import save_adapterhub


@pytest.fixture(autouse=True)
def no_small_calls(monkeypatch):
    monkeypatch.setattr(ops, "SMALL", 0)  # else small calls would take plain PyTorch


@pytest.fixture
def folder(tmp_path):
    """A folder with a random "pfeiffer" adapter "a" for bert()."""
    model = bert()
    add_adapter(model, "a", "pfeiffer", modules=())
    randomise(model, "adapter_ops")
    save_adapterhub(model, tmp_path / "a", "a")
    return tmp_path / "a"
