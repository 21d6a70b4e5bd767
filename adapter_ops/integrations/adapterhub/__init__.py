"""AdapterHub: its folders read and written, and its live modules made fast.

    load_adapterhub(model, "folder")            # a plain transformers model takes the adapter
    save_adapterhub(model, "folder", "cola")    # AdapterHub's `model.load_adapter("folder")` reads it
    accelerate(model)                           # a model of the package `adapters` runs its adapters fused

Only `accelerate` needs the package `adapters` (checked against 1.3.0).
"""

from .config import read_config, write_config
from .files import load_adapterhub, save_adapterhub
from .live import Swap, accelerate

__all__ = ["Swap", "accelerate", "load_adapterhub", "read_config", "save_adapterhub", "write_config"]
