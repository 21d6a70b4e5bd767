"""Whether Triton can be imported. Package indexes have it for Linux alone.

A module that imports Triton is itself imported only where `MISSING` is None. `activations.py` is needed without Triton
too, for the half of it that is PyTorch, so it takes `triton` and `tl` from here.
"""

from types import SimpleNamespace
from typing import Any

# Why there is no Triton, in the words of `explain`; None where there is.
MISSING: str | None = None

try:
    import triton
    import triton.language as tl
except ImportError as error:
    absent = isinstance(error, ModuleNotFoundError) and error.name == "triton"
    MISSING = "Triton is not installed" if absent else f"Triton cannot be imported: {error}"
    triton: Any = SimpleNamespace(jit=lambda function: function)  # type: ignore[no-redef]
    tl: Any = None  # type: ignore[no-redef]
