"""AdapterLayer: what one task has at one site of a model."""

import torch
from torch import Tensor, nn

from ..modules import BottleneckAdapter
from .config import AdapterConfig


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over all tokens: x [..., D] → [..., D]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class AdapterLayer(nn.Module):
    """What one task has at one site: `depth` bottlenecks in a row, and perhaps a normalisation and dropout.

    Args:
        config: the task's.
        layer: number of the site's layer.
        hidden_size: D, of what passes at the site.
        device, dtype: of the parameters.
        has_norm: whether a normalisation of h + r follows the sublayer; see `AdapterConfig.wiring`.
    """

    def __init__(
        self,
        config: AdapterConfig,
        layer: int,
        hidden_size: int,
        device: torch.device,
        dtype: torch.dtype,
        has_norm: bool = False,
    ) -> None:
        super().__init__()
        size = config.size(layer, hidden_size)
        self.bottlenecks = nn.ModuleList(
            BottleneckAdapter(
                hidden_size,
                size,
                activation=config.activation,
                scale=config.scale,
                init_std=config.init_std,
                device=device,
                dtype=dtype,
            )
            for _ in range(config.depth)
        )
        kinds = {"layer": nn.LayerNorm, "batch": TokenBatchNorm}
        self.norm = kinds[config.norm](hidden_size, device=device, dtype=dtype) if config.norm else None
        self.norm_position = config.norm_position
        self.dropout = config.dropout
        self.reads, self.adds_to = config.wiring(has_norm)
        self.reads_input = self.reads in ("input", "sum")
        self.ln_after = config.ln_after
        self._initialise(config.init)

    @torch.no_grad()
    def _initialise(self, init: str) -> None:
        for b in self.bottlenecks:
            if init == "bert":
                nn.init.normal_(b.down.weight, std=0.02)  # type: ignore[arg-type,union-attr]
                nn.init.normal_(b.up.weight, std=0.02)  # type: ignore[arg-type,union-attr]
            elif init == "mam":
                nn.init.kaiming_uniform_(b.down.weight, a=5**0.5)  # type: ignore[arg-type,union-attr]
                nn.init.zeros_(b.up.weight)  # type: ignore[arg-type,union-attr]

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [..., D] → residual + what the bottlenecks make of x."""
        if self.norm is not None and self.norm_position == "before":
            x = self.norm(x)
        for bottleneck in self.bottlenecks:
            if self.training and self.dropout:
                added = bottleneck(x, torch.zeros_like(residual))
                residual = residual + nn.functional.dropout(added, self.dropout)
            else:
                residual = bottleneck(x, residual)
            x = residual
        if self.norm is not None and self.norm_position == "after":
            x = self.norm(x)
        return x

    def select(self, y: Tensor, other: Tensor) -> Tensor:
        """y, since all rows are this task's; see `GroupedLayer.select`."""
        return y
