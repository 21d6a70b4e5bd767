"""BottleneckAdapter: the adapter as a module."""

from typing import Literal

import torch
from torch import Tensor, nn

from . import ops
from .functional import bottleneck_adapter, explain
from .kernels.activations import find_activation


class BottleneckAdapter(nn.Module):
    """x + scale · up(activation(down(x))), fused (Houlsby et al. 2019, §2.1).

    The state dict is that of two `nn.Linear`: `down.weight` [R, D], `down.bias` [R], `up.weight` [D, R], `up.bias` [D].
    Weights start as a truncated normal cut at two standard deviations and biases at zero, so that the module starts
    near the identity. `down` and `up` hold parameters only: they are not called, so hooks on them do not run.

    Args:
        hidden_size: D.
        bottleneck_size: R, at least 1.
        activation: see `bottleneck_adapter`.
        bias: whether both projections have one.
        scale: a number, "learned" (a parameter [1]) or "channel" (a parameter [D]), both starting at 1.
        init_std: standard deviation of the weights before the cut; the paper's default 1e-2 (§3.6: up to 1e-2 all
            values do equally well).
        device, dtype: of the parameters.

    Raises:
        ValueError: a size under 1, an `init_std` that is not positive, an unknown activation or scale.

    >>> adapter = BottleneckAdapter(768, 64)
    >>> adapter(torch.zeros(8, 128, 768)).shape
    torch.Size([8, 128, 768])
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        scale: float | Literal["learned", "channel"] = 1.0,
        init_std: float = 1e-2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or bottleneck_size < 1:
            raise ValueError(f"hidden_size {hidden_size} and bottleneck_size {bottleneck_size} must be at least 1")
        if not init_std > 0:
            raise ValueError(f"init_std is {init_std}, must be positive: at 0 no weight would ever get a gradient")
        if isinstance(scale, str) and scale not in ("learned", "channel"):
            raise ValueError(f"unknown scale {scale!r}; known: a number, 'learned', 'channel'")
        find_activation(activation)
        self.activation = activation
        self.init_std = init_std
        self.down = nn.Linear(hidden_size, bottleneck_size, bias=bias, device=device, dtype=dtype)
        self.up = nn.Linear(bottleneck_size, hidden_size, bias=bias, device=device, dtype=dtype)
        self.scale: float | Tensor
        if isinstance(scale, str):
            size = hidden_size if scale == "channel" else 1
            self.scale = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        else:
            self.scale = float(scale)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        down: nn.Linear,
        up: nn.Linear,
        *,
        activation: str = "gelu",
        scale: float | Literal["learned", "channel"] = 1.0,
    ) -> "BottleneckAdapter":
        """An adapter over two layers of an existing model; it shares their parameters and takes their place.

        Raises ValueError where `up` does not undo `down`'s shape.
        """
        if (down.in_features, down.out_features) != (up.out_features, up.in_features):
            raise ValueError(
                f"down maps {down.in_features} to {down.out_features}, up maps {up.in_features} to {up.out_features}"
            )
        adapter = cls(down.in_features, down.out_features, activation=activation, scale=scale, device="meta")
        if isinstance(adapter.scale, Tensor):
            adapter.scale = nn.Parameter(down.weight.new_ones(adapter.scale.shape))
        adapter.down, adapter.up = down, up
        return adapter

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights from the truncated normal, biases zero, a learned scale one."""
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=self.init_std, a=-2 * self.init_std, b=2 * self.init_std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if isinstance(self.scale, Tensor):
            nn.init.ones_(self.scale)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., D] → [..., D]; `residual` [..., D] takes the place of x in the sum."""
        down, up = self.down, self.up
        return bottleneck_adapter(
            x,
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            activation=self.activation,
            scale=self.scale,
            residual=residual,
        )

    def explain(self, x: Tensor) -> ops.Path:
        """Which path this module takes for x, and why."""
        return explain(x, self.down.weight)

    def extra_repr(self) -> str:
        scale = {1: "learned"}.get(self.scale.numel(), "channel") if isinstance(self.scale, Tensor) else self.scale
        return f"activation={self.activation}, scale={scale}"
