"""Fused bottleneck adapters (Houlsby et al. 2019) for PyTorch."""

from .checkpoint import load_adapter, save_adapter
from .config import AdapterConfig
from .functional import bottleneck_adapter, explain
from .inject import adapter_summary, add_adapter, delete_adapter, set_active_adapter, skip_layers, train_adapter
from .modules import BottleneckAdapter

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "BottleneckAdapter",
    "adapter_summary",
    "add_adapter",
    "bottleneck_adapter",
    "delete_adapter",
    "explain",
    "load_adapter",
    "save_adapter",
    "set_active_adapter",
    "skip_layers",
    "train_adapter",
]
