"""What every table of results names: device, versions, commit and date."""

import contextlib
import datetime
import platform
import re
import subprocess
from pathlib import Path

import torch
import triton


def environment(device: str, commit: str | None) -> dict[str, str]:
    """Device, versions, commit and date, as every row names them."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        name = f"{model[1] if model else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
        name += f", {torch.get_num_threads()} threads"
    if commit is None:
        with contextlib.suppress(OSError):  # no git
            run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
            commit = run.stdout.strip()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"device": name, **versions, "commit": commit or "unknown", "date": f"{datetime.date.today()}"}
