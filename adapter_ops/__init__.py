"""Fused bottleneck adapters (Houlsby et al. 2019) for PyTorch."""

from pathlib import Path

# adapter_ops/kernels is a link to kernels/. In a checkout without symbolic links it is a file of one line, and the
# import of adapter_ops.kernels then finds the folder itself, beside adapter_ops.
if not Path(__path__[0], "kernels").is_dir():
    __path__.append(str(Path(__path__[0]).parent))

from .functional import bottleneck_adapter, explain
from .grouped import grouped_bottleneck_adapter
from .models.bank import AdapterBank, BankStats
from .models.checkpoint import load_adapter, load_task_state_dict, save_adapter, task_state_dict
from .models.config import AdapterConfig
from .models.families import SitePattern
from .models.push import push_adapter
from .models.summary import adapter_summary
from .models.tasks import (
    active_adapter,
    add_adapter,
    delete_adapter,
    list_adapters,
    set_active_adapter,
    skip_layers,
    train_adapter,
    using_adapter,
    using_adapters,
)
from .modules import BottleneckAdapter

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "AdapterConfig",
    "BankStats",
    "BottleneckAdapter",
    "SitePattern",
    "active_adapter",
    "adapter_summary",
    "add_adapter",
    "bottleneck_adapter",
    "delete_adapter",
    "explain",
    "grouped_bottleneck_adapter",
    "list_adapters",
    "load_adapter",
    "load_task_state_dict",
    "push_adapter",
    "save_adapter",
    "set_active_adapter",
    "skip_layers",
    "task_state_dict",
    "train_adapter",
    "using_adapter",
    "using_adapters",
]
