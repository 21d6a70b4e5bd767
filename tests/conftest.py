"""Fixtures of all tests.

Without a GPU the kernels run in Triton's interpreter, which has to be chosen before they are imported. Uninitialised
memory is filled with NaN (PyTorch does that under deterministic algorithms), so nothing can pass by reading it.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from adapter_ops import ops

PATHS = {"triton": ops._INTERPRETER, "cpu": ops._CPU, "reference": ops._FUNC}


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="there is no GPU here"))


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def use_path(monkeypatch):
    """use_path("cpu") sends every call down that path."""
    return lambda name: monkeypatch.setattr(ops, "choose_path", lambda x, w_down: PATHS[name])
