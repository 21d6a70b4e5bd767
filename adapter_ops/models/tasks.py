"""Adapters inside a model: one frozen base, a small set of parameters for each task.

    add_adapter(model, "cola", AdapterConfig(bottleneck=64))    # frozen base, trainable task
    ...train as ever...
    with using_adapter(model, "cola"): ...                      # in this thread or async task alone
    set_active_adapter(model, None)                             # everywhere: the bare base, to the bit

Nothing of the base is replaced, renamed or changed. Hooks run the active task's adapters, and its own LayerNorms and
head run in place of the base's (see `hooks.py`). All of it hangs in one child of the model, named `adapter_ops`.
"""

import contextlib
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..wrappers import around, holder_of, holders, is_data_parallel, unwrap
from .config import PRESETS, AdapterConfig
from .context import Selection
from .families import (
    Place,
    Site,
    base_modules,
    base_parameters,
    find_frozen,
    find_heads,
    find_models,
    find_norms,
    find_sites,
)
from .hooks import Bound, Frame, Root, Slot, Switch
from .layers import AdapterLayer
from .parameters import Labels, Task, beside, copy_modules, key_of, output_of
from .sharding import reshard, shard_like

LOCK = threading.RLock()  # of every change to which tasks a model has


class Adapters(nn.Module):
    """Everything this library puts into a model, as the child `adapter_ops`: the tasks, and what runs them."""

    def __init__(self, model: nn.Module, sites: list[Site], places: Mapping[str, str | Place] | None) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict()
        self.sites = sites
        self.places = None if places is None else dict(places)
        self.selection = Selection()
        self._model = (model,)  # in a tuple, or it would be a child of its own child
        self.slots = {site.name: Slot(site, self.selection) for site in sites}
        self.switches: dict[str, Switch] = {}  # by path
        self.bound: list[Bound] = [Root(model, self.selection, self.check)]
        self.handles = []
        frames: set[str] = set()
        hooked: dict[str, nn.Module] = {}
        for slot in self.slots.values():
            site = slot.site
            if site.entry is not None:
                hooked[site.entry] = entry = model.get_submodule(site.entry)
                self.handles.append(entry.register_forward_pre_hook(slot.on_entry, with_kwargs=True))
                frames.add(around(model, site.entry, site.output))
            hooked[site.output] = output = model.get_submodule(site.output)
            self.handles.append(output.register_forward_hook(slot.on_output))
        self.hooked = [(path, *_above(model, path), module) for path, module in hooked.items()]
        # torch.compile does not notice hooks on a module that it has compiled without any, but a forward it does.
        self.bound += [Bound(module) for module in hooked.values()]
        self.bound += [Frame(model.get_submodule(path), self.selection) for path in sorted(frames)]
        for slot in self.slots.values():
            if slot.site.norm is not None:
                self.switch(slot.site.norm, slot)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The identity: an nn.Sequential calls every child it has."""
        return args[0] if args else kwargs

    @property
    def model(self) -> nn.Module:
        """The model that the paths of sites, heads and norms start from."""
        return self._model[0]

    @property
    def machinery(self) -> list[Any]:
        """The objects on the base's modules that are not modules themselves."""
        return [*self.slots.values(), *self.bound, *self.switches.values(), self.selection]

    def task(self, name: str) -> Task:
        return self.tasks._modules[key_of(name)]  # type: ignore[return-value]

    @property
    def names(self) -> list[str]:
        return [key.replace("+", ".") for key in list(self.tasks._modules)]  # which other threads may add to

    def name_of(self, task: Task | None) -> str | None:
        """The name of a task that was read off `selection`; None for no task, and for one deleted since."""
        tasks = list(self.tasks._modules.items())
        return next((key.replace("+", ".") for key, other in tasks if other is task), None)

    def switch(self, path: str, slot: Slot | None = None) -> None:
        """Lets a module of the base give way to a task's copy of it."""
        module = self.model.get_submodule(path)
        known = self.switches.get(path)
        if known is None or known.module is not module:
            if known is not None:
                known.remove()  # of a module that was there before
            slot = slot or (known.slot if known else None)
            self.switches[path] = Switch(module, path, _above(self.model, path), self.selection, slot)

    def switches_of(self, task: Task) -> list[Switch]:
        """The switches that a task needs: of its copies, and where an adapter of its may read a normalisation."""
        switches = list(self.switches.items())  # which other threads may add to
        return [switch for path, switch in switches if switch.slot is not None or path in task.copy_at]

    def check(self, task: Task | None) -> None:
        """Raises RuntimeError if a module was replaced since, so that something of the task would not run."""
        if task is None:
            return
        for path, parent, leaf, module in self.hooked:
            now = parent._modules.get(leaf)
            if now is not module and (now is None or all(part is not module for part in now.modules())):
                raise RuntimeError(
                    f"the module {path!r} was replaced after the model's first task was added, so that its adapter "
                    "would not run: put the module back, or save the tasks, delete them and load them again"
                )
        for switch in self.switches_of(task):
            parent, leaf = _above(self.model, switch.path) if switch.path in task.heads else switch.above
            if parent._modules.get(leaf) is not switch.module:
                raise RuntimeError(
                    f"the module {switch.path!r} was replaced after the task {self.name_of(task)!r} got its own: "
                    "activate the task again (set_active_adapter) to run the task's own, or "
                    "set_active_adapter(model, None) and add a new task for the new module"
                )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for bound in reversed([*self.bound, *self.switches.values()]):
            bound.remove()


