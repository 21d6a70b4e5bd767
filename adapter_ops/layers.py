"""What stands in a model: a task's adapters at one place, the hooks that run them, and a task's own parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import AdapterConfig
from .integrations.transformers import Site
from .modules import BottleneckAdapter


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over all tokens: x [..., D] → [..., D]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class AdapterLayer(nn.Module):
    """What one task has at one place: `depth` bottlenecks in a row, and perhaps a normalisation and dropout."""

    def __init__(
        self, config: AdapterConfig, layer: int, hidden_size: int, device: torch.device, dtype: torch.dtype
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


class Slot(nn.Module):
    """One place of the model: every task's adapters there, of which at most one runs."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.adapters = nn.ModuleDict()
        self.configs: dict[str, AdapterConfig] = {}
        self.active: str | None = None
        self.skipped = False
        self._entered: Tensor | None = None  # r, from the sublayer's entry to its output
        self._unnormalised: Tensor | None = None  # the adapter's output, where ln_after is off

    def __getstate__(self) -> dict[str, Any]:
        """Without what a forward that failed midway left behind, which cannot be copied."""
        return self.__dict__ | {"_entered": None, "_unnormalised": None}

    def running(self) -> tuple[AdapterLayer, AdapterConfig] | None:
        if self.skipped or self.active is None or self.active not in self.adapters:
            return None
        return self.adapters[self.active], self.configs[self.active]  # type: ignore[return-value]

    def on_entry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = self.running()
        if running is None:
            return
        _, config = running
        if config.placement == "parallel" or (config.ln_before and self.site.norm is None):
            self._entered = args[0] if args else kwargs["hidden_states"]

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        running = self.running()
        if running is None:
            return None
        layer, config = running
        if config.ln_before and self.site.norm is not None:
            return None
        h = output[0] if isinstance(output, tuple) else output
        r, self._entered = self._entered, None
        if config.placement == "parallel":
            y = layer(r, h)
        else:
            x = h + r if config.ln_before else h
            # The model adds r itself, so without ln_after, which would add it once more, x is a residual less r: h.
            y = layer(x, x if config.residual == "input" and config.ln_after else h)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def on_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        running = self.running()
        if running is None:
            return None
        layer, config = running
        if not config.ln_before or config.placement == "parallel":
            return None
        total = args[0]  # h + r
        x = norm.forward(total)
        y = layer(x, x if config.residual == "input" else total)
        self._unnormalised = None if config.ln_after else y
        return (y, *args[1:])

    def after_norm(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        y, self._unnormalised = self._unnormalised, None
        return y


class Own(nn.Module):
    """A task's copy of parameters of the base. Active, it holds the base's and the base holds the task's."""

    def __init__(self, model: nn.Module, modules: Iterable[str]) -> None:
        super().__init__()
        copies: dict[Tensor, Any] = {}  # what is shared stays shared
        for path in modules:
            module = model.get_submodule(path)
            for name, parameter in module.named_parameters(path, remove_duplicate=False):
                if parameter not in copies:
                    copies[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                self.register_parameter(name.replace(".", "/"), copies[parameter])
            for name, buffer in module.named_buffers(path, remove_duplicate=False):
                if buffer not in copies:
                    copies[buffer] = buffer.clone()
                self.register_buffer(name.replace(".", "/"), copies[buffer])

    def exchange(self, model: nn.Module) -> None:
        """Each parameter and buffer changes places with the one of the same path in the model; on an error, none."""
        pairs = []
        for mine, kind in ((self._parameters, "_parameters"), (self._buffers, "_buffers")):
            for key in mine:
                path, _, leaf = key.replace("/", ".").rpartition(".")
                there = getattr(model.get_submodule(path), kind)
                if leaf not in there:
                    raise ValueError(f"the model has no {path}.{leaf} any more, of which a task has its own")
                pairs.append((mine, key, there, leaf))
        for mine, key, there, leaf in pairs:
            there[leaf], mine[key] = mine[key], there[leaf]
