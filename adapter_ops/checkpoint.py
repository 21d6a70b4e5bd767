"""Saving and loading one task: a folder with adapter_config.json and adapter.safetensors.

The weights file carries the whole configuration in its header too, so it is the point at which a save takes effect.
"""

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .config import AdapterConfig
from .inject import adapters_of, bare, belongings, delete_adapter, insert, plan, set_active_adapter
from .integrations.transformers import Site
from .layers import AdapterLayer

CONFIG, WEIGHTS, FORMAT = "adapter_config.json", "adapter.safetensors", 1


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str) -> None:
    """Writes a task: its adapters, its LayerNorms if trained, and its other modules such as the head.

    Each file is written beside its place and then renamed, the weights first: an interrupted save leaves the old task
    or the new one, whole. Raises ValueError for an unknown name.
    """
    adapters = adapters_of(model, name)
    task = adapters.tasks[name]
    prefix = _prefix(model)
    tensors = {
        f"adapters.{site.removeprefix(prefix)}.{key}": t
        for site, layer in adapters.layers(name).items()
        for key, t in layer.state_dict().items()
    }
    active = adapters.active
    if active != name:
        set_active_adapter(model, name)  # so that the model's own paths lead to the task's parameters
    try:
        for path in (*task.modules, *task.norms):
            for key, t in _tensors(model, path).items():
                tensors[f"modules.{key.removeprefix(prefix)}"] = t
        tensors = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    finally:
        if active != name:
            set_active_adapter(model, active)
    header = {
        "format": FORMAT,
        "name": name,
        "base": _fingerprint(model, [slot.site for slot in adapters.all_slots()]),
        "modules": [path.removeprefix(prefix) for path in task.modules],
        "config": json.loads(task.config.to_json()),
    }
    text = json.dumps(header, indent=2)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = (folder / f".{file}.{uuid.uuid4().hex}" for file in (WEIGHTS, CONFIG))
    try:
        weights.write_bytes(save(tensors, metadata={"adapter_config": text}))  # save_file would make it mode 0600
        config.write_text(text + "\n", encoding="utf-8")
        for written, file in ((weights, WEIGHTS), (config, CONFIG)):
            with open(written, "rb") as f:
                os.fsync(f.fileno())
            os.replace(written, folder / file)
    finally:
        weights.unlink(missing_ok=True)
        config.unlink(missing_ok=True)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    modules: Iterable[str] | None = None,
    places: Any = None,
) -> str:
    """Adds a saved task to the model, makes it the active one and returns its name. `train_adapter` trains it on.

    Args:
        folder: what `save_adapter` wrote.
        name: of the task in this model; by default the one it was saved under.
        modules: which of the saved modules to take; by default all. `()` loads into a model without the head.
        places: as in `add_adapter`, for models of no known family.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a file that is not what `save_adapter` writes, another architecture, a missing or surplus key, a
            wrong shape, or a name that is taken. The model is then exactly as it was.
    """
    folder = Path(folder)
    header, tensors = _read(folder)
    name = header["name"] if name is None else name
    try:
        config = AdapterConfig.from_json(json.dumps(header["config"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if any(t.is_meta for t in model.parameters()):
        raise ValueError("the model is (in part) on the meta device, which holds no values: move it first")
    sites = plan(model, config, places)
    found, expected = _fingerprint(model, sites), header["base"]
    if found != expected:
        raise ValueError(f"{folder} was saved from a base with {expected}, this model has {found}")
    prefix = _prefix(model)
    kept = [path for path in header["modules"] if modules is None or path in set(modules)]
    dropped = tuple(f"modules.{path}." for path in header["modules"] if path not in kept)
    tensors = {key: t for key, t in tensors.items() if not key.startswith(dropped)}
    targets = [_target(model, prefix, path) for path in kept]
    with bare(model):  # the active task's head may be of another size than the base's
        _compare(folder, tensors, _shapes(model, config, sites, prefix, targets))
    before = adapters_of(model).active if hasattr(model, "adapter_ops") else None
    insert(model, name, config, targets, places)
    adapters = adapters_of(model)
    set_active_adapter(model, name)
    try:
        with torch.no_grad():
            for site, layer in adapters.layers(name).items():
                start = f"adapters.{site.removeprefix(prefix)}."
                layer.load_state_dict({k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)})
            for key, t in tensors.items():
                if key.startswith("modules."):
                    owner, _, leaf = _target(model, prefix, key.removeprefix("modules.")).rpartition(".")
                    getattr(model.get_submodule(owner), leaf).copy_(t)
    except BaseException:
        delete_adapter(model, name)
        if before is not None:
            set_active_adapter(model, before)
        raise
    return name


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the folder says about the task, and its tensors."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}")
    header = _parse((folder / CONFIG).read_bytes(), folder / CONFIG)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            written = (file.metadata() or {}).get("adapter_config")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or no safetensors file: {error}") from error
    if written is not None:  # a save takes effect with this file: until the other is renamed too, that is out of date
        header = _parse(written, folder / WEIGHTS)
    return header, tensors


def _parse(text: str | bytes, source: Path) -> dict[str, Any]:
    """What save_adapter wrote about a task."""
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} holds no JSON: {error}") from error
    types = {"format": int, "name": str, "base": dict, "modules": list, "config": dict}
    good = isinstance(header, dict) and all(isinstance(header.get(field), kind) for field, kind in types.items())
    if not (good and header["format"] == FORMAT and all(isinstance(path, str) for path in header["modules"])):
        raise ValueError(f"{source} is not of adapter_ops' format {FORMAT} with fields {sorted(types)}")
    return header


