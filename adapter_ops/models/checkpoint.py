"""Saving and loading one task of a model. `files.py` has the format, and README.md beside this module specifies it."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import DTYPES
from ..wrappers import runs_on
from . import files, hub
from .adapters import LOCK, adapters_of, root_of
from .building import attach, build, check_new, plan, take_labels
from .config import AdapterConfig
from .families import SitePattern
from .parameters import Labels, Task, beside
from .sharding import fill, full, one_writer, reshard
from .sites import Site, base_modules, base_parameters, find_bodies, find_models
from .tasks import train_adapter

_DIGEST_TENSORS, _DIGEST_ELEMENTS = 8, 4096
# Of a repository on the hub. Only the first is read; the others tell which library wrote it where it is not there.
_FILES = (files.WEIGHTS_FILE, files.CONFIG_FILE, "adapter_config.json")


class _Paths:
    """Paths in this model and in a file, which has those below the base model without the base's own path.

    So a task moves between a bare base, a base with a head, and a wrapper around either. Where a module outside of the
    base has the path that one below it would get, as a wrapper's own "pooler" has, it gets a "+" in front.
    """

    def __init__(self, root: nn.Module, sites: list[Site]) -> None:
        bodies, models = find_bodies(root, sites), list(find_models(root))
        prefixes = bodies[:1] if len(bodies) == 1 else []
        prefixes += models[:1] if len(models) == 1 else []
        self.prefixes = [f"{path}." for path in prefixes if path]
        self.known = {path for path, _ in base_modules(root)}

    def in_file(self, path: str) -> str:
        for prefix in self.prefixes:
            if path.startswith(prefix):
                return path.removeprefix(prefix)
        return f"+{path}" if any(prefix + path in self.known for prefix in self.prefixes) else path

    def in_model(self, path: str) -> str:
        """Below the base if there is a module of that path, else as it is."""
        if path.startswith("+") and self.prefixes:
            return path[1:]
        return next((p + path for p in self.prefixes if p + path in self.known), path)


def task_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one task, and no others: what to save by hand.

    Keys are those of a saved file: "adapters.<site>.<parameter>" and "modules.<path>.<parameter>", with paths below
    the base model. The tensors are detached and share memory with the model's; a sharded one is gathered, for which
    every process has to call this.

    Raises ValueError for an unknown name.

    >>> torch.save(task_state_dict(model, "cola"), "cola.pt")  # doctest: +SKIP
    >>> load_task_state_dict(model, "cola", torch.load("cola.pt"))  # doctest: +SKIP
    """
    adapters = adapters_of(model, name)
    reshard(adapters.model)
    tensors = _live(adapters.task(name), _Paths(adapters.model, adapters.sites))
    return {key: full(t.detach()) for key, t in tensors.items()}


