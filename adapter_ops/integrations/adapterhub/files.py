"""AdapterHub's folders: an adapter_config.json and the adapter's weights, and perhaps a head (see `heads.py`)."""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...models.adapters import LOCK, adapters_of, root_of
from ...models.building import attach, build, check_new, plan
from ...models.config import AdapterConfig
from ...models.disk import alive, host
from ...models.files import CONFIG_FILE as OUR_CONFIG_FILE
from ...models.files import kind_of
from ...models.hub import fetch
from ...models.sharding import full, one_writer, reshard
from ...models.sites import Site, find_sites
from ...models.strict_json import check, parse
from ...models.tasks import train_adapter
from . import heads
from .config import read_config, write_config
from .weights import check_tensor, read_tensors, tensors_as_bytes

CONFIG_FILE, WEIGHTS_FILE, SAFE_WEIGHTS_FILE = "adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors"
_FILES = (CONFIG_FILE, WEIGHTS_FILE, SAFE_WEIGHTS_FILE)
FORMAT = "adapters.1.3.0"  # the version of the package whose folders these are

# The fields of an adapter_config.json that are read here, as a pattern for `strict_json.check`.
_FIELDS = {"config": dict, "name": str, "model_type": str, "hidden_size": int}

# Where a family's keys put its adapters: inside the module around Site.output, or beside the layer's other modules.
_INSIDE = frozenset({"bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "t5"})
_BESIDE = frozenset({"distilbert", "gpt2", "llama", "mistral", "bart", "whisper"})

# What a folder of another kind holds, and what to do with it.
_OTHERS = {
    "adapter_ops": ("a task of adapter_ops", "load it with adapter_ops.load_adapter"),
    "adapter_ops_1": ("a task of adapter_ops in a format that was never released", "save the task again"),
    "peft": ("an adapter of the package peft", "load it with peft.PeftModel.from_pretrained"),
}
_ATTEMPTS = 20  # to read a folder that others save to at the same time
_HOUR = 60 * 60  # seconds; no save takes longer


def load_adapterhub(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    with_head: bool = True,
    revision: str | None = None,
) -> str:
    """Adds the adapter of a folder that AdapterHub wrote to a plain transformers model, as `add_adapter` does.

    The adapter is then active, and its parameters, of the model's dtype and on its device, are the only ones that
    train. If the folder has a head, the task gets its own copy of the model's head with the file's weights, as many
    outputs and the labels. That is so for a head of the model's own class, and for one of AdapterHub's flexible heads
    where the model's own head computes the same in eval mode (see `heads.CHAINS`). Others are an error.

    Args:
        model: of the family, and of the hidden size, that the adapter was trained for.
        folder: has adapter_config.json and adapter.safetensors or pytorch_adapter.bin. Each file is read once. A save
            to the folder that takes place meanwhile is seen whole or not at all. Or "user/name", a repository on the
            Hugging Face hub with these files, if nothing has that path here, as in `load_adapter`.
        name: for the adapter. Default: the name in the folder.
        with_head: whether the head in the folder is loaded too. Default: True.
        revision: of the repository on the hub: a branch, a tag or the hash of a commit. Default: the branch "main".

    Returns:
        The adapter's name.

    Raises:
        FileNotFoundError: no such folder, or one without those files; or as in `load_adapter`.
        ImportError: a repository on the hub, and the package huggingface_hub is not installed.
        ValueError: the folder of another library; a config with no counterpart (see `read_config`); another model type
            or hidden size; a file that cannot be read; keys that are missing, left over, of another shape or not of
            dtype float16, bfloat16, float32 or float64; a head that the model's own cannot compute; a name that is
            taken or malformed; a revision of a local folder. The model is then as it was.

    Warns:
        UserWarning: the folder has a head, and the model is a base without one; or labels that do not fit the head.
    """
    names = (*_FILES, OUR_CONFIG_FILE, *(heads.FILES if with_head else ()))
    folder = fetch(folder, names, revision)
    text, weights, data, head_text, head_weights, head_data = _read(folder, with_head)
    info = _fields(folder, text)
    root = root_of(model)
    for key in ("model_type", "hidden_size"):
        ours = getattr(getattr(root, "config", None), key, None)
        if info[key] != ours:
            raise ValueError(f"the adapter in {folder} is for {key} {info[key]!r}, the model has {ours!r}")
    if all(parameter.is_meta for parameter in root.parameters()):
        raise ValueError("the model is on the meta device, which holds no values: move it first")
    config = read_config(info["config"], versioned="version" in info)
    sites = _sites(root, config)
    keys = _keys(root, config, sites, info["name"])
    base = getattr(root, "base_model_prefix", "") + "."  # a model with a head has it, the bare base has not
    found = {key.removeprefix(base): t for key, t in read_tensors(weights, data).items()}
    expected = {key.removeprefix(base): where for key, where in keys.items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{weights} lacks {len(missing)} of {len(expected)} keys, first {missing[0]!r}")
    if surplus := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{weights} has {len(surplus)} keys that do not belong, first {surplus[0]!r}")
    shapes = {site.name: _shapes(config, site) for site in sites}
    states: dict[str, dict[str, Tensor]] = {}
    for key, (site, ours) in expected.items():
        check_tensor(f"{key!r} in {weights}", found[key], shapes[site][ours])
        states.setdefault(site, {})[ours] = found[key]
    head = None
    if head_text is not None or head_data is not None:
        head = heads.read(folder, root, sites, head_text, head_weights, head_data)
    name = info["name"] if name is None else name
    with LOCK:
        check_new(model, name)
        task = build(model, config, sites, () if head is None else head.modules)
        if head is not None:
            heads.fill(task, head, root)
        for site, layer in task.layer_at.items():
            layer.load_state_dict(states[site])
        attach(model, name, task, sites, None)  # before this the model is as it was
        train_adapter(model, name)
    return name


def save_adapterhub(model: nn.Module, folder: str | os.PathLike[str], name: str) -> None:
    """Writes an adapter as a folder that AdapterHub's `model.load_adapter(folder)` reads, all or nothing.

    The task's own head is written as that of the model's class, which AdapterHub loads into a model of this class with
    as many labels, and into its own classes with flexible heads. A BERT classifier with a pooler of the task's own,
    as `load_adapterhub` makes it of a flexible head, is written as a flexible head.

    The folder is written beside its place under a name that begins with "." and then renamed. If there is a folder
    already, it is first renamed in the same way; a process that is killed at just that moment leaves both, whole, under
    such names. The next save to the same place removes what killed saves have left. Of the processes that share a
    sharded model all have to call this, and the first one writes.

    Args:
        model: a transformers model of one of the families whose names in AdapterHub's folders are known.
        folder: where to. It is replaced if it is empty or holds an adapter of AdapterHub and nothing else.
        name: of the adapter in the model. In the folder, each "." in it is a "_", since AdapterHub allows none.

    Raises:
        ValueError: an unknown name, a model type whose keys are not known, a config that AdapterHub cannot express
            (see `write_config`), or parameters on the meta device.
        FileExistsError: the folder holds something else, such as an adapter of another library.
        OSError: the system cannot write, or another process saved to the same place at the same moment. What is there
            is then whole.

    Warns:
        UserWarning: the task has modules of its own that are part of the base. The folder cannot hold them.
    """
    adapters = adapters_of(model, name)
    task = adapters.task(name)
    root: Any = adapters.model
    sites = _sites(root, task.config)
    stored = name.replace(".", "_")
    keys = _keys(root, task.config, sites, stored)
    config = task.config
    if config.ln_before and not config.ln_after and all(site.norm is None for site in sites):
        # In a pre-norm model both residuals give the same outputs, and AdapterHub runs only this one.
        config = dataclasses.replace(config, residual="input")
    info = {
        "config": write_config(config, root.config.hidden_size),
        "hidden_size": root.config.hidden_size,
        "model_class": type(root).__name__,
        "model_name": getattr(root.config, "_name_or_path", ""),
        "model_type": root.config.model_type,
        "name": stored,
        "version": FORMAT,
    }
    reshard(root)
    states = {site: layer.state_dict() for site, layer in task.layer_at.items()}
    tensors = {key: full(states[site][ours]).detach() for key, (site, ours) in keys.items()}
    head, head_tensors, left = heads.write(root, task, sites, stored, FORMAT)
    head_tensors = {key: full(t.detach()) for key, t in head_tensors.items()}
    if meta := [key for key, t in (tensors | head_tensors).items() if t.is_meta]:
        raise ValueError(f"{len(meta)} of the adapter's tensors are on the meta device, which holds no values")
    if left:
        warnings.warn(
            f"AdapterHub's folder has no room for the task's own modules that are part of the base, or of a base "
            f"without a head: {left}. save_adapter keeps them",
            stacklevel=2,
        )
    folder = Path(folder).resolve()
    with one_writer(task) as writes:
        if writes:
            _check_replaceable(folder)
            contents = {CONFIG_FILE: _json(info), WEIGHTS_FILE: tensors_as_bytes(tensors)}
            if head:
                contents |= {heads.CONFIG_FILE: _json(head), heads.WEIGHTS_FILE: tensors_as_bytes(head_tensors)}
            _replace(folder, contents)


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def _sites(model: nn.Module, config: AdapterConfig) -> list[Site]:
    """The model's sites, which are those that AdapterHub has, checked to serve the config."""
    sites = find_sites(model)
    if plan(model, config) != sites:
        raise ValueError("the model has its adapters at sites of its own, which AdapterHub has no names for")
    return sites


def _keys(model: nn.Module, config: AdapterConfig, sites: list[Site], name: str) -> dict[str, tuple[str, str]]:
    """AdapterHub's key -> (the site's name, the key in its AdapterLayer's state dict)."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in _INSIDE | _BESIDE:
        known = ", ".join(sorted(_INSIDE | _BESIDE))
        raise ValueError(f"AdapterHub's names are not known for model type {kind!r}; known: {known}")
    sites = [site for site in sites if config.at(site.placement, site.layer)]
    if len({(site.layer, site.placement) for site in sites}) < len(sites):  # AdapterHub numbers both towers through
        for field in ("leave_out", "reduction_factor", "bottleneck"):
            if isinstance(value := getattr(config, field), Mapping) or (field == "leave_out" and value):
                raise ValueError(f"{field}={value!r} counts layers, which AdapterHub does otherwise for {kind!r}")
    before = config.norm is not None and config.norm_position == "before"
    modules = {f"adapter_down.{int(before)}": "bottlenecks.0.down", "adapter_up": "bottlenecks.0.up"}
    if config.norm is not None:  # in front of the bottleneck, AdapterHub has it under two names
        hubs = ("adapter_norm_before", "adapter_down.0") if before else ("adapter_norm_after",)
        modules |= dict.fromkeys(hubs, "norm")
    names = {f"{hub}.{leaf}": f"{ours}.{leaf}" for hub, ours in modules.items() for leaf in ("weight", "bias")}
    if isinstance(config.scale, str):
        names["scaling"] = "bottlenecks.0.scale"
    keys: dict[str, tuple[str, str]] = {}
    for site in sites:
        prefix = site.output.rpartition(".")[0]
        if kind in _BESIDE:
            prefix = site.name.rpartition(".")[0] + (".attention_adapters", ".output_adapters")[site.placement == "ffn"]
        keys |= {f"{prefix}.adapters.{name}.{hub}": (site.name, ours) for hub, ours in names.items()}
    return keys


def _shapes(config: AdapterConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """The shapes in an AdapterLayer's state dict. They are computed, since a hostile config has huge ones."""
    D, R = site.hidden_size, config.size(site.layer, site.hidden_size)
    return {
        "bottlenecks.0.down.weight": (R, D),
        "bottlenecks.0.down.bias": (R,),
        "bottlenecks.0.up.weight": (D, R),
        "bottlenecks.0.up.bias": (D,),
        "bottlenecks.0.scale": (D if config.scale == "channel" else 1,),
        "norm.weight": (D,),
        "norm.bias": (D,),
    }


class _Read(NamedTuple):
    """The contents of a folder's files, all of one save, and the paths of those with weights; None for no such file."""

    config: bytes
    weights: Path
    data: bytes
    head: bytes | None
    head_weights: Path
    head_data: bytes | None


def _read(folder: Path, with_head: bool) -> _Read:
    file = folder / CONFIG_FILE
    missing = 0
    for _ in range(_ATTEMPTS):
        try:
            before, text = os.stat(file), file.read_bytes()
            weights = _first(folder, SAFE_WEIGHTS_FILE, WEIGHTS_FILE)
            data = weights.read_bytes()
            head, head_weights = folder / heads.CONFIG_FILE, _first(folder, heads.SAFE_WEIGHTS_FILE, heads.WEIGHTS_FILE)
            head_text = head.read_bytes() if with_head and head.is_file() else None
            head_data = head_weights.read_bytes() if with_head and head_weights.is_file() else None
            after = os.stat(file)
        except FileNotFoundError as error:
            missing += 1
            if missing > 2:
                raise _not_here(folder) or error from None
            time.sleep(0.01)  # a save has no folder in its place for the moment between two renames
            continue
        if (before.st_ino, before.st_mtime_ns, before.st_size) == (after.st_ino, after.st_mtime_ns, after.st_size):
            return _Read(text, weights, data, head_text, head_weights, head_data)
    raise ValueError(f"{folder} changed {_ATTEMPTS} times while it was read: load it when no other process saves to it")


def _first(folder: Path, preferred: str, other: str) -> Path:
    return folder / (preferred if (folder / preferred).is_file() else other)


def _not_here(folder: Path) -> ValueError | None:
    """The error for a folder with an adapter of another kind."""
    if (kind := kind_of(folder)) not in _OTHERS:
        return None
    what, instead = _OTHERS[kind]
    return ValueError(f"{folder} holds {what} and no adapter of AdapterHub: {instead}")


def _fields(folder: Path, text: bytes) -> dict[str, Any]:
    """The fields of an adapter_config.json, of which those that are read here have the right types."""
    what = f"{folder / CONFIG_FILE} is no adapter's config"
    info: dict[str, Any] = parse(text, f"{what}: it")
    try:
        check(info, _FIELDS, CONFIG_FILE)
    except ValueError as error:
        wanted = ", ".join(f"{field} ({kind.__name__})" for field, kind in _FIELDS.items())
        raise _not_here(folder) or ValueError(f"{what}, which has the fields {wanted}: {error}") from error
    return info


def _check_replaceable(folder: Path) -> None:
    """Raises FileExistsError where a save would destroy anything but an adapter of AdapterHub."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    kind = kind_of(folder)
    others = [name for name in names if name not in (*_FILES, *heads.FILES)]
    if kind in _OTHERS:
        held = _OTHERS[kind][0]
    elif others:
        held = f"also {', '.join(others[:4])}"
    elif names and kind != "adapterhub":
        held = f"{', '.join(names)}, but no adapter of AdapterHub"
    else:
        return
    raise FileExistsError(f"{folder} holds {held}: save to a folder that does not exist yet")


def _replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Puts a folder with these files in the place of whatever is there; on an error, everything is as it was."""
    mark = f"{os.getpid()}.{host()}"
    new, old = (folder.with_name(f".{folder.name}.{mark}{secrets.token_hex(8)}.tmp") for _ in range(2))
    new.mkdir(parents=True)
    try:
        for name, content in files.items():
            with open(new / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
    _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed saves to this folder have left: those of dead processes of this host, and those an hour old.

    The process and the host stand in the name, since a process's number says nothing on another host.
    """
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.([1-9][0-9]{{0,9}})\.([0-9a-f]{{8}})[0-9a-f]{{16}}\.tmp")
    for path in folder.parent.iterdir():
        if found := pattern.fullmatch(path.name):
            dead = found[2] == host() and not alive(int(found[1]))
            with contextlib.suppress(OSError):  # another save removes it at the same time
                status = path.stat()  # a folder that was just renamed has a new st_ctime alone
                if dead or time.time() - max(status.st_mtime, status.st_ctime) > _HOUR:
                    shutil.rmtree(path, ignore_errors=True)
