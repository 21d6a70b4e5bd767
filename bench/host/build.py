"""Builds the rig's two libraries, once for each PyTorch, Triton and Python, into a folder outside of the repository."""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = (HERE / "libcuda.c", HERE / "fakecuda.cpp")


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no package named {name!r} is installed")
    return Path(spec.origin).parent


def missing(count: bool = False) -> str | None:
    """What the rig needs and does not find here, or None; with `count` for counting instructions too."""
    programs = ("gcc", "g++", *(("valgrind",) if count else ()))
    if lost := [name for name in programs if shutil.which(name) is None]:
        return f"the rig needs {' and '.join(lost)}"
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"the rig needs Linux on x86_64, this is {sys.platform} on {platform.machine()}"
    if (package("torch") / "lib" / "libtorch_cuda.so").exists():
        return "the rig needs a PyTorch built for the CPU alone: this one has a CUDA device of its own"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "the rig needs Python's header files"
    return None


def cache() -> Path:
    """The user's cache folder, or the system's folder for temporary files where that cannot be written."""
    wanted = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    with contextlib.suppress(OSError):
        wanted.mkdir(parents=True, exist_ok=True)
    if not os.access(wanted, os.W_OK):
        wanted = Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
    folder = wanted / "adapter_ops_host"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def libraries() -> Path:
    """The folder with libcuda.so.1 and fakecuda.so, which are built if they are not there yet.

    Raises RuntimeError with what `missing` says, or with what a compiler said.
    """
    if lack := missing():
        raise RuntimeError(lack)
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (*SOURCES, Path(__file__))))
    versions = [importlib.metadata.version(name) for name in ("torch", "triton")]
    key.update(" ".join([*versions, sys.version, str(package("torch"))]).encode())
    folder = cache() / key.hexdigest()[:16]
    if folder.exists():
        return folder
    print(f"building the rig in {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name, "made")
        made.mkdir()
        _compile(made)
        try:
            made.rename(folder)  # whole or not at all: another process may be at the same
        except OSError:
            if not folder.exists():
                raise
    return folder


def _compile(folder: Path) -> None:
    torch, python = package("torch"), sysconfig.get_paths()["include"]
    driver = f"""gcc -O2 -shared -fPIC -Wl,-soname,libcuda.so.1 -I{package("triton")}/backends/nvidia/include
        {SOURCES[0]} -o {folder}/libcuda.so.1"""
    # callgrind.h is among PyTorch's files too.
    device = f"""g++ -O2 -shared -fPIC -std=c++20 -w -I{torch}/include -I{torch}/include/torch/csrc/api/include
        -I{torch}/utils/benchmark/utils/valgrind_wrapper -I{python}
        {SOURCES[1]} -o {folder}/fakecuda.so -L{torch}/lib -ltorch_python -ltorch_cpu -lc10"""
    for command in (driver, device):
        run = subprocess.run(command.split(), capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{command}\n{run.stderr}")
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
