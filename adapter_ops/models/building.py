"""A new task: what it is to have is checked, it is built outside of the model, and then attached to it."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..wrappers import holder_of, unwrap
from .adapters import Adapters, find_adapters, root_of
from .config import PRESETS, AdapterConfig, Preset
from .families import SitePattern
from .hooks import Bound
from .layers import AdapterLayer
from .parameters import Labels, Task, beside, copy_modules, key_of, output_of, resize
from .sharding import reshard, shard_like
from .sites import Site, base_modules, find_models, find_norms, find_sites


def preset(config: AdapterConfig | Preset) -> AdapterConfig:
    """The config itself, or the preset of that name. Raises ValueError for an unknown one."""
    if isinstance(config, AdapterConfig):
        return config
    if not isinstance(config, str) or config not in PRESETS:
        raise ValueError(f"unknown preset {config!r}; known: {', '.join(PRESETS)}")
    return PRESETS[config]


def check_name(name: str) -> None:
    """Raises ValueError for the name of a new task if it is malformed."""
    if not isinstance(name, str) or not name.strip(".") or not all(c.isalnum() or c in "-_." for c in name):
        raise ValueError(f"adapter name {name!r} may hold letters, digits, '-', '_' and '.' only")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter name {name!r} is taken by nn.ModuleDict.{name}")


def check_new(model: nn.Module, name: str) -> None:
    """Raises ValueError for the name of a new task if it is malformed or taken."""
    check_name(name)
    found = find_adapters(model)
    if found is not None and name in found.names:
        raise ValueError(f"the model already has an adapter {name!r}; it has: {', '.join(found.names)}")


def plan(
    model: nn.Module, config: AdapterConfig, patterns: Mapping[str, str | SitePattern] | None = None
) -> list[Site]:
    """The model's sites, checked to serve `config`; see `add_adapter` for the errors."""
    found = find_adapters(model)
    if found is None:
        root = unwrap(model)
        sites = find_sites(root, patterns)
        if other := [path for path, m in base_modules(root) if isinstance(m.__dict__.get("forward"), Bound)]:
            raise ValueError(
                f"{other[0]!r} runs the adapters of another model, which contains it too: add the task to that model, "
                "or delete that model's tasks first"
            )
    else:
        sites = found.sites
        if patterns is not None and find_sites(found.model, patterns) != sites:
            raise ValueError(f"the model's adapters stand elsewhere than {dict(patterns)}: delete them first")
    layers = {site.layer for site in sites}
    sizes = config.reduction_factor if config.bottleneck is None else config.bottleneck
    named = {int(n) for n in sizes if n != "default"} if isinstance(sizes, Mapping) else set()
    for field, wanted in (("leave_out", set(config.leave_out)), ("bottleneck or reduction_factor", named)):
        if unknown := sorted(wanted - layers):
            raise ValueError(f"{field} names layers {unknown}, the model has {min(layers)} to {max(layers)}")
    for site in sites:
        reads, _ = config.wiring(site.norm is not None)
        if site.entry is None and reads in ("input", "sum") and config.at(site.placement, site.layer):
            raise ValueError(
                f"the site {site.name!r} has no entry, and this config (placement={config.placement!r}, "
                f"ln_before={config.ln_before}) reads the sublayer's input: give SitePattern(output, entry) in sites"
            )
    return sites


def build(
    model: nn.Module, config: AdapterConfig, sites: list[Site], heads: Iterable[str], device: str | None = None
) -> Task:
    """A new task for the model, frozen and outside of it. `device`: where the adapters' parameters are made, instead
    of beside the modules that they follow. See `add_adapter` for the errors."""
    root, found = root_of(model), find_adapters(model)
    reshard(root)  # or parameters would be read in the dtype that a forward has left them in
    own, norms = belongings(root, config, heads)
    layers = {}
    for site in sites:
        if config.at(site.placement, site.layer):
            where, dtype = beside(root, site)
            where = torch.device(device) if device else where
            layer = AdapterLayer(config, site.layer, site.hidden_size, where, dtype, has_norm=site.norm is not None)
            layers[site.name] = layer.requires_grad_(False).train(root.training)
    _check_apart(own, [site for site in sites if site.name in layers])
    copies = copy_modules(root, (*own, *norms), [] if found is None else found.machinery)
    return Task(config, own, norms, layers, copies, labels_of(root, [copies[path] for path in own]))


def attach(
    model: nn.Module, name: str, task: Task, sites: list[Site], patterns: Mapping[str, str | SitePattern] | None
) -> None:
    """Makes a built task part of the model. Nothing in it can fail but a sharded model's process group."""
    shard_like(root_of(model), [*task.layer_at.values(), *task.copy_at.values()])
    adapters = prepare(model, task.copy_at, sites, patterns)
    adapters.tasks[key_of(name)] = task


def prepare(
    model: nn.Module, copies: Iterable[str], sites: list[Site], patterns: Mapping[str, str | SitePattern] | None
) -> Adapters:
    """Makes the model run tasks which have copies of the modules at these paths, and returns its Adapters."""
    root, found = root_of(model), find_adapters(model)
    adapters = found or Adapters(root, sites, patterns)
    for path in copies:
        adapters.switch(path)
    if found is None:
        holder_of(root, [site.output for site in sites]).add_module("adapter_ops", adapters)
    return adapters


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
    """Raises ValueError if a module of the task's own has a site of its adapters inside."""
    for site in sites:
        for path in (site.output, site.entry, site.norm):
            if path is not None and (around := [head for head in heads if path.startswith(f"{head}.")]):
                raise ValueError(
                    f"{around[0]!r} contains {path!r}, where the adapter at {site.name!r} hangs, which would not run "
                    "inside a task's own copy: name smaller modules, or leave the layer out with leave_out="
                )


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


def take_labels(
    folder: str | os.PathLike[str], root: nn.Module, task: Task, saved: dict[str, Any] | None
) -> list[tuple[nn.Linear, torch.device]]:
    """Gives a built task the labels of its file, `saved` as a file's header has them, and its heads as many outputs.

    Returns the layers that it made for that on the meta device, with the devices they belong on.
    """
    base, task.labels = labels_of(root, [task.copy_at[path] for path in task.heads]), None
    if saved is None or not task.heads:
        return []
    count, names = saved["num_labels"], saved["id2label"]
    if not 1 <= count < 1 << 31 or not all(n.isdecimal() for n in names or {}):
        raise ValueError(f"{folder}: num_labels is {count} and id2label has the keys {list(names or {})[:4]}")
    task.labels = Labels(count, names and {int(n): label for n, label in names.items()}, saved["problem_type"])
    if base is None or base.num_labels == count:
        return []
    outputs = [(path, output) for path in task.heads if (output := output_of(task.copy_at[path])) is not None]
    fitting = [(path, output) for path, output in outputs if output.out_features == base.num_labels]
    # A layer before the last, as DistilBERT's pre_classifier, may by chance have as many outputs as there are classes.
    changing = [(path, output) for path, output in fitting if output.in_features != base.num_labels]
    new = []
    for path, old in changing or fitting[-1:]:
        head, layer = resize(task.copy_at[path], old, count)
        task.replace_head(path, head)
        new.append((layer, old.weight.device))
    return new
