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

from torch import Tensor, nn

from .config import PRESETS, AdapterConfig
from .integrations.transformers import Place, Site, find_heads, find_norms, find_sites
from .layers import AdapterLayer, Own, Slot


class Task(NamedTuple):
    """What a task was added with."""

    config: AdapterConfig
    modules: tuple[str, ...]  # paths of the modules, such as a head, that belong to it
    norms: tuple[str, ...]  # paths of the base's normalisations that it has copies of


def _base_in_place(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Gives a state dict, on its way out or in, the base's values under the base's keys whichever task is active.

    One of live variables (keep_vars=True) is left as it is.
    """
    adapters = adapters_of(model)
    own = adapters.own[adapters.active] if adapters.active is not None else nn.Module()
    for key in (*own._parameters, *own._buffers):
        here, there = prefix + key.replace("/", "."), f"{prefix}adapter_ops.own.{adapters.active}.{key}"
        if isinstance(state.get(here), nn.Parameter):
            return
        found = {new: state[old] for old, new in ((here, there), (there, here)) if old in state}
        for old in {here, there} - found.keys():
            state.pop(old, None)
        state.update(found)


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

        self.handles.append(model.register_state_dict_post_hook(_base_in_place))
        self.handles.append(model.register_load_state_dict_pre_hook(_base_in_place))

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
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"adapter name {name!r} may hold letters, digits, '-' and '_' only")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r} is taken by nn.ModuleDict.{name}")
    found: Adapters | None = getattr(model, "adapter_ops", None)  # type: ignore[assignment]
    if found is not None and name in found.tasks:
        raise ValueError(f"the model already has an adapter {name!r}")
    sites = plan(model, config, places)
    heads, norms = belongings(model, config, modules)
    layers = {}
    for site in sites:
        if config.at(site.place, site.layer):
            beside = _beside(model, site)
            layers[site] = AdapterLayer(config, site.layer, site.hidden_size, beside.device, beside.dtype)
            layers[site].requires_grad_(False).train(model.training)
    with bare(model):  # so that a new task starts from the base's own values
        own = Own(model, (*heads, *norms))
    adapters = found or Adapters(model, sites)  # from here on nothing can fail
    for slot in adapters.all_slots():
        if slot.site in layers:
            slot.adapters[name] = layers[slot.site]
            slot.configs[name] = config
    adapters.own[name] = own
    adapters.tasks[name] = Task(config, heads, norms)
    if found is None:
        model.add_module("adapter_ops", adapters)


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Within the context no task is active; the one that was comes back after it."""
    adapters: Adapters | None = getattr(model, "adapter_ops", None)  # type: ignore[assignment]
    active = adapters.active if adapters is not None else None
    if active is not None:
        set_active_adapter(model, None)
    try:
        yield
    finally:
        if active is not None:
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
    own = {id(p): path for path in heads for p in model.get_submodule(path).parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not f"{name}.".startswith(tuple(f"{path}." for path in heads)):
            raise ValueError(f"{own[id(parameter)]!r} shares a parameter with {name!r}, so it cannot be a task's own")
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
        adapters.active = None
    if name is not None:
        adapters.own_of(name).exchange(model)
        adapters.active = name
    for slot in adapters.all_slots():
        slot.active = name
        slot._entered = slot._unnormalised = None  # a forward that failed midway may have left them


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
    """Removes a task; with the last one, all that this library put into the model. What `train_adapter` froze stays
    frozen (`model.requires_grad_(True)`). Raises ValueError for an unknown name."""
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
    with bare(model):  # the active task's own is in the model, and may be of another size than what it stands in for
        owned = {
            name: {key.replace("/", "."): p.numel() for key, p in adapters.own_of(name).named_parameters()}
            for name in adapters.tasks
        }
    rows = []
    for name, task in adapters.tasks.items():
        own = owned[name]
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
