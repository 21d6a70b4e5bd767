"""Fused bottleneck adapters (Houlsby et al. 2019) for PyTorch."""

from .functional import bottleneck_adapter, explain
from .modules import BottleneckAdapter

__version__ = "0.1.0"

__all__ = ["BottleneckAdapter", "bottleneck_adapter", "explain"]
