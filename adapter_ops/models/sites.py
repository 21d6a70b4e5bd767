"""The sites of a model: where its adapters stand, and what around them belongs to a task (heads, normalisations)."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from .config import PLACEMENTS, Placement
from .families import FAMILIES, SitePattern, Stack


class Site(NamedTuple):
    """Where one adapter stands in one layer of one model: full module paths, and the size of what passes there."""

    name: str
    layer: int
    placement: Placement
    output: str
    entry: str | None
    norm: str | None
    hidden_size: int


def find_sites(model: nn.Module, patterns: Mapping[str, str | SitePattern] | None = None) -> list[Site]:
    """The sites of a model, in the order of its modules.

    Args:
        model: of a family in FAMILIES, or any module if `patterns` are given.
        patterns: what is `sites` in `add_adapter`: "attention", "ffn" or both → a pattern of the output's module name,
            or a SitePattern. A pattern is the end of a module's path with `*` for the number of the layer:
            "blocks.*.attn.proj".

    Raises:
        ValueError: a model of no known family, or of one with a config that its entry does not cover, without
            `patterns`; a key other than these two; a pattern without `*`, with two, or that no module matches; a module
            that is never called or whose hidden size cannot be told.
    """
    if patterns is not None:
        if not patterns or not set(patterns) <= set(PLACEMENTS):
            raise ValueError(f"sites has keys {list(patterns)}, expected 'attention', 'ffn' or both")
        given = {name: patterns[name] for name in PLACEMENTS if name in patterns}
        full = {name: SitePattern(p) if isinstance(p, str) else p for name, p in given.items()}
        if wrong := [name for name, pattern in full.items() if not isinstance(pattern, SitePattern)]:
            raise ValueError(f"sites[{wrong[0]!r}] is {patterns[wrong[0]]!r}, expected a pattern or a SitePattern")
        sites = _match(model, full)
        for name in full.keys() - {site.placement for site in sites}:
            raise _unmatched(model, full[name].output)
        return sites
    found = find_models(model)
    if not found:
        family = getattr(getattr(model, "config", None), "model_type", None)
        raise ValueError(
            f"no sites known for model type {family!r}; known: {', '.join(FAMILIES)}; "
            "for any other model give sites=, patterns of module names"
        )
    sites = []
    for path, inner in found.items():
        start = f"{path}." if path else ""
        for stack in _stacks(inner):
            below = {placement: getattr(stack, placement) for placement in PLACEMENTS}
            full = {n: SitePattern._make(p and f"{stack.layers}.*.{p}" for p in paths) for n, paths in below.items()}
            sites += _match(model, full, start)
    if not sites:
        inner = next(iter(found.values()))
        raise _unmatched(inner, _stacks(inner)[0].layers + ".*")
    return sites


def _family(module: nn.Module) -> str:
    """The model type of a module's config if FAMILIES has it, else an empty string."""
    family = getattr(getattr(module, "config", None), "model_type", None)
    return family if isinstance(family, str) and family in FAMILIES else ""


def _stacks(model: nn.Module) -> list[Stack]:
    """The stacks of a model of a known family."""
    config: Any = model.config
    stacks = FAMILIES[_family(model)]
    if found := [stack for stack in stacks if stack.when is None or getattr(config, stack.when[0]) == stack.when[1]]:
        return found
    field, value = stacks[0].when  # type: ignore[misc]
    raise ValueError(
        f"no sites known for model type {config.model_type!r} with {field}={getattr(config, field)!r}, only with "
        f"{field}={value!r}; give sites=, patterns of module names"
    )


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What `named_modules` gives, without what this library has added: it would be most of it with many tasks."""
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            start = f"{path}." if path else ""
            children = [(start + n, child) for n, child in module.named_children() if n != "adapter_ops"]
            waiting += reversed(children)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What `named_parameters` gives, without what this library has added."""
    seen: set[int] = set()
    for path, module in base_modules(model):
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter


def find_models(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost models of a known family, by path: the model itself, or those that it wraps."""
    found: dict[str, nn.Module] = {}
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop(0)
        if _family(module) and not _shows_anothers_config(module):
            found[path] = module
        else:
            start = f"{path}." if path else ""
            waiting += [(start + n, child) for n, child in module.named_children() if n != "adapter_ops"]
    return found


def _shows_anothers_config(module: nn.Module) -> bool:
    """Whether a module is a wrapper around a model of a known family, and has that model's config as its own `config`.

    sentence_transformers has it, and so have many wrappers that people write.
    """
    for cls in type(module).__mro__:
        if cls.__module__.startswith("transformers.models.") and not cls.__name__.endswith("PreTrainedModel"):
            return False
    if getattr(module, "base_model_prefix", None) in module._modules:
        return False
    return any(_family(inner) for path, inner in base_modules(module) if path)


def _match(model: nn.Module, patterns: Mapping[Placement, SitePattern], start: str = "") -> list[Site]:
    """The sites at the modules that patterns match, of those whose path begins with `start`."""
    for path in (p for pattern in patterns.values() for p in pattern if p is not None):
        if path.count("*") != 1:
            raise ValueError(f"pattern {path!r} must hold one '*', for the number of the layer")
    paths = dict(base_modules(model))
    sites = []
    for path in paths:
        if not path.startswith(start):
            continue
        for name, pattern in patterns.items():
            before, after = map(re.escape, pattern.output.split("*"))
            if match := re.fullmatch(rf"((?:.*\.)?)({before})(\d+){after}", path):
                prefix, stack, layer = match.groups()
                there = SitePattern._make(p and prefix + p.replace("*", layer) for p in pattern)
                if missing := [p for p in there if p and p not in paths]:
                    raise _unmatched(model, missing[0])
                if isinstance(model.get_submodule(there.output.rpartition(".")[0]), nn.MultiheadAttention):
                    raise ValueError(
                        f"{there.output!r} is never called: nn.MultiheadAttention reads its weights itself"
                    )
                size = _hidden_size(model, there)
                sites.append(Site(f"{prefix}{stack}{layer}.{name}", int(layer), name, *there, size))
    return sites


def _unmatched(model: nn.Module, pattern: str) -> ValueError:
    names = [path for path, _ in model.named_modules() if path]
    near = difflib.get_close_matches(pattern, names, n=4, cutoff=0)
    return ValueError(f"no module of {type(model).__name__} matches {pattern!r}; it has: {', '.join(near)}")


def _hidden_size(model: nn.Module, paths: SitePattern) -> int:
    """D, from the site's own modules: a model may have towers of several sizes, so its config cannot tell."""
    for path in (paths.norm, paths.entry, paths.output):
        weight = getattr(model.get_submodule(path), "weight", None) if path else None
        if weight is not None and weight.dim() == 1:
            return weight.shape[0]
    module = model.get_submodule(paths.output)
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    # The skip connection wants as many channels out as in; where the two ends disagree, the order tells nothing.
    if linears and (linears[0] is module or linears[0].in_features == linears[-1].out_features):
        return linears[-1].out_features
    raise ValueError(
        f"cannot tell the hidden size at {paths.output!r}: give the sublayer's last nn.Linear as its output, or the "
        "normalisation next to it as entry (in front) or norm (behind)"
    )


def find_norms(model: nn.Module) -> list[str]:
    """Paths of the base's normalisations: LayerNorm and RMSNorm, by class name where a family has its own."""
    return [path for path, module in base_modules(model) if _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    by_name = type(module).__name__.endswith(("LayerNorm", "RMSNorm"))  # so end names of Wav2Vec2's encoders too
    return isinstance(module, nn.LayerNorm) or (by_name and not any(True for _ in module.children()))


def find_bodies(model: nn.Module, sites: list[Site]) -> list[str]:
    """Paths of the modules that are the base: what stands outside them is on top of it.

    In a model of a known family this is the child that transformers calls the base model; where a class with a head has
    none (of T5, Whisper and CLIP), and in a model of no known family, it is every child up to the last one with sites.
    """
    found = find_models(model)
    if not found:
        return _bodies_by_order(model, "", sites, deep=True)
    bodies = []
    for path, inner in found.items():
        start = f"{path}." if path else ""
        prefix = getattr(inner, "base_model_prefix", "")
        if prefix and prefix in dict(inner.named_children()):
            bodies.append(start + prefix)
        elif re.search(r"For[A-Z]|LMHead|DoubleHeads|With[A-Z]", type(inner).__name__):
            bodies += _bodies_by_order(inner, start, sites, deep=False)
        else:
            bodies.append(path)
    return bodies


def _bodies_by_order(module: nn.Module, start: str, sites: list[Site], *, deep: bool) -> list[str]:
    """The module's children in the order of their registration, up to the last one that holds sites.

    If `deep`, of that one only a part, in the same way, down to the list of layers.
    """
    names = [name for name, _ in module.named_children()]
    holders = [n for n in names if any(site.name.startswith(f"{start}{n}.") for site in sites)]
    if not holders:
        return [start.removesuffix(".")]
    last = start + holders[-1]
    bodies = [start + n for n in names[: names.index(holders[-1])]]
    is_layer = any(site.name.rpartition(".")[0] == last for site in sites)
    if not deep or is_layer or any(re.match(rf"{re.escape(last)}\.\d+\.", site.name) for site in sites):
        return [*bodies, last]
    return bodies + _bodies_by_order(module.get_submodule(holders[-1]), f"{last}.", sites, deep=True)


def find_heads(model: nn.Module, sites: list[Site] | None = None) -> list[str]:
    """Paths of the modules on top of the base, such as a classifier; none where the model is the bare base.

    A module that shares a parameter with the base, such as an lm_head tied to the embeddings, is no head: it could not
    be a task's without the base being so. Of a head with such a module inside, and of a list of heads, which is never
    called itself, the children are given. In a model of no known family a module that has layers of its own, such as
    a decoder, is no head, and neither is a normalisation.
    """
    bodies = find_bodies(model, find_sites(model) if sites is None else sites)
    shared = {id(p) for body in bodies for _, p in base_parameters(model.get_submodule(body))}
    known = bool(find_models(model))
    return [path for path in _outside(model, "", bodies, shared) if known or _may_be_head(model.get_submodule(path))]


def _may_be_head(module: nn.Module) -> bool:
    return not _is_norm(module) and not any(isinstance(m, nn.ModuleList) for m in module.modules())


def _outside(module: nn.Module, path: str, bodies: list[str], shared: set[int]) -> list[str]:
    """Paths, from this one down, of the largest callable modules outside the base that share no parameter with it."""
    if path in bodies or path.rpartition(".")[2] == "adapter_ops":
        return []
    parameters = {id(p) for _, p in base_parameters(module)}
    start = f"{path}." if path else ""
    callable_itself = type(module).forward is not nn.Module.forward
    if path and callable_itself and not parameters & shared and not any(b.startswith(start) for b in bodies):
        return [path] if parameters else []
    return [p for n, child in module.named_children() for p in _outside(child, start + n, bodies, shared)]


def find_frozen(model: nn.Module, sites: list[Site], heads: Iterable[str]) -> list[str]:
    """Names of parameters outside the base that are neither in a head nor in a normalisation nor shared with the base:
    they stay frozen."""
    bodies = find_bodies(model, sites)
    base = {id(p) for body in bodies for _, p in base_parameters(model.get_submodule(body))}
    inside = tuple(f"{path}." for path in (*heads, *find_norms(model)))
    return [
        name for name, parameter in base_parameters(model) if id(parameter) not in base and not name.startswith(inside)
    ]
