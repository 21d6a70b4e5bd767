"""The package as users meet it: built, imported beside others, from the checkout and from elsewhere."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TRAIN = """
import torch, transformers, adapter_ops
config = transformers.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=16)
model = transformers.BertForSequenceClassification(config)
adapter_ops.add_adapter(model, "t")
model(torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
assert sum(p.grad is not None for p in model.parameters()) == sum(p.requires_grad for p in model.parameters()) > 8
"""


def python(code: str, cwd: Path, *path: Path) -> str:
    """What a fresh process prints, with `path` in front of sys.path."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_trains_from_the_root_without_hugging_faces_kernels():
    """There, `kernels` is a folder without __init__.py: transformers takes it for nothing, as it should."""
    installed = importlib.util.find_spec("kernels")
    if installed is not None and installed.origin is not None:
        pytest.skip("Hugging Face's kernels is installed here")
    available = "from transformers.utils import is_kernels_available\nassert not is_kernels_available()"
    python(TRAIN + available, ROOT, ROOT)


def test_trains_from_the_root_with_hugging_faces_kernels(tmp_path):
    """A stand-in of that name: whoever imports `kernels` gets it and not ours."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    out = python(TRAIN + "import kernels; print(kernels.__file__)", ROOT, ROOT, tmp_path)
    assert out == str(tmp_path / "kernels" / "__init__.py")


def test_import_touches_nothing():
    code = """
import os, sys
import torch, triton
before, classes = dict(os.environ), set(map(id, torch.nn.Module.__subclasses__()))
import adapter_ops
assert dict(os.environ) == before and not torch.cuda.is_initialized()
assert "transformers" not in sys.modules and "matplotlib" not in sys.modules and "kernels" not in sys.modules
"""
    assert python(code, ROOT, ROOT) == ""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist of a copy of the tree."""
    tree, out = tmp_path_factory.mktemp("tree") / "t", tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(".git", ".venv*", "out", "*.egg-info", "__pycache__", ".*_cache", "build", "dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(out), "bdist_wheel", "-d", str(out)],
        cwd=tree,
        check=True,
        capture_output=True,
    )
    return out


def check(site: Path) -> None:
    found = python("import adapter_ops.kernels.forward as f; print(f.__file__)\n" + TRAIN, site.parent, site)
    assert found == str(site / "adapter_ops" / "kernels" / "forward.py")


def test_wheel(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"adapter_ops"}
    assert {"adapter_ops/py.typed", "adapter_ops/kernels/backward.py", "adapter_ops/kernels/launch.c"} <= set(names)
    check(tmp_path / "site")


def test_sdist(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    assert (tree / "LICENSE").is_file() and (tree / "adapter_ops" / "kernels" / "configs.py").is_file()
    tree.rename(tmp_path / "site")
    check(tmp_path / "site")