def _above(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has the one at a path as a child, and the child's name there."""
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent), leaf


def adapters_of(model: nn.Module, name: str | None = None) -> Adapters:
    """The model's Adapters. Raises ValueError, with the names there are, where it has none or not `name`."""
    found = _find(model)
    known = found.names if found is not None else []
    if found is None or (name is not None and name not in known):
        what = "adapters" if name is None else f"adapter {name!r}"
        raise ValueError(f"the model has no {what}; it has: {', '.join(known) or 'none'}")
    return found


def _find(model: nn.Module) -> Adapters | None:
    found = holders(unwrap(model))
    if len(found) > 1:
        raise ValueError(
            f"several modules of {type(model).__name__} have adapters of their own: {', '.join(found)}; pass the one "
            "that is meant"
        )
    return next((module._modules["adapter_ops"] for module in found.values()), None)  # type: ignore[return-value]


def add_adapter(
    model: nn.Module,
    name: str,
    config: AdapterConfig | str = "houlsby",
    *,
    modules: Iterable[str] | None = None,
    places: Mapping[str, str | Place] | None = None,
) -> None:
    """Puts a new task's adapters into the model and makes it the one that trains (see `train_adapter`).

    The model's first task is to be added while no other thread calls the model; further ones may be at any time.

    Args:
        model: a transformers model of a family in `integrations.transformers.FAMILIES`, a module that contains one, or
            any module with `places`; also as torch.compile, DistributedDataParallel, FSDP2 or PEFT return it.
        name: of the task; letters, digits, "-", "_" and ".".
        config: an AdapterConfig or the name of a preset: "houlsby", "pfeiffer", "parallel", "adapter_plus".
        modules: paths of further modules that belong to the task, such as its head; by default all that stand on top
            of the base model (see `integrations.transformers.find_heads`). The task gets a copy of each.
        places: see `find_sites`; the model's first adapter decides for all that follow.

    Raises:
        ValueError: a name that is taken or malformed, an unknown preset, model family or module, places other than
            the first adapter's, a config that reads the sublayer's input where a place has no entry, a module that
            cannot be copied or trained, or an offloaded layer. The model is then as it was.

    Warns:
        UserWarning: parameters outside the base that belong to no head and so stay frozen, unless `modules` is given;
            a DistributedDataParallel wrapper, which does not know the new parameters.
    """
    with LOCK:
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
    with LOCK:
        config = preset(config)
        check_new(model, name)
        sites = plan(model, config, places)
        root = root_of(model)
        if modules is None:
            heads = find_heads(root, sites)
            if frozen := find_frozen(root, sites, heads):
                some = ", ".join(frozen[:4]) + (", …" if len(frozen) > 4 else "")
                warnings.warn(
                    f"{len(frozen)} parameters outside the base belong to no head and stay frozen: {some}. "
                    "modules= says which modules belong to the task",
                    stacklevel=3,
                )
        else:
            heads = [modules] if isinstance(modules, str) else list(modules)
        task = build(model, config, sites, heads)
        attach(model, name, task, sites, places)


def root_of(model: nn.Module) -> nn.Module:
    """The module that paths start from: that of the model's first adapter, else what is inside its wrappers."""
    found = _find(model)
    return unwrap(model) if found is None else found.model