def _tensors(model: nn.Module, path: str) -> dict[str, Tensor]:
    """Parameters and buffers of a task's module by path in the model."""
    module = model.get_submodule(path)
    return {**dict(module.named_parameters(path)), **dict(module.named_buffers(path))}


def _prefix(model: nn.Module) -> str:
    """What a head in front of the base puts before every path of the base, such as "bert."."""
    base = getattr(model, "base_model_prefix", "")
    return f"{base}." if base and base in dict(model.named_children()) else ""


def _target(model: nn.Module, prefix: str, path: str) -> str:
    """A saved path in this model: below its base if it leads somewhere there, else as it is."""
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())}
    return prefix + path if prefix + path in names else path


def _fingerprint(model: nn.Module, sites: list[Site]) -> dict[str, Any]:
    """The base's architecture as far as adapters depend on it."""
    stacks = {site.name.removeprefix(_prefix(model)).rpartition(f".{site.layer}.")[0] for site in sites}
    return {
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "hidden_sizes": sorted({site.hidden_size for site in sites}),
        "layers": {stack: len({s.layer for s in sites if f"{stack}." in s.name}) for stack in sorted(stacks)},
    }


def _shapes(
    model: nn.Module, config: AdapterConfig, sites: list[Site], prefix: str, targets: list[str]
) -> dict[str, tuple[int, ...]]:
    """Every key the task has in this model, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        if config.at(site.place, site.layer):
            layer = AdapterLayer(config, site.layer, site.hidden_size, torch.device("meta"), torch.float32)
            start = f"adapters.{site.name.removeprefix(prefix)}."
            shapes |= {start + key: tuple(t.shape) for key, t in layer.state_dict().items()}
    modules, norms = belongings(model, config, targets)
    for path in (*modules, *norms):
        for key, t in _tensors(model, path).items():
            shapes[f"modules.{key.removeprefix(prefix)}"] = tuple(t.shape)
    return shapes


def _compare(folder: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    for what, keys in (("lacks", shapes.keys() - tensors.keys()), ("has unknown", tensors.keys() - shapes.keys())):
        if keys:
            some = ", ".join(sorted(keys)[:3])
            raise ValueError(f"{folder / WEIGHTS} {what} {len(keys)} of {len(shapes)} keys: {some}")
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(f"{folder / WEIGHTS}: {key} has shape {tuple(tensors[key].shape)}, the model {shape}")
