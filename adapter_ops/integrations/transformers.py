"""Where each model family of Hugging Face transformers takes its adapters. One table; nothing here imports it.

A sublayer (attention or feed-forward) turns its input r into h, and the model goes on with h + r. Post-norm families
normalise that sum, pre-norm families normalise r on its way in.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class Place(NamedTuple):
    """One sublayer, by module paths below its layer."""

    output: str  # the module whose output is h
    entry: str  # the module whose first argument is r
    norm: str | None = None  # the normalisation of h + r; None in pre-norm families


@dataclass(frozen=True)
class Stack:
    """A list of equal layers, `layers` being the end of its path in the model."""

    layers: str
    attention: Place
    ffn: Place


_BERT = Stack(
    "encoder.layer",
    Place("attention.output.dropout", "attention.self", "attention.output.LayerNorm"),
    Place("output.dropout", "intermediate", "output.LayerNorm"),
)

# config.model_type -> its stacks of layers
FAMILIES: dict[str, tuple[Stack, ...]] = {
    "bert": (_BERT,),
    "roberta": (_BERT,),
    "xlm-roberta": (_BERT,),
    "camembert": (_BERT,),
    "electra": (_BERT,),
}


class Site(NamedTuple):
    """One place in one layer of one model: full module paths, and the size of what passes there."""

    name: str
    layer: int
    place: str  # "attention" or "ffn"
    output: str
    entry: str
    norm: str | None
    hidden_size: int


def find_sites(model: nn.Module) -> list[Site]:
    """Every place of the model that can take an adapter, in order of the layers.

    Raises ValueError, with the known families, for a model that is not of one of them.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FAMILIES:
        raise ValueError(f"no places known for model type {family!r}; known: {', '.join(FAMILIES)}")
    sites = []
    for stack in FAMILIES[family]:
        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and f".{path}".endswith(f".{stack.layers}"):
                for i in range(len(module)):
                    for name, place in (("attention", stack.attention), ("ffn", stack.ffn)):
                        paths = [None if p is None else f"{path}.{i}.{p}" for p in place]
                        size = _hidden_size(model, paths)
                        sites.append(Site(f"{path}.{i}.{name}", i, name, *paths, size))  # type: ignore[arg-type]
    return sites


def _hidden_size(model: nn.Module, paths: list[str | None]) -> int:
    """From the normalisation of the place if it has one, else from the config."""
    if paths[2] is not None:
        return model.get_submodule(paths[2]).weight.shape[0]  # type: ignore[union-attr,operator,index,return-value]
    return model.config.hidden_size  # type: ignore[union-attr,return-value]


def find_norms(model: nn.Module) -> list[str]:
    """Paths of the base's normalisations: LayerNorm and the RMSNorm classes of the families."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("RMSNorm")]


def find_heads(model: nn.Module) -> list[str]:
    """Paths of the modules on top of the base, such as a classifier; none where the model is the bare base."""
    base = getattr(model, "base_model_prefix", "")
    if not base or not hasattr(model, base):
        return []
    return [n for n, m in model.named_children() if n != base and any(True for _ in m.parameters())]