def check_new(model: nn.Module, name: str) -> None:
    """Raises ValueError for the name of a new task if it is malformed or taken."""
    if not isinstance(name, str) or not name.strip(".") or not all(c.isalnum() or c in "-_." for c in name):
        raise ValueError(f"adapter name {name!r} may hold letters, digits, '-', '_' and '.' only")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r} is taken by nn.ModuleDict.{name}")
    found = _find(model)
    if found is not None and name in found.names:
        raise ValueError(f"the model already has an adapter {name!r}; it has: {', '.join(found.names)}")


def build(
    model: nn.Module, config: AdapterConfig, sites: list[Site], heads: Iterable[str], device: str | None = None
) -> Task:
    """A new task for the model, frozen and outside of it. `device`: where the adapters' parameters are made, instead
    of beside the modules that they follow. See `add_adapter` for the errors."""
    root, found = root_of(model), _find(model)
    reshard(root)  # or parameters would be read in the dtype that a forward has left them in
    own, norms = belongings(root, config, heads)
    layers = {}
    for site in sites:
        if config.at(site.place, site.layer):
            where, dtype = beside(root, site)
            where = torch.device(device) if device else where
            layer = AdapterLayer(config, site.layer, site.hidden_size, where, dtype, has_norm=site.norm is not None)
            layers[site.name] = layer.requires_grad_(False).train(root.training)
    _check_apart(own, [site for site in sites if site.name in layers])
    copies = copy_modules(root, (*own, *norms), [] if found is None else found.machinery)
    return Task(config, own, norms, layers, copies, labels_of(root, [copies[path] for path in own]))


def attach(
    model: nn.Module, name: str, task: Task, sites: list[Site], places: Mapping[str, str | Place] | None
) -> None:
    """Makes a built task part of the model. Nothing in it can fail but a sharded model's process group."""
    root, found = root_of(model), _find(model)
    shard_like(root, [*task.layer_at.values(), *task.copy_at.values()])
    adapters = found or Adapters(root, sites, places)
    for path in task.copy_at:
        adapters.switch(path)
    adapters.tasks[key_of(name)] = task
    if found is None:
        holder_of(root, [site.output for site in sites]).add_module("adapter_ops", adapters)


def preset(config: AdapterConfig | str) -> AdapterConfig:
    """The config itself, or the preset of that name. Raises ValueError for an unknown one."""
    if isinstance(config, AdapterConfig):
        return config
    if not isinstance(config, str) or config not in PRESETS:
        raise ValueError(f"unknown preset {config!r}; known: {', '.join(PRESETS)}")
    return PRESETS[config]


def labels_of(model: nn.Module, heads: Iterable[nn.Module]) -> Labels | None:
    """What the config of the model says of its classes, if one of the heads has as many outputs."""
    inner = next(iter(find_models(model).values()), model)
    config: Any = getattr(model, "config", None) or getattr(inner, "config", None)
    count = getattr(config, "num_labels", None)
    if count not in [output.out_features for head in heads if (output := output_of(head)) is not None]:
        return None
    names = getattr(config, "id2label", None)
    return Labels(
        count,
        {int(number): str(label) for number, label in names.items()} if names else None,
        getattr(config, "problem_type", None),
    )


