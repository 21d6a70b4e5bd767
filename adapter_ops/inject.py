"""Adapters inside a model: one frozen base, a small set of parameters for each task.

    add_adapter(model, "cola", AdapterConfig(bottleneck=64))    # frozen base, trainable task
    ...train as ever...
    set_active_adapter(model, None)                             # the bare base, to the bit

Hooks at the places of a layer run the active task's adapters; no module of the base is replaced or renamed. What else
belongs to a task (its LayerNorms, its head) is a second set of parameters that changes place with the base's.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import PRESETS, AdapterConfig
from .integrations.transformers import Place, Site, find_heads, find_norms, find_sites
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
        copies: dict[nn.Parameter, nn.Parameter] = {}  # what is shared stays shared
        for path in modules:
            for name, parameter in model.get_submodule(path).named_parameters(path, remove_duplicate=False):
                if parameter not in copies:
                    copies[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                self.register_parameter(name.replace(".", "/"), copies[parameter])

    def exchange(self, model: nn.Module) -> None:
        """Each parameter changes places with the one of the same path in the model."""
        for key in self._parameters:
            path, _, leaf = key.replace("/", ".").rpartition(".")
            there = model.get_submodule(path)._parameters
            there[leaf], self._parameters[key] = self._parameters[key], there[leaf]


class Task(NamedTuple):
    """What a task was added with."""

    config: AdapterConfig
    modules: tuple[str, ...]  # paths of the modules, such as a head, that belong to it
    norms: tuple[str, ...]  # paths of the base's normalisations that it has copies of


class Adapters(nn.Module):
    """Everything this library puts into a model, as its child `adapter_ops`."""

    def __init__(self, model: nn.Module, sites: list[Site]) -> None:
        super().__init__()
        self.tasks: dict[str, Task] = {}
        self.active: str | None = None
        self.slots = nn.ModuleDict({site.name.replace(".", "/"): Slot(site) for site in sites})
        self.own = nn.ModuleDict()  # by task
        self.handles = []
        for slot in self.all_slots():
            site = slot.site
            if site.entry is not None:
                entry = model.get_submodule(site.entry)
                self.handles.append(entry.register_forward_pre_hook(slot.on_entry, with_kwargs=True))
            self.handles.append(model.get_submodule(site.output).register_forward_hook(slot.on_output))
            if site.norm is not None:
                norm = model.get_submodule(site.norm)
                self.handles.append(norm.register_forward_pre_hook(slot.on_norm))
                self.handles.append(norm.register_forward_hook(slot.after_norm))

    def forward(self, x: Any) -> Any:
        """The identity: an nn.Sequential calls every child it has."""
        return x

    def all_slots(self) -> list[Slot]:
        return list(self.slots.values())  # type: ignore[arg-type]

    def layers(self, name: str) -> dict[str, AdapterLayer]:
        """A task's adapters by the name of their place."""
        return {s.site.name: s.adapters[name] for s in self.all_slots() if name in s.adapters}  # type: ignore[misc]

    def own_of(self, name: str) -> Own:
        return self.own[name]  # type: ignore[return-value]


def adapters_of(model: nn.Module, name: str | None = None) -> Adapters:
    """The model's Adapters. Raises ValueError, with the names there are, where it has none or not `name`."""
    adapters: Any = getattr(model, "adapter_ops", None)
    known = list(adapters.tasks) if adapters is not None else []
    if adapters is None or (name is not None and name not in known):
        raise ValueError(f"the model has no adapter {name!r}; it has: {', '.join(known) or 'none'}")
    return adapters


