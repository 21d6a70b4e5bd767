"""What the logger "adapter_ops" says: which backend runs and why, once, and at WARNING where a GPU's kernels do not."""

import copy
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from adapter_ops import BottleneckAdapter, bottleneck_adapter, kinds, ops
from bench.host import build

ROOT = Path(__file__).parent.parent


@pytest.fixture
def logged(caplog, monkeypatch):
    """logged() gives what was logged since the test began, as (level, message)."""
    monkeypatch.setattr(ops, "_told", {})
    caplog.set_level(logging.INFO, "adapter_ops")
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "adapter_ops"]


def test_each_backend_once(logged, use_path):
    adapter = BottleneckAdapter(20, 6)
    for path in ("cpu", "reference", "cpu", "reference"):
        use_path(path)
        for module in (adapter, copy.deepcopy(adapter), BottleneckAdapter(20, 6)):
            for M in (1, 5, 5, 9):
                module(torch.zeros(M, 20))
                with torch.no_grad():
                    module(torch.zeros(2, M, 20))
    assert [level for level, _ in logged()] == ["INFO", "INFO"]
    for name, (_, text) in zip(("cpu", "reference"), logged()):
        head = f"An adapter with D=20 and R=6 takes the backend '{name}' for torch.float32 on cpu: a test asks for it."
        assert text.startswith(head), text


def test_other_sizes_and_dtypes_are_told_apart(logged, aten):
    float32, bfloat16 = torch.float32, torch.bfloat16
    for D, R, dtype in ((20, 6, float32), (20, 7, float32), (21, 6, float32), (20, 6, bfloat16)):
        BottleneckAdapter(D, R, dtype=dtype)(torch.zeros(3, D, dtype=dtype))
        text = logged()[-1][1]
        assert f"D={D} and R={R} " in text and f"for {dtype} on cpu" in text, text
    assert len(logged()) == 4


class SlowToRead(dict):
    """A dictionary with time between the question whether it has a key and what is done about the answer."""

    def __contains__(self, key):
        found = super().__contains__(key)
        time.sleep(0.02)
        return found

    def get(self, key, default=None):
        has = key in self
        return self[key] if has else default


def test_once_among_threads(logged, aten, monkeypatch):
    """Threads that all meet a new kind of call at the same time."""
    monkeypatch.setattr(kinds, "GUARDED", False)  # every call takes the way of a new kind
    monkeypatch.setattr(ops, "_told", SlowToRead())
    count, sizes = 8, range(20, 25)
    barrier = threading.Barrier(count)

    def work():
        for D in sizes:
            adapter, x = BottleneckAdapter(D, 2), torch.zeros(1, D)
            barrier.wait()
            adapter(x)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    texts = [text for _, text in logged()]
    assert len(texts) == len(set(texts)) == len(sizes)


def test_a_repeated_call_does_not_come_near_it(logged, aten, monkeypatch):
    if not kinds.GUARDED:
        pytest.skip("this version of PyTorch has its guards elsewhere, so every call is checked anew")
    adapter, x = BottleneckAdapter(20, 6), torch.zeros(5, 20)
    adapter(x)

    def fail(*arguments):
        raise AssertionError("logging is on the way of a repeated call")

    monkeypatch.setattr(ops, "tell", fail)
    adapter(x)
    copy.deepcopy(adapter)(x)
    with pytest.raises(AssertionError, match="logging is on the way"):
        adapter(torch.zeros(6, 20))


def test_what_no_level_lets_through_is_not_lost(logged, aten, caplog):
    adapter = BottleneckAdapter(20, 6)
    caplog.set_level(logging.WARNING, "adapter_ops")
    adapter(torch.zeros(1, 20))
    assert not logged()
    caplog.set_level(logging.INFO, "adapter_ops")
    adapter(torch.zeros(2, 20))
    assert len(logged()) == 1


def test_a_fallback_on_cuda_is_a_warning(logged):
    """A fake CUDA tensor needs no GPU, and meets a dispatch mode."""
    with FakeTensorMode():
        for device in ("cuda", "cpu"):
            down, up = torch.empty(6, 20, device=device), torch.empty(20, 6, device=device)
            for M in (3, 4):
                bottleneck_adapter(torch.empty(M, 20, device=device), down, None, up, None)
    (level, text), (other, calm) = logged()
    assert level == "WARNING" and "D=20 and R=6 falls back from the kernels to the backend 'reference'" in text
    assert "on cuda:0: a torch dispatch mode is active" in text
    assert other == "INFO" and "takes the backend 'reference' for torch.float32 on cpu" in calm