@contextlib.contextmanager
def using_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the context one task is active, or with None the bare base: in this thread or async task alone.

    Whatever is active elsewhere, and the model's default (`set_active_adapter`), stay as they are. Contexts nest, and
    one model may be in use with different tasks in many threads at once. New threads start with the default, and an
    async task that is created within the context has the task until the context ends, so await it there. With
    gradient checkpointing, run backward inside the context too, since it runs layers again. A generator that yields
    inside the context leaves it open in its caller until it goes on, as it would `torch.no_grad()`.

    Raises ValueError for an unknown name, before anything runs.

    >>> with using_adapter(model, "cola"):  # doctest: +SKIP
    ...     logits = model(**batch).logits
    """
    adapters = adapters_of(model, name)
    task = None if name is None else adapters.task(name)
    if task is not None:
        rebind(adapters, task, name)
    with adapters.selection.choose(True, task):
        yield


def rebind(adapters: Adapters, task: Task, name: str | None) -> None:
    """Makes sure that the task's copies run, also where a module of the base was replaced.

    Raises ValueError, with nothing changed, where the base has no such module any more.
    """
    for switch in adapters.switches_of(task):
        try:
            module = adapters.model.get_submodule(switch.path)
        except AttributeError:
            raise ValueError(
                f"the model has no module {switch.path!r} any more, of which the task {name!r} has its own"
            ) from None
        if switch.module is not module:
            with LOCK:
                adapters.switch(switch.path)


def belongings(
    model: nn.Module, config: AdapterConfig, heads: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the modules and of the normalisations that a task has copies of; see `add_adapter`.

    Raises ValueError for a path where there is no module, and for a module that shares a parameter with the base.
    """
    heads = tuple(dict.fromkeys(heads))
    base = dict(base_modules(model))
    paths = base.keys() - {""}
    if missing := [path for path in heads if path not in paths]:
        raise ValueError(f"{type(model).__name__} has no modules {missing}")
    if nested := [path for path in heads if path.startswith(tuple(f"{other}." for other in heads))]:
        raise ValueError(f"modules {nested} are parts of others in {list(heads)}: name the outermost only")
    own = {id(p): path for path in heads for p in model.get_submodule(path).parameters()}
    inside = tuple(f"{path}." for path in heads)
    for path, module in base.items():
        if own and not f"{path}.".startswith(inside):
            for name, parameter in module.named_parameters(path, recurse=False):
                if id(parameter) in own:
                    raise ValueError(
                        f"{own[id(parameter)]!r} shares a parameter with {name!r}, so it cannot be a task's own"
                    )
    norms = find_norms(model) if config.layer_norms == "train" else []
    return heads, tuple(path for path in norms if not f"{path}.".startswith(inside))


def _check_apart(heads: Iterable[str], sites: list[Site]) -> None:
    """Raises ValueError if a module of the task's own has a place of its adapters inside."""
    for site in sites:
        for path in (site.output, site.entry, site.norm):
            if path is not None and (around := [head for head in heads if path.startswith(f"{head}.")]):
                raise ValueError(
                    f"{around[0]!r} contains {path!r}, where the adapter at {site.name!r} hangs, which would not run "
                    "inside a task's own copy: name smaller modules, or leave the layer out with leave_out="
                )


def plan(model: nn.Module, config: AdapterConfig, places: Mapping[str, str | Place] | None = None) -> list[Site]:
    """The model's sites, checked to serve `config`; see `add_adapter` for the errors."""
    found = _find(model)
    if found is None:
        root = unwrap(model)
        sites = find_sites(root, places)
        if other := [path for path, m in base_modules(root) if isinstance(m.__dict__.get("forward"), Bound)]:
            raise ValueError(
                f"{other[0]!r} runs the adapters of another model, which contains it too: add the task to that model, "
                "or delete that model's tasks first"
            )
    else:
        sites = found.sites
        if places is not None and find_sites(found.model, places) != sites:
            raise ValueError(f"the model's adapters stand elsewhere than {dict(places)}: delete them first")
    layers = {site.layer for site in sites}
    sizes = config.reduction_factor if config.bottleneck is None else config.bottleneck
    named = {int(n) for n in sizes if n != "default"} if isinstance(sizes, Mapping) else set()
    for field, wanted in (("leave_out", set(config.leave_out)), ("bottleneck or reduction_factor", named)):
        if unknown := sorted(wanted - layers):
            raise ValueError(f"{field} names layers {unknown}, the model has {min(layers)} to {max(layers)}")
    for site in sites:
        reads = config.reads(site.norm is not None)
        if site.entry is None and reads in ("input", "sum") and config.at(site.place, site.layer):
            raise ValueError(
                f"the place {site.name!r} has no entry, and this config (placement={config.placement!r}, "
                f"ln_before={config.ln_before}) reads the sublayer's input: give Place(output, entry) in places"
            )
    return sites


def set_active_adapter(model: nn.Module, name: str | None) -> None:
    """Makes one task the default, or, with None, the bare base: for every thread that is in no `using_adapter`.

    A call of the model that runs in another thread meanwhile ends with the task it began with. To serve several tasks
    at once use `using_adapter`. Raises ValueError for an unknown name.
    """
    adapters = adapters_of(model, name)
    task = None if name is None else adapters.task(name)
    if task is not None:
        rebind(adapters, task, name)
    adapters.selection.set_default(task)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the task that a call of the model would run here and now; None for the bare base.

    Also None where the model has no adapters at all.
    """
    found = _find(model)
    return None if found is None else found.name_of(found.selection.task())


class AdapterInfo(NamedTuple):
    """What a task was added with."""

    config: AdapterConfig
    modules: tuple[str, ...]  # paths of the modules, such as a head, of which it has its own
    norms: tuple[str, ...]  # paths of the normalisations of which it has its own
    labels: Labels | None  # what the classes of its head mean


def list_adapters(model: nn.Module) -> dict[str, AdapterInfo]:
    """The model's tasks by name, in the order they were added; empty where there are none."""
    found = _find(model)
    if found is None:
        return {}
    tasks = {name: found.task(name) for name in found.names}
    return {name: AdapterInfo(t.config, t.heads, t.norms, t.labels) for name, t in tasks.items()}


