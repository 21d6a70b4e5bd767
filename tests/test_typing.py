"""What type checkers see of the public names."""

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MODULES = ("adapter_ops", "adapter_ops.integrations.adapterhub")

USE = """
from typing_extensions import assert_type
import torch
from torch import Tensor, nn
from adapter_ops import AdapterConfig, BottleneckAdapter, SitePattern, add_adapter, bottleneck_adapter

x, w, b = torch.zeros(2, 4), torch.zeros(1, 4), torch.zeros(1)
adapter = BottleneckAdapter(4, 1)
assert_type(adapter(x), Tensor)
assert_type(adapter(x, residual=x), Tensor)
assert_type(bottleneck_adapter(x, w, b, w.t(), None), Tensor)
assert_type(BottleneckAdapter.from_linear(nn.Sequential(nn.Linear(4, 1), nn.GELU(), nn.Linear(1, 4))).down, nn.Linear)
SITES = {"ffn": "blocks.*.down"}
add_adapter(nn.Linear(4, 1), "t", "pfeiffer", sites=SITES)
add_adapter(nn.Linear(4, 1), "t", AdapterConfig(placement=("ffn",)), sites={"ffn": SitePattern("a.*")})
"""
MISUSE = """
from torch import nn
from adapter_ops import AdapterConfig, BottleneckAdapter, add_adapter

add_adapter(nn.Linear(4, 1), "t", "houlsbi")
AdapterConfig(placement=("feed_forward",))
AdapterConfig(placement="attention")
AdapterConfig(scale="learnt")
BottleneckAdapter.from_linear(nn.Linear(4, 1), nn.Linear(1, 4))
BottleneckAdapter.from_linear(nn.Sequential(nn.Linear(4, 1)), activation="gelu")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package as it would be installed, beside torch."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "adapter_ops", folder / "adapter_ops", symlinks=True, ignore=lambda *_: ["kernels"])
    shutil.copytree(ROOT / "kernels", folder / "adapter_ops" / "kernels")
    (folder / "torch").symlink_to(Path(torch.__file__).parent)
    return folder


def check(folder, *arguments):
    """What basedpyright, which is pyright with its own Node.js, reports."""
    command = [sys.executable, "-m", "basedpyright", "--outputjson", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return json.loads(subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout)


def test_every_public_name_has_a_complete_type(site):
    names = set()
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            names.add(f"{module.__name__}.{name}")
            if inspect.isclass(thing := getattr(module, name)):
                names.add(f"{thing.__module__}.{name}")
    symbols = check(site, "--verifytypes", "adapter_ops", "--ignoreexternal")["typeCompleteness"]["symbols"]
    found = {s["name"] for s in symbols} & names
    assert len(found) >= len(names) - 4, names - found
    own = [s for s in symbols if s["name"] in names or s["name"].startswith(tuple(f"{name}." for name in names))]
    assert [(s["name"], s["diagnostics"]) for s in own if not s["isTypeKnown"] or s["isTypeAmbiguous"]] == []


@pytest.mark.parametrize("text, errors", [(USE, 0), (MISUSE, 6)], ids=["use", "misuse"])
def test_a_users_code(site, text, errors):
    (site / "user.py").write_text(text)
    (site / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    found = [d for d in check(site, "user.py")["generalDiagnostics"] if d["severity"] == "error"]
    lines = [d["range"]["start"]["line"] for d in found]
    assert len(set(lines)) == errors, found
