"""AdapterHub's BnConfig and our AdapterConfig, each written as the other."""

import reprlib
import sys
import warnings
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, NoReturn

from ...kernels.activations import find_activation
from ...models.config import AdapterConfig, Placement

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
_FLAGS = (
    "mh_adapter",
    "output_adapter",
    "original_ln_before",
    "original_ln_after",
    "ln_before",
    "ln_after",
    "adapter_residual_before_ln",
    "is_parallel",
)
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
_INIT: dict[str, Any] = {"bert": "bert", "mam_adapter": "mam", "houlsby": "houlsby"}
# (original_ln_before, original_ln_after, residual_before_ln) of a sequential adapter -> AdapterConfig.residual.
# The other combinations count the skip connection twice, drop it, or fail in AdapterHub.
_RESIDUAL = {
    (False, True, True): "output",
    (False, True, False): "input",
    (True, True, True): "output",
    (True, False, False): "input",
    (True, False, "post_add"): "output",
}
_SMALLEST_FACTOR = 1e-6  # R would be a million times the hidden size


def read_config(fields: Mapping[str, Any], *, versioned: bool = True) -> AdapterConfig:
    """The AdapterConfig that computes what these fields of AdapterHub's BnConfig compute, in every supported model.

    Args:
        fields: what an adapter_config.json has under "config".
        versioned: whether that file has a "version". Before there was one, "gelu" meant tanh GELU. Default: True.

    Raises:
        ValueError: a field, named with its value, that is missing, unknown, of another type or without a counterpart.

    Warns:
        UserWarning: `stochastic_depth` is on. It acts in training only, and is left out.
    """
    f = {**_DEFAULTS, **_OFF, **fields}

    def refuse(name: str, why: str) -> NoReturn:
        raise ValueError(f"AdapterHub's {name}={reprlib.repr(f.get(name))} {why}")

    for name in _REQUIRED:
        if name not in f:
            refuse(name, "is missing")
    for name, value in f.items():
        if name not in {*_REQUIRED, *_DEFAULTS, *_OFF, *_IDLE} and "phm" not in name:
            refuse(name, "is not a field known here")
        if name in _OFF and value != _OFF[name]:
            refuse(name, "is not supported: run this adapter with the package adapters")
    _check_types(f, refuse)
    activation = f["non_linearity"].lower()
    if not versioned:
        activation = {"gelu": "gelu_tanh", "gelu_orig": "gelu"}.get(activation, activation)
    try:
        find_activation(activation)
    except ValueError as error:
        refuse("non_linearity", f"is not supported: {error}")
    residual: Any = "output"
    if f["is_parallel"]:
        for name, supported in (("mh_adapter", False), ("output_adapter", True), ("original_ln_after", True)):
            if f[name] != supported:
                refuse(name, "is not supported for an adapter with is_parallel=True")
    else:
        if not (f["mh_adapter"] or f["output_adapter"]):
            refuse("output_adapter", "leaves no adapter, since mh_adapter is off too")
        before, after = f["original_ln_before"], f["original_ln_after"]
        residual = _RESIDUAL.get((before, after, f["residual_before_ln"]))
        if residual is None:
            refuse(
                "residual_before_ln", f"is not supported with original_ln_before={before}, original_ln_after={after}"
            )
    if f["ln_after"]:
        # With original_ln_before=True, AdapterHub and AdapterConfig do not agree on whether the layer's skip connection
        # is added before this norm or after it: in BERT if original_ln_after is on, in GPT-2 if it is off.
        for name in ("is_parallel", "ln_before", "original_ln_before"):
            if f[name]:
                refuse(name, "is not supported with ln_after=True: run this adapter with the package adapters")
        if not f["adapter_residual_before_ln"]:
            refuse("ln_after", "is supported only with adapter_residual_before_ln=True")
    if f["stochastic_depth"]:
        warnings.warn(
            f"AdapterHub's stochastic_depth={f['stochastic_depth']} is left out: it acts in training only", stacklevel=2
        )
    factor, scale = f["reduction_factor"], f["scaling"]
    flags: tuple[tuple[Placement, str], ...] = (("attention", "mh_adapter"), ("ffn", "output_adapter"))
    placement = tuple(name for name, flag in flags if f[flag])
    try:
        return AdapterConfig(
            # AdapterHub's map may name every layer instead of a default, which then goes unused.
            reduction_factor={"default": 1, **factor} if isinstance(factor, Mapping) else factor,
            placement="parallel" if f["is_parallel"] else placement,
            activation=activation,
            scale=scale if isinstance(scale, str) else float(scale),  # type: ignore[arg-type]
            init=_INIT[f["init_weights"]],
            layer_norms="frozen",
            norm="layer" if f["ln_before"] or f["ln_after"] else None,
            norm_position="after" if f["ln_after"] else "before",
            dropout=f["dropout"],
            leave_out=tuple(f["leave_out"] or ()),
            # A parallel adapter does not look at original_ln_before.
            ln_before=f["original_ln_before"] and not f["is_parallel"],
            ln_after=f["original_ln_after"],
            residual=residual,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"AdapterHub's config has a value that AdapterConfig does not take: {error}") from error