def train_adapter(model: nn.Module, name: str) -> None:
    """Makes a task the default and its parameters, and no others, trainable: adapters, LayerNorms (unless the config
    freezes them) and head; everything else is frozen (paper §2).

    Raises ValueError for an unknown name. Warns where the model is wrapped in DistributedDataParallel, which
    synchronises the gradients of those parameters alone that trained when it was made, and where the model's first task
    was added to a part of it alone and parameters outside of that part train: no task has them, and they stay as they
    are.
    """
    adapters = adapters_of(model, name)
    outer, inside = unwrap(model), {id(p) for _, p in base_parameters(adapters.model)}
    if outside := [n for n, p in base_parameters(outer) if p.requires_grad and id(p) not in inside]:
        warnings.warn(
            f"{len(outside)} parameters train that stand outside of the {type(adapters.model).__name__} to which the "
            f"first task was added, so they belong to no task and save_adapter does not write them: "
            f"{', '.join(outside[:4])}",
            stacklevel=2,
        )
    if is_data_parallel(model):
        warnings.warn(
            f"DistributedDataParallel does not synchronise parameters that were frozen when it was made: wrap the "
            f"model again before you train {name!r}",
            stacklevel=2,
        )
    set_active_adapter(model, name)
    reshard(adapters.model)
    for _, parameter in base_parameters(adapters.model):
        parameter.requires_grad_(False)
    for other in adapters.names:
        adapters.task(other).freeze()
    adapters.task(name).requires_grad_(True)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Removes a task; with the last one, all that this library put into the model. What `train_adapter` froze stays
    frozen (`model.requires_grad_(True)`). A `using_adapter` that is open keeps the task until it ends, unless it was
    the model's last one: that is to be deleted while no other thread calls the model.

    Raises ValueError for an unknown name.
    """
    with LOCK:
        adapters = adapters_of(model, name)
        if adapters.selection.default is adapters.task(name):
            adapters.selection.set_default(None)
        del adapters.tasks[key_of(name)]
        if not len(adapters.tasks):
            adapters.remove()
            (holder,) = holders(unwrap(model)).values()
            del holder.adapter_ops


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
    root = adapters.model
    heads = tuple(f"{path}." for path in find_heads(root, adapters.sites))
    base = sum(p.numel() for name, p in base_parameters(root) if not name.startswith(heads))
    rows = []
    for name in adapters.names:
        task = adapters.task(name)
        norms, modules = (
            sum(p.numel() for path in paths for p in task.copy_at[path].parameters())
            for paths in (task.norms, task.heads)
        )
        layers = sum(p.numel() for p in task.adapters.parameters())
        total = layers + norms + modules
        rows.append(TaskSize(name, layers, norms, modules, total, total / base))
    kinds = [sum(column) for column in list(zip(*rows))[1:4]]
    rows.append(TaskSize("all tasks", kinds[0], kinds[1], kinds[2], sum(kinds), sum(kinds) / base))
    width = max(len(row.name) for row in rows) + 1
    print(f"base: {base:,} parameters; active: {active_adapter(model)}")
    print(f"{'':{width}} {'adapters':>12} {'norms':>10} {'modules':>12} {'total':>12} {'of base':>8}")
    for name, layers, norms, modules, total, share in rows:
        print(f"{name:{width}} {layers:12,} {norms:10,} {modules:12,} {total:12,} {share:8.2%}")
    return rows


@contextlib.contextmanager
def skip_layers(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Within the context, the adapters of these layers are left out, trained as they are (paper §3.6, ablation).

    It holds for this thread or async task alone. Raises ValueError for a layer that the model does not have.
    """
    adapters = adapters_of(model)
    wanted, known = frozenset(layers), {site.layer for site in adapters.sites}
    if unknown := sorted(wanted - known):
        raise ValueError(f"the model has no layers {unknown}; it has {min(known)} to {max(known)}")
    with adapters.selection.choose(False, None, wanted):
        yield
