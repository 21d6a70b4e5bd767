"""AdapterHub: its folders read and written, and (from adapterhub_live) its live modules made fast.

    load_adapterhub(model, "folder")            # a plain transformers model takes the adapter
    save_adapterhub(model, "folder", "cola")    # AdapterHub's `model.load_adapter("folder")` reads it
    accelerate(model)                           # a model of the package `adapters` runs its adapters fused

Only `accelerate` needs the package `adapters` (checked against 1.3.0).
"""

import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..config import AdapterConfig
from ..inject import adapters_of, add_adapter, plan
from ..kernels.activations import find_activation
from ..layers import AdapterLayer
from .adapterhub_live import Swap, accelerate
from .transformers import Site, find_sites

__all__ = ["Swap", "accelerate", "load_adapterhub", "read_config", "save_adapterhub", "write_config"]

CONFIG_FILE, WEIGHTS_FILE, SAFE_WEIGHTS_FILE = "adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors"
FORMAT = "adapters.1.3.0"  # the version of the package whose folders these are

# Where a family's keys put its adapters: inside the module around Site.output, or beside the layer's other modules.
_INSIDE = frozenset({"bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "t5"})
_BESIDE = frozenset({"distilbert", "gpt2", "llama", "mistral", "bart", "whisper"})

_REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
_DEFAULTS: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "ln_before": False,
    "ln_after": False,
    "adapter_residual_before_ln": False,
    "init_weights": "bert",
    "is_parallel": False,
    "scaling": 1.0,
    "dropout": 0.0,
    "leave_out": (),
    "stochastic_depth": 0.0,
}
# Fields that have to be off: each is a layer, or a wiring, that AdapterConfig has no word for.
_OFF: dict[str, Any] = {
    "architecture": None,
    "inv_adapter": None,
    "invertible_adapter": None,
    "use_gating": False,
    "cross_adapter": False,
    "phm_layer": False,
}
# Fields without effect once those are off and the weights come from a file; so are all with "phm" in their names.
_IDLE = frozenset({"init_weights_seed", "inv_adapter_reduction_factor", "hypercomplex_nonlinearity"})
_INIT = {"bert": "bert", "mam_adapter": "mam", "houlsby": "houlsby"}
# (original_ln_before, original_ln_after, residual_before_ln) of a sequential adapter -> AdapterConfig.residual.
# Not here: combinations that count the skip connection twice or drop it.
_RESIDUAL = {
    (False, True, True): "output",
    (False, True, False): "input",
    (True, True, True): "output",
    (True, False, False): "input",
    (True, False, "post_add"): "output",
}


def read_config(fields: Mapping[str, Any], *, versioned: bool = True) -> AdapterConfig:
    """The AdapterConfig that means what these fields of AdapterHub's BnConfig mean.

    Args:
        fields: what an adapter_config.json has under "config".
        versioned: whether that file has a "version". Before there was one, "gelu" meant tanh GELU.

    Raises:
        ValueError: a field, named with its value, that is unknown or has no counterpart.

    Warns where `stochastic_depth` is on: it acts in training only, and is left out.
    """
    f = {**_DEFAULTS, **_OFF, **fields}

    def refuse(name: str, why: str) -> NoReturn:
        raise ValueError(f"AdapterHub's {name}={f.get(name)!r} {why}")

    for name in _REQUIRED:
        if name not in f:
            refuse(name, "is missing")
    for name, value in f.items():
        if name not in {*_REQUIRED, *_DEFAULTS, *_OFF, *_IDLE} and "phm" not in name:
            refuse(name, "is not a field known here")
        if name in _OFF and value != _OFF[name]:
            refuse(name, "is not supported")
    activation = str(f["non_linearity"]).lower()
    if not versioned:
        activation = {"gelu": "gelu_tanh", "gelu_orig": "gelu"}.get(activation, activation)
    try:
        find_activation(activation)
    except ValueError as error:
        refuse("non_linearity", f"is not supported: {error}")
    if f["init_weights"] not in _INIT:
        refuse("init_weights", f"is not one of {list(_INIT)}")
    if f["scaling"] not in ("learned", "channel") and not isinstance(f["scaling"], (int, float)):
        refuse("scaling", "is not a number, 'learned' or 'channel'")
    residual: Any = "output"
    if f["is_parallel"]:
        for name, value in (("mh_adapter", False), ("output_adapter", True), ("original_ln_after", True)):
            if f[name] != value:
                refuse(name, "is not supported for an adapter with is_parallel=True")
    else:
        before, after = f["original_ln_before"], f["original_ln_after"]
        residual = _RESIDUAL.get((before, after, f["residual_before_ln"]))
        if residual is None:
            refuse(
                "residual_before_ln", f"is not supported with original_ln_before={before}, original_ln_after={after}"
            )
    if f["ln_after"] and (f["is_parallel"] or f["ln_before"] or not f["adapter_residual_before_ln"]):
        refuse("ln_after", "is supported only alone, in a sequential adapter, with adapter_residual_before_ln=True")
    if f["stochastic_depth"]:
        warnings.warn(
            f"AdapterHub's stochastic_depth={f['stochastic_depth']} is left out: it acts in training only", stacklevel=2
        )
    factor, scale = f["reduction_factor"], f["scaling"]
    return AdapterConfig(
        # AdapterHub's map may name every layer instead of a default, which then goes unused.
        reduction_factor={"default": 1, **factor} if isinstance(factor, Mapping) else factor,
        placement="parallel"
        if f["is_parallel"]
        else tuple(p for p, key in (("attention", "mh_adapter"), ("ffn", "output_adapter")) if f[key]),
        activation=activation,
        scale=scale if isinstance(scale, str) else float(scale),  # type: ignore[arg-type]
        init=_INIT[f["init_weights"]],  # type: ignore[arg-type]
        layer_norms="frozen",
        norm="layer" if f["ln_before"] or f["ln_after"] else None,
        norm_position="after" if f["ln_after"] else "before",
        dropout=f["dropout"],
        leave_out=tuple(f["leave_out"] or ()),
        ln_before=bool(f["original_ln_before"]) and not f["is_parallel"],
        ln_after=bool(f["original_ln_after"]),
        residual=residual,
    )


def write_config(config: AdapterConfig, hidden_size: int) -> dict[str, Any]:
    """The fields of AdapterHub's BnConfig for a config: what `read_config` reads. `init_std` has no field there.

    Raises ValueError that names a field, with its value, that AdapterHub cannot express.
    """
    parallel = config.placement == "parallel"
    wiring = {(a, b, ours): hub for (a, b, hub), ours in _RESIDUAL.items()}
    key = (config.ln_before, config.ln_after, config.residual)
    for name, supported in (
        ("layer_norms", config.layer_norms == "frozen"),
        ("depth", config.depth == 1),
        ("norm", config.norm != "batch"),
        ("norm_position", not (parallel and config.norm and config.norm_position == "after")),
        ("residual", parallel or key in wiring),
    ):
        if not supported:
            raise ValueError(
                f"AdapterHub cannot express {name}={getattr(config, name)!r} with placement={config.placement!r}, "
                f"ln_before={config.ln_before}, ln_after={config.ln_after}"
            )

    def factor(bottleneck: int) -> float:
        # AdapterHub divides and rounds down; where that is not exact, aim between two sizes.
        return hidden_size // bottleneck if hidden_size % bottleneck == 0 else hidden_size / (bottleneck + 0.5)

    sizes: Any = config.reduction_factor if config.bottleneck is None else config.bottleneck
    convert: Callable[[Any], float] = float if config.bottleneck is None else factor
    activation = {"gelu_tanh": "gelu_new", "identity": "linear"}.get(config.activation, config.activation)
    return {
        **_DEFAULTS,
        "mh_adapter": not parallel and "attention" in config.placement,
        "output_adapter": parallel or "ffn" in config.placement,
        "reduction_factor": {k: convert(s) for k, s in sizes.items()} if isinstance(sizes, Mapping) else convert(sizes),
        "non_linearity": activation,
        "original_ln_before": config.ln_before and not parallel,
        "original_ln_after": config.ln_after or parallel,
        "residual_before_ln": True if parallel else wiring[key],
        "ln_before": config.norm is not None and config.norm_position == "before",
        "ln_after": config.norm is not None and config.norm_position == "after",
        "adapter_residual_before_ln": config.norm is not None and config.norm_position == "after",
        "init_weights": next(hub for hub, ours in _INIT.items() if ours == config.init),
        "is_parallel": parallel,
        "scaling": config.scale if isinstance(config.scale, str) else float(config.scale),
        "dropout": config.dropout,
        "leave_out": list(config.leave_out),
    }


def load_adapterhub(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> str:
    """Adds the adapter of a folder that AdapterHub wrote to a plain transformers model, as `add_adapter` does.

    Args:
        model: of the family, and of the hidden size, that the adapter was trained for.
        folder: has adapter_config.json and adapter.safetensors or pytorch_adapter.bin.
        name: for the adapter, instead of the folder's.

    Returns:
        The adapter's name.

    Raises:
        FileNotFoundError: no such folder, or one without those files.
        ValueError: a config with no counterpart (see `read_config`); another model type or hidden size; a file that
            cannot be read; keys that are missing, left over or of another shape; a name that is taken or malformed.
            The model is then as it was.
    """
    folder = Path(folder)
    text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    try:
        info = json.loads(text)
        fields, stored = dict(info["config"]), str(info["name"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is no adapter's config: {error!r}") from error
    for key in ("model_type", "hidden_size"):
        if info.get(key) != (ours := getattr(model.config, key)):
            raise ValueError(f"the adapter in {folder} is for {key} {info.get(key)!r}, the model has {ours!r}")
    config = read_config(fields, versioned="version" in info)
    sites = _sites(model, config)
    keys = _keys(model, config, sites, stored)
    base = getattr(model, "base_model_prefix", "") + "."  # a model with a head has it, the bare base has not
    found = {key.removeprefix(base): t for key, t in _read_tensors(folder).items()}
    expected = {key.removeprefix(base): place for key, place in keys.items()}
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"the weights in {folder} lack {len(missing)} of {len(expected)} keys, first {missing[0]!r}")
    if surplus := sorted(found.keys() - expected.keys()):
        raise ValueError(f"the weights in {folder} have {len(surplus)} keys that do not belong, first {surplus[0]!r}")
    states: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        shapes = AdapterLayer(config, site.layer, site.hidden_size, torch.device("meta"), torch.float32).state_dict()
        for key, (place, ours) in expected.items():
            if place == site.name:
                if (shape := tuple(getattr(found[key], "shape", ()))) != shapes[ours].shape:
                    raise ValueError(f"{key!r} in {folder} has shape {shape}, expected {tuple(shapes[ours].shape)}")
                states.setdefault(place, {})[ours] = found[key]
    name = stored if name is None else name
    add_adapter(model, name, config, modules=())
    for place, layer in adapters_of(model).layers(name).items():
        layer.load_state_dict(states[place])
    return name


def save_adapterhub(model: nn.Module, folder: str | os.PathLike[str], name: str) -> None:
    """Writes an adapter as a folder that AdapterHub's `model.load_adapter(folder)` reads, all or nothing.

    A task's head is not part of such a folder; a warning says so where there is one. A folder that is there is replaced
    if it holds an adapter and nothing else.

    Raises:
        ValueError: an unknown name, a model type whose keys are not known, a config that AdapterHub cannot express
            (see `write_config`).
        FileExistsError: the folder holds other files too.
    """
    adapters = adapters_of(model, name)
    config = adapters.tasks[name].config
    sites = _sites(model, config)
    base: Any = model.config
    info = {
        "config": write_config(config, base.hidden_size),
        "hidden_size": base.hidden_size,
        "model_class": type(model).__name__,
        "model_name": getattr(base, "_name_or_path", ""),
        "model_type": base.model_type,
        "name": name,
        "version": FORMAT,
    }
    states = {place: layer.state_dict() for place, layer in adapters.layers(name).items()}
    keys = _keys(model, config, sites, name)
    tensors = {key: states[place][ours].detach().cpu().clone() for key, (place, ours) in keys.items()}
    folder = Path(folder).absolute()
    if folder.exists():
        files = {CONFIG_FILE, WEIGHTS_FILE, SAFE_WEIGHTS_FILE}
        if others := sorted({path.name for path in folder.iterdir()} - files):
            raise FileExistsError(f"{folder} also holds {', '.join(others[:4])}; save to a folder of its own")
    if own := [key.replace("/", ".") for key, _ in adapters.own_of(name).named_parameters()]:
        warnings.warn(
            f"AdapterHub's folder has no room for the task's parameters outside its adapters: {own}", stacklevel=2
        )
    new, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}") for _ in range(2))
    new.mkdir(parents=True)
    try:
        (new / CONFIG_FILE).write_text(json.dumps(info, indent=2, sort_keys=True), encoding="utf-8")
        torch.save(tensors, new / WEIGHTS_FILE)  # AdapterHub reads safetensors only where it is asked to
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _sites(model: nn.Module, config: AdapterConfig) -> list[Site]:
    """Where this config has adapters."""
    sites = find_sites(model)
    if plan(model, config) != sites:
        raise ValueError("the model has its adapters at places of its own, which AdapterHub has no names for")
    return [site for site in sites if config.at(site.place, site.layer)]


def _keys(model: nn.Module, config: AdapterConfig, sites: list[Site], name: str) -> dict[str, tuple[str, str]]:
    """AdapterHub's key -> (the site's name, the key in its AdapterLayer's state dict)."""
    kind = model.config.model_type  # type: ignore[union-attr]
    if kind not in _INSIDE | _BESIDE:
        known = ", ".join(sorted(_INSIDE | _BESIDE))
        raise ValueError(f"AdapterHub's names are not known for model type {kind!r}; known: {known}")
    if len({(site.layer, site.place) for site in sites}) < len(sites):  # AdapterHub numbers both towers through
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
            prefix = site.name.rpartition(".")[0] + (".attention_adapters", ".output_adapters")[site.place == "ffn"]
        keys |= {f"{prefix}.adapters.{name}.{hub}": (site.name, ours) for hub, ours in names.items()}
    return keys


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / SAFE_WEIGHTS_FILE
    try:
        if file.exists():
            from safetensors.torch import load_file

            tensors = load_file(file)
        else:
            file = folder / WEIGHTS_FILE
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        first = r"(attention|layer)_text_(task|lang)_adapters"  # the modules' name in AdapterHub's first releases
        return {re.sub(first, "adapters", key): t for key, t in tensors.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle and safetensors have errors of no common class
        raise ValueError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
