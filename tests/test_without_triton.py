"""Where Triton is not installed, as on macOS and Windows, everything but the kernels works, and `explain` says so."""

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

HERE = Path(helpers.__file__).parent
ROOT = HERE.parent

# In front of every script. What Python raises for a module that is not there has the module's name, as here.
BLOCK = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
"""

# Behind every script.
NOT_IMPORTED = """
assert not [name for name in sys.modules if name.partition(".")[0] == "triton"]
"""

# 1024 x 256 elements of x are the least that the CPU backend trains with. It has an epilogue for GELU alone.
VALUES = """
import torch
from adapter_ops import explain
from adapter_ops.kernels.activations import ACTIVATIONS
from helpers import Call, check

torch.manual_seed(0)
for M, D, backend, scale in ((33, 20, "reference", "channel"), (1024, 256, "cpu", 1.0)):
    for activation in ACTIVATIONS:
        call = Call(M, D, 8, activation=activation, scale=scale, own_residual=scale == "channel")
        assert explain(call.inputs["x"], call.inputs["w_down"]).name == backend
        check(call, "cpu")
with torch.no_grad():
    call = Call(256, 64, 8, torch.bfloat16)
    assert explain(call.inputs["x"], call.inputs["w_down"]).name == "cpu"
    check(call, "cpu", wanted=[])
"""

COMPILED = """
import torch
from helpers import Call, assert_two_times_rule
from adapter_ops import bottleneck_adapter, reference

for M, D in ((33, 20), (1024, 256)):
    call = Call(M, D, 8, scale="one")
    found = call.gradients(torch.compile(bottleneck_adapter, fullgraph=True))
    assert_two_times_rule(found, call.gradients(reference.bottleneck_adapter), call.oracle())
"""

# One batch is small, the other is large enough for the CPU backend.
MODEL = """
import tempfile
import torch
from transformers import BertConfig, BertForSequenceClassification
from adapter_ops import BottleneckAdapter, add_adapter, bottleneck_adapter, load_adapter, save_adapter

def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return BertForSequenceClassification(BertConfig(vocab_size=9, **sizes))

trained = model()
add_adapter(trained, "t")
optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
batches = torch.ones(2, 3, dtype=torch.long), torch.ones(64, 64, dtype=torch.long)
for ids in batches:
    trained(ids, labels=torch.zeros(len(ids), dtype=torch.long)).loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)
    optimizer.step()
with tempfile.TemporaryDirectory() as folder:
    save_adapter(trained, folder, "t")
    loaded = model()
    load_adapter(loaded, folder)
trained.eval(), loaded.eval()
with torch.no_grad():
    for ids in batches:
        assert torch.equal(trained(ids).logits, loaded(ids).logits)
        assert not torch.equal(trained(ids).logits, model().eval()(ids).logits)

adapter, x = BottleneckAdapter(16, 4), torch.randn(3, 16)
down, up = adapter.down, adapter.up
torch.testing.assert_close(adapter(x), bottleneck_adapter(x, down.weight, down.bias, up.weight, up.bias))
assert adapter.explain(x).name == "reference"
"""

# A fake tensor has a CUDA device where there is none. `explain` itself sees the dispatch mode first.
REASONS = """
import importlib, os, pkgutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import adapter_ops
from adapter_ops import backend
from adapter_ops.kernels.problem import Options, Weights

x, w = torch.zeros(4, 16), torch.zeros(4, 16)
small = "the tensors are on the CPU and x is small, so plain PyTorch calls cost less to launch"
assert adapter_ops.explain(x, w).reason == small
assert adapter_ops.explain(torch.zeros(1 << 18, 1), torch.zeros(1, 1)).reason == "the tensors are on the CPU"
assert adapter_ops.explain(x.to("meta"), w.to("meta")).reason == "no kernels for device type 'meta'"
with FakeTensorMode(allow_non_fake_inputs=True):
    weights = Weights(torch.empty(4, 16, device="cuda"), None, torch.empty(16, 4, device="cuda"), None, None)
    options = Options("gelu", 1.0, torch.float16)
    x16 = torch.empty(9999, 16, device="cuda", dtype=torch.float16)
    assert backend.choose(x16, None, weights, options) == ("reference", "Triton is not installed", None)

# Compiled calls on a GPU are then left to the compiler, but where ADAPTER_OPS_REQUIRE is to be heard.
torch.cuda.is_available = lambda: True
assert not backend._limits(torch.device("cuda"))
os.environ["ADAPTER_OPS_REQUIRE"] = "triton"
assert backend._limits(torch.device("cuda"))
try:
    adapter_ops.bottleneck_adapter(x, w, None, w.t(), None)
except RuntimeError as error:
    assert str(error) == f"ADAPTER_OPS_REQUIRE=triton, but this call would take the backend 'reference': {small}"
else:
    raise AssertionError("the CPU took a call that Triton is required for")

for module in pkgutil.walk_packages(adapter_ops.__path__, "adapter_ops."):
    if ".kernels." not in module.name:
        importlib.import_module(module.name)
for name in ("activations", "configs", "installed", "problem"):
    importlib.import_module(f"adapter_ops.kernels.{name}")
"""

INTERPRETER = """
import torch
from adapter_ops import explain
ending = "; Triton is not installed, so TRITON_INTERPRET has no effect"
assert explain(torch.zeros(4, 16), torch.zeros(4, 16)).reason.endswith("cost less to launch" + ending)
assert explain(torch.zeros(1 << 18, 1), torch.zeros(1, 1)) == ("cpu", "the tensors are on the CPU" + ending, None)
"""


def run(script: str, **environment: str) -> None:
    """Runs a script where Triton cannot be imported, and fails if it fails or imports Triton."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE)))}
    code = BLOCK + script + NOT_IMPORTED
    done = subprocess.run([sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "script", [VALUES, COMPILED, MODEL, REASONS], ids=["values and gradients", "compiled", "model", "reasons"]
)
def test_works_and_says_why(script):
    run(script)


def test_explain_says_that_the_interpreter_is_not_there():
    run(INTERPRETER, TRITON_INTERPRET="1")


def test_an_installation_that_is_broken_is_told_from_none(monkeypatch):
    """The module that tries is run a second time, by its path, while Triton's import raises."""
    from adapter_ops.kernels import installed

    assert installed.MISSING is None

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "triton":
                raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "triton")
    found: dict = {}
    exec(compile(Path(installed.__file__).read_text(), "installed", "exec"), found)
    assert found["MISSING"] == "Triton cannot be imported: libtriton.so: undefined symbol"
