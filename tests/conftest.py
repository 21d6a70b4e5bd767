"""Fixtures of all tests.

Without a GPU the kernels run in Triton's interpreter, which has to be chosen before they are imported. Uninitialised
memory is filled with NaN (PyTorch does that under deterministic algorithms), so nothing can pass by reading it. On a
GPU every kernel runs, measured or not.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("ADAPTER_OPS_UNMEASURED", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.pop("CI", None)  # Inductor behaves differently where it is set; the tests behave the same everywhere

from helpers import Call

from adapter_ops import backend, ops
from adapter_ops.backend import Backend
from adapter_ops.kernels.plan import INTERPRETED
from adapter_ops.kernels.problem import Tuning


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
    """use_path("cpu") sends every call to that backend."""

    def use(name):
        forget()
        monkeypatch.setattr(backend, "choose", lambda *arguments: Backend(name, "a test asks for it"))

    def forget():
        ops.RUNS.clear()
        ops.OP_CALLS.clear()

    yield use
    forget()


@pytest.fixture
def path(request, use_path):
    """Where the test runs: the kernels in the interpreter, the CPU path, or the kernels on a GPU."""
    if request.param == "gpu":
        torch.set_default_device("cuda")
        yield "gpu"
        torch.set_default_device(None)
        return
    if request.param == "interpreter" and not INTERPRETED:
        pytest.skip("TRITON_INTERPRET is off: the kernels are compiled, and run under -m gpu")
    use_path({"interpreter": "triton"}.get(request.param, request.param))
    yield request.param


@pytest.fixture
def splits(request, monkeypatch):
    """The form of forward: 0 the fused kernel, any other number the pair of split.py with D in that many splits."""
    form = Tuning("split", splits=request.param) if request.param else Tuning("fused")
    monkeypatch.setattr(Call, "tuning", form)
    return request.param


def pytest_generate_tests(metafunc):
    if "path" in metafunc.fixturenames:
        paths = ["interpreter", "cpu"]
        if "fp64" not in metafunc.function.__name__ and "gradcheck" not in metafunc.function.__name__:
            paths.append(pytest.param("gpu", marks=pytest.mark.gpu))  # fp64 has no GPU kernel
        if "splits" in metafunc.fixturenames:
            paths.remove("cpu")
        metafunc.parametrize("path", paths, indirect=True)


@pytest.fixture
def aten(use_path):
    """The CPU path, for tests of what stands around the op: the interpreter would be slow."""
    use_path("cpu")


@pytest.fixture(scope="module")
def one_thread():
    """Threads that share so little work wait for one another most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
