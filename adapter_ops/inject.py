"""Adapters inside a model: one frozen base, a small set of parameters for each task.

    add_adapter(model, "cola", AdapterConfig(bottleneck=64))    # frozen base, trainable task
    ...train as ever...
    set_active_adapter(model, None)                             # the bare base, to the bit

Hooks at the places of a layer run the active task's adapters; no module of the base is replaced or renamed. What else
belongs to a task (its LayerNorms, its head) is a second set of parameters that changes place with the base's.
"""

import contextlib
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor, nn

from .config import PRESETS, AdapterConfig
from .integrations.transformers import Site, find_heads, find_norms, find_sites
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

    def running(self) -> tuple[AdapterLayer, AdapterConfig] | tuple[None, None]:
        if self.skipped or self.active not in self.adapters:
            return None, None
        return self.adapters[self.active], self.configs[self.active]  # type: ignore[return-value,index]

    def on_entry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, config = self.running()
        if layer is not None and (config.placement == "parallel" or config.ln_before and self.site.norm is None):
            self._entered = args[0] if args else kwargs["hidden_states"]

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        layer, config = self.running()
        if layer is None or (config.ln_before and self.site.norm is not None):
            return None
        h = output[0] if isinstance(output, tuple) else output
        r, self._entered = self._entered, None
        if config.placement == "parallel":
            y = layer(r, h)
        else:
            x = h + r if config.ln_before else h
            y = layer(x, x if config.residual == "input" else h)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def on_norm(self, norm: nn.Module, args: tuple[Any, ...]) -> Any:
        layer, config = self.running()
        if layer is None or not config.ln_before or config.placement == "parallel":
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
        for path in modules:
            for name, parameter in model.get_submodule(path).named_parameters(prefix=path):
                copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                self.register_parameter(name.replace(".", "/"), copy)

    def exchange(self, model: nn.Module) -> None:
        """Each parameter changes places with the one of the same path in the model."""
        for key in self._parameters:
            path, _, leaf = key.replace("/", ".").rpartition(".")
            there = model.get_submodule(path)._parameters
            there[leaf], self._parameters[key] = self._parameters[key], there[leaf]


class Adapters(nn.Module):
    """Everything this library puts into a model, as its child `adapter_ops`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.configs: dict[str, AdapterConfig] = {}
        self.active: str | None = None
        self.slots = nn.ModuleDict()
        self.own = nn.ModuleDict()
        self.handles = []
        for site in find_sites(model):
            slot = self.slots[site.name.replace(".", "/")] = Slot(site)
            entry, output = model.get_submodule(site.entry), model.get_submodule(site.output)
            self.handles.append(entry.register_forward_pre_hook(slot.on_entry, with_kwargs=True))
            self.handles.append(output.register_forward_hook(slot.on_output))
            if site.norm is not None:
                norm = model.get_submodule(site.norm)
                self.handles.append(norm.register_forward_pre_hook(slot.on_norm))
                self.handles.append(norm.register_forward_hook(slot.after_norm))


def _adapters(model: nn.Module, name: str | None = None) -> Adapters:
    """The model's Adapters, checked to know `name`."""
    adapters = getattr(model, "adapter_ops", None)
    known = list(adapters.configs) if adapters is not None else []
    if adapters is None or (name is not None and name not in known):
        raise ValueError(f"the model has no adapter {name!r}; it has: {', '.join(known) or 'none'}")
    return adapters


def add_adapter(
    model: nn.Module, name: str, config: AdapterConfig | str = "houlsby", *, modules: Iterable[str] | None = None
) -> None:
    """Puts a new task's adapters into the model and makes it the one that trains (see `train_adapter`).

    Args:
        model: a transformers model of a family in `integrations.transformers.FAMILIES`.
        name: of the task; letters, digits, "-" and "_".
        config: an AdapterConfig or the name of a preset: "houlsby", "pfeiffer", "parallel", "adapter_plus".
        modules: paths of further modules that belong to the task, such as its head; by default all that stand on top
            of the base model.

    Raises:
        ValueError: a name that is taken or malformed, an unknown preset, model family or module. The model is then
            as it was.
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"unknown preset {config!r}; known: {', '.join(PRESETS)}")
        config = PRESETS[config]
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"adapter name {name!r} may hold letters, digits, '-' and '_' only")
    found: Adapters | None = getattr(model, "adapter_ops", None)
    if found is not None and name in found.configs:
        raise ValueError(f"the model already has an adapter {name!r}")
    own = list(find_heads(model) if modules is None else modules)
    paths = {path for path, _ in model.named_modules()}
    if missing := [path for path in own if path not in paths]:
        raise ValueError(f"the model has no modules {missing}")
    if config.layer_norms == "train":
        own += [path for path in find_norms(model) if not any(path == o or path.startswith(o + ".") for o in own)]
    if found is not None:
        own = [path for path in own if not path.startswith("adapter_ops")]
        set_active_adapter(model, None)
    adapters = found or Adapters(model)
    for slot in adapters.slots.values():
        site = slot.site
        if config.at(site.place, site.layer):
            beside = next(model.get_submodule(site.output.rpartition(".")[0]).parameters())
            layer = AdapterLayer(config, site.layer, site.hidden_size, beside.device, beside.dtype)
            slot.adapters[name] = layer
            slot.configs[name] = config
    adapters.own[name] = Own(model, own)
    adapters.configs[name] = config
    if found is None:
        model.add_module("adapter_ops", adapters)
    train_adapter(model, name)


def set_active_adapter(model: nn.Module, name: str | None) -> None:
    """Makes one task the active one, or, with None, leaves the bare base. Raises ValueError for an unknown name."""
    adapters = _adapters(model, name)
    if adapters.active is not None:
        adapters.own[adapters.active].exchange(model)
    adapters.active = name
    if name is not None:
        adapters.own[name].exchange(model)
    for slot in adapters.slots.values():
        slot.active = name


def train_adapter(model: nn.Module, name: str) -> None:
    """Activates a task and makes its parameters, and no others, trainable: adapters, LayerNorms (unless the config
    freezes them) and head; everything else is frozen (paper §2). Raises ValueError for an unknown name."""
    adapters = _adapters(model, name)
    set_active_adapter(model, None)
    own = adapters.own[name]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in own.parameters():
        parameter.requires_grad_(True)
    for slot in adapters.slots.values():
        if name in slot.adapters:
            slot.adapters[name].requires_grad_(True)
    set_active_adapter(model, name)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Removes a task; with the last one, every trace of this library. Raises ValueError for an unknown name."""
    adapters = _adapters(model, name)
    if adapters.active == name:
        set_active_adapter(model, None)
    for slot in adapters.slots.values():
        if name in slot.adapters:
            del slot.adapters[name], slot.configs[name]
    del adapters.own[name], adapters.configs[name]
    if not adapters.configs:
        for handle in adapters.handles:
            handle.remove()
        del model.adapter_ops


@contextlib.contextmanager
def skip_layers(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Within the context, the adapters of these layers are left out, trained as they are (paper §3.6, ablation)."""
    layers = set(layers)
    slots = [slot for slot in _adapters(model).slots.values() if slot.site.layer in layers]
    before = [slot.skipped for slot in slots]
    for slot in slots:
        slot.skipped = True
    try:
        yield
    finally:
        for slot, skipped in zip(slots, before):
            slot.skipped = skipped