def test_a_call_that_is_refused_is_not_logged(logged, aten, monkeypatch):
    monkeypatch.setenv("ADAPTER_OPS_REQUIRE", "triton")
    with pytest.raises(RuntimeError, match="ADAPTER_OPS_REQUIRE"):
        BottleneckAdapter(20, 6)(torch.zeros(3, 20))
    assert not logged()


def test_compiled_calls_are_logged_when_they_run(logged, aten):
    adapter = BottleneckAdapter(20, 6)
    compiled = torch.compile(adapter, backend="eager", fullgraph=True, dynamic=True)
    for M in (3, 4, 5):
        compiled(torch.zeros(M, 20)).sum().backward()
    ((level, text),) = logged()
    assert level == "INFO" and "D=20 and R=6 takes the backend 'cpu'" in text


def test_compiled_transforms_have_no_graph_break(logged):
    adapter, x = BottleneckAdapter(20, 6), torch.randn(3, 20)
    gradient = torch.func.grad(lambda x: adapter(x).square().sum())
    compiled = torch.compile(gradient, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gradient(x))
    assert len(logged()) == 1  # the second one, which is not compiled


def test_sizes_that_are_symbols(logged):
    tensors = torch.zeros(4, 20), torch.zeros(6, 20), torch.zeros(20, 6)
    make_fx(lambda x, down, up: bottleneck_adapter(x, down, None, up, None), tracing_mode="symbolic")(*tensors)
    assert not logged()


def test_the_library_adds_no_handler():
    code = "import adapter_ops, logging; print(logging.getLogger('adapter_ops').handlers, logging.root.handlers)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[] []\n"


RIG = """
from bench.host import rig
rig.start()
import logging, os, sys
import torch
from adapter_ops import BottleneckAdapter

class Keep(logging.Handler):
    def emit(self, record):
        kept.append((record.levelname, record.getMessage()))

kept, logger = [], logging.getLogger("adapter_ops")
logger.addHandler(Keep())
logger.setLevel(logging.INFO)

def adapter(D=64, R=16):
    return BottleneckAdapter(D, R, dtype=torch.bfloat16, device="meta").to_empty(device="cuda")

def rows(M, D=64):
    return torch.empty(M, D, dtype=torch.bfloat16, device="cuda")

def new():
    found = [(level, text) for level, text in kept if text.startswith(("An adapter", "torch.compile"))]
    kept.clear()
    return found

a = adapter()
for M in (4096, 4096, 8192):
    a(rows(M))
((level, text),) = new()
assert level == "INFO" and "D=64 and R=16 takes the backend 'triton' for torch.bfloat16 on cuda:0" in text, text
for M in (32, 32, 40):
    a(rows(M))
    adapter()(rows(M))
((level, text),) = new()
assert level == "WARNING" and "D=64 and R=16 falls back from the kernels to the backend 'reference'" in text, text
assert "M=32" in text and "NVIDIA H200" in text and "explain" in text, text

rig.allow_compile()
compiled = torch.compile(adapter(48), backend="eager", fullgraph=True, dynamic=True)
for M in (32, 40):
    compiled(rows(M, 48))
((level, text),) = new()
assert level == "WARNING" and "PyTorch's own operations for an adapter in torch.bfloat16 on cuda:0" in text, text
compiled(rows(4096, 48))
((level, text),) = new()
assert level == "INFO" and "D=48 and R=16 takes the backend 'triton'" in text, text
sys.stdout.flush(); os._exit(0)
"""


def test_the_kernels_and_fallbacks_of_a_gpu():
    """On the rig, where kernels run that are measured on its card, from 4096 rows on."""
    if lack := build.missing():
        pytest.skip(lack)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ADAPTER_OPS_REQUIRE")}
    environment["ADAPTER_OPS_UNMEASURED"] = "0"
    command = [sys.executable, "-W", "ignore", "-c", RIG]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
