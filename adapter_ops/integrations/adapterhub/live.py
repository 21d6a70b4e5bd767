"""AdapterHub's live modules, made fast: their class is changed, nothing else."""

import functools
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...functional import bottleneck_adapter
from ...kernels.activations import find_activation


class Swap(NamedTuple):
    """What `accelerate` did with one adapter, and why."""

    path: str
    swapped: bool
    reason: str


def accelerate(model: nn.Module) -> list[Swap]:
    """Makes a live AdapterHub model run its adapters fused, with the outputs and gradients it had.

    Every plain `Adapter` and `ParallelAdapter` gets a subclass of its own class; parameters, names and saved files stay
    as they are. Alone and under every composition of adapters the model works as before. Call it again after adding
    adapters. Hooks on the Linear modules inside an adapter do not run any more.

    Returns:
        One line for every adapter: swapped or not, and the reason.

    Raises:
        ImportError: the package `adapters` is not installed.
    """
    try:
        from adapters.methods.bottleneck import BottleneckLayer
    except ImportError as error:
        raise ImportError("accelerate works on models of the package `adapters`: pip install adapters") from error
    found = [
        (f"{path}.adapters.{name}", layer, name, adapter)
        for path, layer in model.named_modules()
        if isinstance(layer, BottleneckLayer)
        for name, adapter in getattr(layer, "adapters", {}).items()
    ]
    obstacles = {path: _swap(layer, name, adapter) for path, layer, name, adapter in found}
    return [
        Swap(path, False, why) if (why := obstacles[path]) else Swap(path, True, adapter._apart() or "fused")
        for path, _, _, adapter in found
    ]


def _swap(layer: Any, name: str, adapter: Any) -> str:
    """Sets the adapter's class, or says why not."""
    from adapters import BnConfig
    from adapters.methods.modeling import Adapter, ParallelAdapter

    if isinstance(adapter, _Fused):
        return ""
    if type(adapter) not in (Adapter, ParallelAdapter):
        return f"a {type(adapter).__name__} is not one of AdapterHub's own adapters"
    for field, on in (("use_gating", adapter.use_gating), ("ln_after", adapter.add_layer_norm_after)):
        if on:
            return f"{field}=True has no fused form"
    for linear in (adapter.adapter_down[-2], adapter.adapter_up):
        if type(linear) is not nn.Linear:
            return f"its projections are {type(linear).__name__}, not nn.Linear"
    config = layer.adapters_config.match(name, BnConfig, layer.layer_idx, layer.location_key)
    if config is None:
        return "the model has no bottleneck config of this name"
    try:
        find_activation(config["non_linearity"].lower())
    except ValueError as error:
        return str(error)
    adapter.activation = config["non_linearity"].lower()
    object.__setattr__(adapter, "layer", layer)  # not a child: the layer is the parent
    adapter.__class__ = _fused_class(type(adapter))  # type: ignore[arg-type]
    return ""


class _Fused:
    """forward of a swapped adapter; stands in front of AdapterHub's own class."""

    parallel = False

    def _up_is_read(self) -> str:
        """Why AdapterHub needs what the adapter adds beside the sum, or ''."""
        layer: Any = self.layer  # type: ignore[attr-defined]
        if layer.adapter_fusion_layer:
            return "fused up to the residual: AdapterFusion reads what the adapter adds"
        if not all(isinstance(adapter, _Fused) for adapter in layer.adapters.values()):
            return "fused up to the residual: an adapter of this layer is not swapped, and both must return the same"
        return ""

    def _apart(self) -> str:
        """Why the residual is added outside the kernel, or ''."""
        if self.parallel:
            return "fused up to the residual: AdapterHub adds a parallel adapter's later"
        if self.training and (self.dropout.p or hasattr(self, "DropPath")):  # type: ignore[attr-defined]
            return "fused up to the residual: dropout comes before it"
        return self._up_is_read()

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple[Any, ...]:
        me: Any = self
        if output_gating:
            return super().forward(x, residual_input, output_gating)  # type: ignore[misc]
        if me.add_layer_norm_before:
            x = me.adapter_norm_before(x)
        down, up = me.adapter_down[-2], me.adapter_up
        apart = self._apart()
        y = bottleneck_adapter(
            x,
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            activation=me.activation,
            scale=me.scaling,
            residual=x.new_zeros(x.shape[-1]).expand(x.shape) if apart else residual_input,
        )
        if not apart:
            return y, None, None
        if hasattr(self, "DropPath") and not self.parallel:
            y = me.DropPath(y)  # a factor for each row: before or after `scale` is the same
        added = y if self._up_is_read() else None
        y = me.dropout(y)
        return y if self.parallel else y + residual_input, None, added


@functools.cache
def _fused_class(base: Any) -> type:
    name = f"Fused{base.__name__}"
    return type(name, (_Fused, base), {"parallel": name == "FusedParallelAdapter"})