def add_adapter(
    model: nn.Module,
    name: str,
    config: AdapterConfig | str = "houlsby",
    *,
    modules: Iterable[str] | None = None,
    places: Mapping[str, str | Place] | None = None,
) -> None:
    """Puts a new task's adapters into the model and makes it the one that trains (see `train_adapter`).

    Args:
        model: a transformers model of a family in `integrations.transformers.FAMILIES`, or any module with `places`.
        name: of the task; letters, digits, "-" and "_".
        config: an AdapterConfig or the name of a preset: "houlsby", "pfeiffer", "parallel", "adapter_plus".
        modules: paths of further modules that belong to the task, such as its head; by default all that stand on top
            of the base model.
        places: see `find_sites`; the model's first adapter decides for all that follow.

    Raises:
        ValueError: a name that is taken or malformed, an unknown preset, model family or module, places other than
            the first adapter's, or a config that reads r where a place has no entry. The model is then as it was.
    """
    insert(model, name, config, modules, places)
    train_adapter(model, name)


def insert(
    model: nn.Module,
    name: str,
    config: AdapterConfig | str,
    modules: Iterable[str] | None = None,
    places: Mapping[str, str | Place] | None = None,
) -> None:
    """`add_adapter` without the last step: the task is there, inactive and frozen, and nothing else has changed."""
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"unknown preset {config!r}; known: {', '.join(PRESETS)}")
        config = PRESETS[config]
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"adapter name {name!r} may hold letters, digits, '-' and '_' only")
    found: Adapters | None = getattr(model, "adapter_ops", None)  # type: ignore[assignment]
    if found is not None and name in found.tasks:
        raise ValueError(f"the model already has an adapter {name!r}")
    sites = plan(model, config, places)
    heads, norms = belongings(model, config, modules)
    active = found.active if found is not None else None
    if active is not None:
        set_active_adapter(model, None)  # so that a new task starts from the base's own values
    adapters = found or Adapters(model, sites)
    for slot in adapters.all_slots():
        site = slot.site
        if config.at(site.place, site.layer):
            beside = _beside(model, site)
            layer = AdapterLayer(config, site.layer, site.hidden_size, beside.device, beside.dtype)
            slot.adapters[name] = layer.requires_grad_(False).train(model.training)
            slot.configs[name] = config
    adapters.own[name] = Own(model, (*heads, *norms))
    adapters.tasks[name] = Task(config, heads, norms)
    if found is None:
        model.add_module("adapter_ops", adapters)
    elif active is not None:
        set_active_adapter(model, active)