@torch.no_grad()
def load_task_state_dict(model: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Copies what `task_state_dict` returned into a task that the model has. Nothing else changes.

    Raises ValueError for an unknown name, and for missing or surplus keys, wrong shapes or tensors that are not
    floating point where the task's are; the task is then as it was.
    """
    adapters = adapters_of(model, name)
    reshard(adapters.model)
    tensors = _live(adapters.task(name), _Paths(adapters.model, adapters.sites))
    for what, keys in (("lacks", tensors.keys() - state.keys()), ("has unknown", state.keys() - tensors.keys())):
        if keys:
            some = ", ".join(sorted(keys)[:3])
            raise ValueError(f"the state {what} {len(keys)} keys, the task {name!r} has {len(tensors)}: {some}")
    for key, t in tensors.items():
        given = state[key]
        if given.shape != t.shape:
            raise ValueError(
                f"{key} has shape {tuple(given.shape)} in the state, {tuple(t.shape)} in the task {name!r}"
            )
        if given.is_floating_point() != t.is_floating_point():
            raise ValueError(f"{key} has dtype {given.dtype} in the state, {t.dtype} in the task {name!r}")
    for key, t in tensors.items():
        fill(t, state[key])


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str) -> None:
    """Writes a task: its adapters, its LayerNorms if trained, and its other modules such as the head.

    An interrupted save leaves the old task or the new one, whole (see `files.write`). Of the processes that share a
    sharded model all have to call this; the first one writes, and all return when the files are in place.

    Args:
        model: also as torch.compile, DistributedDataParallel, FSDP2 or PEFT return it.
        folder: of this task alone; gets adapter_ops.safetensors and adapter_ops.json. Other files stay.
        name: of the task.

    Raises:
        ValueError: an unknown name, or a tensor that cannot be written; nothing is written then.
        OSError: the system cannot write; the old files stay whole.
    """
    adapters = adapters_of(model, name)
    task, root = adapters.task(name), adapters.model
    tensors = task_state_dict(model, name)
    paths = _Paths(root, adapters.sites)
    labels = task.labels
    header = {
        "format": files.FORMAT,
        "library": _version(),
        "name": name,
        "base": _describe(root, adapters.sites, paths)
        | {"name": _base_name(root), "digest": _digest(root, adapters.sites, paths)},
        "modules": [paths.in_file(path) for path in task.heads],
        "sites": None if adapters.patterns is None else {k: _pattern(p) for k, p in adapters.patterns.items()},
        "labels": None if labels is None else _labels(labels),
        "config": json.loads(task.config.to_json()),
    }
    with one_writer(task) as writes:
        if writes:
            files.write(folder, header, tensors)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    modules: Iterable[str] | None = None,
    sites: Mapping[str, str | SitePattern] | None = None,
    strict: bool = False,
    check_finite: bool = False,
    revision: str | None = None,
) -> str:
    """Adds a saved task to the model as `add_adapter` does: active, trainable, and all else frozen.

    Args:
        model: as in `add_adapter`.
        folder: what `save_adapter` wrote; or "user/name", a repository on the Hugging Face hub that `push_adapter`
            wrote, if nothing has that path here. It is downloaded into the cache of the package huggingface_hub, whose
            environment variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) hold.
        name: of the task in this model; by default the one it was saved under.
        modules: which of the saved modules to take; by default all. `()` loads into a model without the head.
        sites: as in `add_adapter`; by default those that the task was saved with.
        strict: whether another base than the task was trained on is an error and not a warning. The base's weights are
            compared by a digest of a few tensors, which also differs if the base was loaded in another dtype.
        check_finite: whether NaN or infinity among the weights is an error.
        revision: of the repository on the hub: a branch, a tag or the hash of a commit. Default: the branch "main".

    Returns:
        The task's name. Its labels are `list_adapters(model)[name].labels`; `model.config` keeps the base's.

    Raises:
        FileNotFoundError: no such folder or file, nor a repository on the hub; or the hub cannot be reached, and the
            cache does not have the repository.
        ImportError: a repository on the hub, and the package huggingface_hub is not installed.
        ValueError: a file that is not what `save_adapter` writes, another architecture, a missing or surplus key, a
            wrong shape, a name that is taken, modules that the file or the model does not have, or a revision of a
            local folder. The model is then exactly as it was.

    Warns:
        UserWarning: the base has other weights than the one that the task was trained on, unless `strict`.
    """
    local = hub.fetch(folder, _FILES, revision)
    with LOCK:
        saved = _read(model, local, name, modules, sites, strict, check_finite, beside_others=True)
        attach(model, saved.name, saved.task, saved.sites, saved.patterns)
        train_adapter(model, saved.name)
    return saved.name


class SavedTask(NamedTuple):
    """A task that was read from its folder, outside of the model, and the arguments of `attach`."""

    name: str
    task: Task
    sites: list[Site]
    patterns: Mapping[str, str | SitePattern] | None


def read_task(
    model: nn.Module, folder: str | os.PathLike[str], name: str, *, revision: str | None, strict: bool
) -> SavedTask:
    """The saved task in a folder, frozen and outside of the model, whose tasks may have the same name. The arguments
    and errors are those of `load_adapter`."""
    local = hub.fetch(folder, _FILES, revision)
    with LOCK:
        return _read(model, local, name, None, None, strict, False, beside_others=False)


def _read(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None,
    modules: Iterable[str] | None,
    patterns: Mapping[str, str | SitePattern] | None,
    strict: bool,
    check_finite: bool,
    beside_others: bool,
) -> SavedTask:
    root = root_of(model)
    meta = [p.is_meta for _, p in base_parameters(root)]
    if meta and all(meta) and all(runs_on(module) is None for _, module in base_modules(root)):
        raise ValueError("the model is on the meta device, which holds no values: move it first")
    wanted = [modules] if isinstance(modules, str) else None if modules is None else list(modules)
    built: dict[str, Any] = {}

    def prepare(header: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Builds the task that the header describes, outside of the model, and returns the shapes it needs."""
        if beside_others:
            check_new(model, header["name"] if name is None else name)
        try:
            config = AdapterConfig.from_json(json.dumps(header["config"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: {error}") from error
        there = patterns
        if there is None and header["sites"] is not None:
            there = {
                key: SitePattern(*(paths[f] for f in SitePattern._fields)) for key, paths in header["sites"].items()
            }
        sites = plan(model, config, there)
        paths = _Paths(root, sites)
        found, expected = _describe(root, sites, paths), header["base"]
        if found != {key: expected[key] for key in found}:
            raise ValueError(f"{folder} was saved from a base with {expected}, this model has {found}")
        _compare_bases(folder, expected, {"name": _base_name(root), "digest": _digest(root, sites, paths)}, strict)
        heads = _choose(folder, header["modules"], wanted, paths)
        task = build(model, config, sites, heads, device="meta")
        new = take_labels(folder, root, task, header["labels"])
        built.update(task=task, sites=sites, patterns=there, paths=paths, new=new)
        return {key: tuple(t.shape) for key, t in _live(task, paths).items()}

    saved = files.read(folder, limit=prepare)
    if check_finite:
        files.check_finite(saved)
    task: Task = built["task"]
    for site in built["sites"]:
        if site.name in task.layer_at:
            task.layer_at[site.name].to_empty(device=beside(root, site)[0])
    for layer, device in built["new"]:
        layer.to_empty(device=device)
    with torch.no_grad():
        for key, t in _live(task, built["paths"]).items():
            t.copy_(saved.tensors[key])
    return SavedTask(saved.header["name"] if name is None else name, task, built["sites"], built["patterns"])


def _live(task: Task, paths: _Paths) -> dict[str, Tensor]:
    """The task's tensors as they are, by their keys in a file."""
    parts: dict[str, nn.Module] = {f"adapters.{paths.in_file(n)}": layer for n, layer in task.layer_at.items()}
    parts |= {f"modules.{paths.in_file(path)}": module for path, module in task.copy_at.items()}
    tensors: dict[str, Tensor] = {}
    for start, module in parts.items():
        for key, t in module.state_dict(keep_vars=True).items():
            if not isinstance(t, Tensor):
                raise ValueError(f"{start}.{key} is a {type(t).__name__}, and a file of tensors has no place for it")
            tensors[f"{start}.{key}"] = t
    return tensors


def _choose(folder: str | os.PathLike[str], saved: list[str], wanted: list[str] | None, paths: _Paths) -> list[str]:
    """Paths in the model of the saved modules that are to be taken, given by either path."""
    here = {paths.in_model(path): path for path in saved}
    if wanted is not None:
        known = here.keys() | set(saved)
        if unknown := [path for path in wanted if path not in known]:
            raise ValueError(f"{folder} has no modules {unknown}; it has: {', '.join(saved) or 'none'}")
        here = {path: file for path, file in here.items() if path in wanted or file in wanted}
    if missing := [path for path in here if path not in paths.known]:
        raise ValueError(
            f"the model has no modules {missing}, which the task in {folder} has its own of: give the model such a "
            "head, or load the task without it by modules=()"
        )
    return list(here)


def _describe(root: nn.Module, sites: list[Site], paths: _Paths) -> dict[str, Any]:
    """The base's architecture as far as adapters depend on it."""
    stacks = {paths.in_file(site.name).rpartition(f".{site.layer}.")[0] for site in sites}
    inner = next(iter(find_models(root).values()), root)
    return {
        "model_type": getattr(getattr(inner, "config", None), "model_type", None),
        "hidden_sizes": sorted({site.hidden_size for site in sites}),
        "layers": {stack: len({s.layer for s in sites if f"{stack}." in s.name}) for stack in sorted(stacks)},
    }


def _base_name(root: nn.Module) -> str | None:
    inner = next(iter(find_models(root).values()), root)
    return getattr(getattr(inner, "config", None), "_name_or_path", None) or None


def _digest(root: nn.Module, sites: list[Site], paths: _Paths) -> str | None:
    """A digest of a few matrices of the layers that have sites; None where one of them is not there to be read.

    Other modules, such as a pooler, may be new in every process, and vectors are often all ones or all zeros.
    """
    layers = tuple({f"{site.name.rpartition('.')[0]}." for site in sites})
    found = [(paths.in_file(n), p) for n, p in base_parameters(root) if n.startswith(layers) and p.dtype in DTYPES]
    named = sorted((n, p) for n, p in found if p.dim() > 1)
    chosen = named[:: max(1, -(-len(named) // _DIGEST_TENSORS))]
    digest = hashlib.sha256()
    for name, parameter in chosen:
        if parameter.is_meta:
            return None
        values = full(parameter.detach()).flatten()[:_DIGEST_ELEMENTS].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(bytes(values.view(torch.uint8).tolist()))
    return digest.hexdigest() if chosen else None


def _compare_bases(
    folder: str | os.PathLike[str], saved: dict[str, Any], found: dict[str, str | None], strict: bool
) -> None:
    if saved["digest"] is None or found["digest"] is None or saved["digest"] == found["digest"]:
        return
    text = (
        f"the task in {folder} was trained on a base with other weights: {saved['name'] or 'without a name'} (digest "
        f"{saved['digest'][:12]}), the model is {found['name'] or 'without a name'} (digest {found['digest'][:12]})"
    )
    if strict:
        raise ValueError(text)
    warnings.warn(f"{text}. strict=True makes this an error", stacklevel=6)


def _pattern(pattern: str | SitePattern) -> dict[str, str | None]:
    return (SitePattern(pattern) if isinstance(pattern, str) else pattern)._asdict()


def _labels(labels: Labels) -> dict[str, Any]:
    names = labels.id2label
    return {**labels._asdict(), "id2label": None if names is None else {str(n): text for n, text in names.items()}}


def _version() -> str:
    try:
        return version("adapter-ops")
    except PackageNotFoundError:  # run from a checkout
        return "unknown"
