"""The package as users meet it: built, imported beside others, from the checkout and from elsewhere."""

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import adapter_ops

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
def tree(tmp_path_factory):
    """A copy of this tree, as a git repository where there is git, since that is what people install from."""
    tree = tmp_path_factory.mktemp("tree") / "t"
    ignore = shutil.ignore_patterns(".git", ".venv*", "out", "*.egg-info", "__pycache__", ".*_cache", "build", "dist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
    if shutil.which("git"):
        git(tree, "init")
        git(tree, "add", "--all")
        settings = ("user.name=test", "user.email=", "commit.gpgsign=false")
        git(tree, *(part for setting in settings for part in ("-c", setting)), "commit", "--message", "all")
    return tree


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    return build(tree, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


def git(cwd: Path, *arguments: str) -> None:
    if not shutil.which("git"):
        pytest.skip("git is not installed here")
    subprocess.run(["git", *arguments], cwd=cwd, check=True, capture_output=True)


def build(tree: Path, kind: str, out: Path) -> Path:
    """The file that setuptools' build_wheel, build_editable or build_sdist, which pip calls, writes into `out`."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (made,) = out.iterdir()
    return made


def unpacked(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def without_links(tree: Path, folder: Path) -> Path:
    """A checkout as it is where symbolic links are not allowed: adapter_ops/kernels is a file."""
    git(folder, "-c", "core.symlinks=false", "clone", str(tree), "checkout")
    assert (folder / "checkout" / "adapter_ops" / "kernels").read_text() == "../kernels"
    return folder / "checkout"


def zipped(tree: Path, folder: Path) -> Path:
    """The sources from an archive that was unpacked by a tool that makes no links, as Python's own makes none."""
    git(tree, "archive", "--output", str(folder / "sources.zip"), "HEAD")
    with zipfile.ZipFile(folder / "sources.zip") as archive:
        archive.extractall(folder / "sources")
    assert (folder / "sources" / "adapter_ops" / "kernels").is_file()
    return folder / "sources"


def test_wheel(wheel, tmp_path):
    """Alone on the path it trains, and nothing but adapter_ops has come with it."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert sorted(path.name.split("-")[0] for path in site.iterdir()) == ["adapter_ops", "adapter_ops"]
    code = """
import importlib.util
from adapter_ops.kernels import forward
print(importlib.util.find_spec("kernels"), forward.__file__)
"""
    assert python(TRAIN + code, tmp_path, site) == f"None {site / 'adapter_ops' / 'kernels' / 'forward.py'}"


@pytest.mark.parametrize("source", ["tree", "git", "zip", "no links", "sdist"])
def test_every_source_builds_the_same_wheel(source, tree, sdist, tmp_path):
    """pip's own wheel of each: every module and launch.c, to the byte."""
    given = {"tree": tree, "sdist": sdist, "git": f"git+file://{tree}"}.get(source)
    if source == "git":
        git(tree, "status")
    elif source == "zip":
        given = zipped(tree, tmp_path)
    elif source == "no links":
        given = without_links(tree, tmp_path)
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(tmp_path / "wheel"))
    command = [sys.executable, "-m", "pip", "wheel", *options, str(given)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(next((tmp_path / "wheel").iterdir())) as wheel:
        found = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "adapter_ops").rglob("*.py")}
    expected = {name: path for name, path in modules.items() if not name.startswith("adapter_ops/kernels/")}
    expected["adapter_ops/py.typed"] = ROOT / "adapter_ops" / "py.typed"
    kernels = [path for path in (ROOT / "kernels").iterdir() if path.suffix in (".py", ".c")]
    expected |= {f"adapter_ops/kernels/{path.name}": path for path in kernels}
    assert found == {name: path.read_bytes() for name, path in expected.items()}


@pytest.mark.parametrize("source", ["tree", "no links", "sdist"])
def test_an_editable_install_imports_the_kernels_of_the_sources(source, tree, sdist, tmp_path):
    (tmp_path / "source").mkdir()
    if source == "sdist":
        tree = unpacked(sdist, tmp_path / "source")
    elif source == "no links":
        tree = without_links(tree, tmp_path / "source")
    (tmp_path / "wheel").mkdir()
    with zipfile.ZipFile(build(tree, "editable", tmp_path / "wheel")) as wheel:
        wheel.extractall(tmp_path / "site")
    # Editable installs among the site packages, of which this project may be one, are not heard: torch is all that is
    # wanted of them.
    code = f"""
import importlib.util, pathlib, site, sys
site.addsitedir({str(tmp_path / "site")!r})
sys.path.append({sysconfig.get_path("purelib")!r})
import adapter_ops
from adapter_ops.kernels import forward
print(importlib.util.find_spec("kernels"), adapter_ops.__file__, pathlib.Path(forward.__file__).resolve())
"""
    run = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == f"None {tree / 'adapter_ops' / '__init__.py'} {tree / 'kernels' / 'forward.py'}"


def test_an_unpacked_sdist_runs_its_tests(sdist, tmp_path):
    """All that a checkout has but what git and linters read; and the tests find what they import."""
    site = unpacked(sdist, tmp_path)
    for folder in ("bench", "tests", "kernels"):
        listed = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
        wanted = [path for path in listed if ".partial" not in path.name and path.suffix not in (".pyc", ".lock")]
        assert wanted and [path for path in wanted if not (site / path).is_file()] == []
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_functional.py"],
        cwd=site,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert required == ["torch>=2.10", 'triton>=3.6; sys_platform == "linux"', "safetensors[torch]"]
    assert metadata["Version"] == adapter_ops.__version__ and metadata["License-Expression"] == "Apache-2.0"
    # bench/ and tests/ are not in the wheel, so no extra is offered that a user might take for a part of it.
    assert metadata.get_all("Provides-Extra") == ["hub", "serve", "test"]