def belongings(
    model: nn.Module, config: AdapterConfig, modules: Iterable[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the modules and of the normalisations that a task has beside its adapters; see `add_adapter`."""
    if modules is None:
        modules = (path for path in find_heads(model) if not path.startswith("adapter_ops"))
    heads = tuple(modules)
    paths = {path for path, _ in model.named_modules()}
    if missing := [path for path in heads if path not in paths]:
        raise ValueError(f"{type(model).__name__} has no modules {missing}")
    inside = tuple(f"{path}." for path in (*heads, "adapter_ops"))
    norms = find_norms(model) if config.layer_norms == "train" else []
    return heads, tuple(path for path in norms if not f"{path}.".startswith(inside))


def plan(model: nn.Module, config: AdapterConfig, places: Mapping[str, str | Place] | None = None) -> list[Site]:
    """The model's places, checked to serve `config`; see `add_adapter` for the errors."""
    found: Adapters | None = getattr(model, "adapter_ops", None)  # type: ignore[assignment]
    if found is None:
        sites = find_sites(model, places)
    else:
        sites = [slot.site for slot in found.all_slots()]
        if places is not None and find_sites(model, places) != sites:
            raise ValueError(f"the model's adapters stand elsewhere than {dict(places)}: delete them first")
    for site in sites:
        reads_r = config.placement == "parallel" or (config.ln_before and site.norm is None)
        if site.entry is None and reads_r and config.at(site.place, site.layer):
            raise ValueError(
                f"the place {site.name!r} has no entry, and this config (placement={config.placement!r}, "
                f"ln_before={config.ln_before}) reads the sublayer's input: give Place(output, entry) in places"
            )
    return sites


def _beside(model: nn.Module, site: Site) -> Tensor:
    """A parameter at a place: the adapter takes its device and dtype."""
    path = site.output
    while path:
        for parameter in model.get_submodule(path).parameters():
            if parameter.is_floating_point():
                return parameter
        path = path.rpartition(".")[0]
    return next(model.parameters())


def set_active_adapter(model: nn.Module, name: str | None) -> None:
    """Makes one task the active one, or, with None, leaves the bare base. Raises ValueError for an unknown name."""
    adapters = adapters_of(model, name)
    if adapters.active is not None:
        adapters.own_of(adapters.active).exchange(model)
    adapters.active = name
    if name is not None:
        adapters.own_of(name).exchange(model)
    for slot in adapters.all_slots():
        slot.active = name


def train_adapter(model: nn.Module, name: str) -> None:
    """Activates a task and makes its parameters, and no others, trainable: adapters, LayerNorms (unless the config
    freezes them) and head; everything else is frozen (paper §2). Raises ValueError for an unknown name."""
    adapters = adapters_of(model, name)
    set_active_adapter(model, None)
    model.requires_grad_(False)
    for trained in (adapters.own_of(name), *adapters.layers(name).values()):
        trained.requires_grad_(True)
    set_active_adapter(model, name)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Removes a task; with the last one, every trace of this library. Raises ValueError for an unknown name."""
    adapters = adapters_of(model, name)
    if adapters.active == name:
        set_active_adapter(model, None)
    for slot in adapters.all_slots():
        if name in slot.adapters:
            del slot.adapters[name], slot.configs[name]
    del adapters.own[name], adapters.tasks[name]
    if not adapters.tasks:
        for handle in adapters.handles:
            handle.remove()
        del model.adapter_ops


class TaskSize(NamedTuple):
    """Parameters of one task by kind, and their sum as a share of the base's."""

    name: str
    adapters: int
    norms: int
    modules: int
    total: int
    share: float


def adapter_summary(model: nn.Module) -> list[TaskSize]:
    """Prints and returns what each task adds, and, in a last row named "all tasks", what all of them add.

    The base is the model without adapters and without heads. Works on the meta device.
    """
    adapters = adapters_of(model)
    heads = tuple(f"{path}." for path in (*find_heads(model), "adapter_ops"))
    base = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(heads))
    rows = []
    for name, task in adapters.tasks.items():
        own = {key.replace("/", "."): p.numel() for key, p in adapters.own_of(name).named_parameters()}
        inside = tuple(f"{path}." for path in task.norms)
        norms = sum(size for key, size in own.items() if key.startswith(inside))
        layers = sum(p.numel() for layer in adapters.layers(name).values() for p in layer.parameters())
        total = layers + sum(own.values())
        rows.append(TaskSize(name, layers, norms, sum(own.values()) - norms, total, total / base))
    kinds = [sum(column) for column in list(zip(*rows))[1:4]]
    rows.append(TaskSize("all tasks", kinds[0], kinds[1], kinds[2], sum(kinds), sum(kinds) / base))
    width = max(len(row.name) for row in rows) + 1
    print(f"base: {base:,} parameters; active: {adapters.active}")
    print(f"{'':{width}} {'adapters':>12} {'norms':>10} {'modules':>12} {'total':>12} {'of base':>8}")
    for name, layers, norms, modules, total, share in rows:
        print(f"{name:{width}} {layers:12,} {norms:10,} {modules:12,} {total:12,} {share:8.2%}")
    return rows


@contextlib.contextmanager
def skip_layers(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Within the context, the adapters of these layers are left out, trained as they are (paper §3.6, ablation)."""
    wanted = set(layers)
    slots = [slot for slot in adapters_of(model).all_slots() if slot.site.layer in wanted]
    before = [slot.skipped for slot in slots]
    for slot in slots:
        slot.skipped = True
    try:
        yield
    finally:
        for slot, skipped in zip(slots, before):
            slot.skipped = skipped