def _check_types(f: Mapping[str, Any], refuse: Callable[[str, str], NoReturn]) -> None:
    """Refuses values of another type than AdapterHub's field has, where AdapterConfig would not see it."""
    for name in _FLAGS:
        if not isinstance(f[name], bool):
            refuse(name, "is not true or false")
    if not (isinstance(f["residual_before_ln"], bool) or f["residual_before_ln"] == "post_add"):
        refuse("residual_before_ln", "is not true, false or 'post_add'")
    if not isinstance(f["non_linearity"], str):
        refuse("non_linearity", "is not the name of an activation")
    if not isinstance(f["init_weights"], str) or f["init_weights"] not in _INIT:
        refuse("init_weights", f"is not one of {list(_INIT)}")
    if f["scaling"] not in ("learned", "channel") and not _is_number(f["scaling"]):
        refuse("scaling", "is not a finite number, 'learned' or 'channel'")
    if not (f["stochastic_depth"] is None or _is_number(f["stochastic_depth"])):
        refuse("stochastic_depth", "is not a finite number")
    if not isinstance(f["leave_out"], (list, tuple, NoneType)):
        refuse("leave_out", "is not a list of numbers of layers")
    factor = f["reduction_factor"]
    factors = factor.values() if isinstance(factor, Mapping) else (factor,)
    if not all(_is_number(value) and value >= _SMALLEST_FACTOR for value in factors):
        refuse("reduction_factor", f"is not a finite number from {_SMALLEST_FACTOR}, nor a map to such numbers")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def write_config(config: AdapterConfig, hidden_size: int) -> dict[str, Any]:
    """The fields of AdapterHub's BnConfig that compute what a config computes: what `read_config` reads.

    `init_std`, which acts only when the adapter is made, is not written.

    Args:
        config: of the adapter.
        hidden_size: D, to turn a bottleneck into AdapterHub's `reduction_factor`.

    Raises:
        ValueError: a field, named with its value, that AdapterHub cannot express.
    """
    parallel = config.placement == "parallel"
    wiring = {(a, b, ours): hub for (a, b, hub), ours in _RESIDUAL.items()}
    key = (config.ln_before, config.ln_after, config.residual)
    norm_after = config.norm is not None and config.norm_position == "after"
    for name, supported, instead in (
        ("layer_norms", config.layer_norms == "frozen", "layer_norms='frozen'"),
        ("depth", config.depth == 1, "depth=1"),
        ("norm", config.norm != "batch", "norm='layer' or None"),
        # See the comment on ln_after in read_config.
        ("norm_position", not (norm_after and (parallel or config.ln_before)), "norm_position='before'"),
        ("residual", parallel or key in wiring, "residual='output'"),
    ):
        if not supported:
            raise ValueError(
                f"AdapterHub cannot express {name}={getattr(config, name)!r} with placement={config.placement!r}, "
                f"ln_before={config.ln_before}, ln_after={config.ln_after}: keep the adapter with "
                f"adapter_ops.save_adapter, or train one with {instead}"
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
        "original_ln_before": config.ln_before,
        "original_ln_after": config.ln_after,
        "residual_before_ln": True if parallel else wiring[key],
        "ln_before": config.norm is not None and not norm_after,
        "ln_after": norm_after,
        "adapter_residual_before_ln": norm_after,
        "init_weights": next(hub for hub, ours in _INIT.items() if ours == config.init),
        "is_parallel": parallel,
        "scaling": config.scale if isinstance(config.scale, str) else float(config.scale),
        "dropout": config.dropout,
        "leave_out": list(config.leave_out),
    }
