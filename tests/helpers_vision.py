"""timm, which `make test` installs into a folder of its own inside the virtual environment."""

import importlib
import sys
from pathlib import Path

import pytest

VISION = Path(sys.prefix, "vision")
# The wheel of torchvision has compiled operators for one build of PyTorch. Where another is installed they do not load,
# and its import fails for want of the first two of them, which no model of timm calls.
PREPARE = f"""
import sys, torch
sys.path.append({str(VISION)!r})
if not hasattr(torch.ops.torchvision, "nms"):
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
_kept: dict = {}


def installed() -> bool:
    return (VISION / "timm").is_dir() or importlib.util.find_spec("timm") is not None


def timm():
    """The package timm. Skips the test where it is not installed."""
    if not installed():
        pytest.skip("needs the package timm")
    if not _kept:
        exec(PREPARE, _kept)
    return importlib.import_module("timm")
