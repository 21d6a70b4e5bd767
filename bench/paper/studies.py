"""The paper's studies as data: what each compares, with which settings and learning rates."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adapter_ops import AdapterConfig, add_adapter
from adapter_ops.models.sites import find_norms, find_sites

if TYPE_CHECKING:
    from .finetune import Classifier

# Searched on validation with the first seed, as many for each. The paper's (§3.2) are 3e-5, 3e-4 and 3e-3 for all.
RATES = {
    "full": (3e-5, 1e-4, 3e-4, 1e-3),
    "top": (1e-4, 3e-4, 1e-3, 3e-3),
    "head": (1e-3, 3e-3, 1e-2, 3e-2),
    "norms": (1e-3, 3e-3, 1e-2, 3e-2),
    "adapters": (3e-4, 1e-3, 3e-3, 1e-2),
}


@dataclass(frozen=True)
class Variant:
    """One way to adapt the model. `rate_of`: the variant whose learning rate it takes, searched for if it is its own.

    `setting`: of "adapters", the fields of AdapterConfig; of "top", the number of layers.
    """

    label: str
    method: str
    setting: dict[str, Any] = field(default_factory=dict)
    rate_of: "Variant | None" = None

    @property
    def searched(self) -> "Variant":
        return self.rate_of or self

    @property
    def text(self) -> str:
        """The setting as the CSV has it."""
        values = {k: "+".join(v) if isinstance(v, list) else v for k, v in self.setting.items()}
        return " ".join(f"{k}={v}" for k, v in values.items())


def adapters(label: str, rate_of: Variant | None = None, **setting: Any) -> Variant:
    return Variant(label, "adapters", {"bottleneck": 64} | setting, rate_of)


FULL, HEAD, NORMS = (
    Variant("full fine-tuning", "full"),
    Variant("head only", "head"),
    Variant("LayerNorms only", "norms"),
)
SIZES = {m: adapters(f"adapters, m = {m}", bottleneck=m) for m in (8, 64, 256)}  # the paper's, each with its own search


def of_size(m: int) -> Variant:
    """Adapters with a bottleneck of m, at the rate of the largest of SIZES that is no larger, or of the smallest."""
    near = SIZES[max((s for s in SIZES if s <= m), default=min(SIZES))]
    return SIZES[m] if m in SIZES else adapters(f"adapters, m = {m}", near, bottleneck=m)


def tradeoff(layers: int) -> list[Variant]:
    """Bottlenecks from 2 to 256; the top 1, 2, 4, … layers; LayerNorms (paper §3.4, §3.5)."""
    few = sorted({min(2**i, layers) for i in range(layers.bit_length() + 1)})
    top = [Variant(f"top {k} layers" if k > 1 else "top layer", "top", {"layers": k}) for k in few]
    return [*(of_size(2**i) for i in range(1, 9)), HEAD, *top, FULL, NORMS]


def init() -> list[Variant]:
    """Standard deviations from 1e-7 to 1; 1e-2 is the default (paper §3.6)."""
    default = replace(SIZES[64], label="σ = 1e-2", rate_of=SIZES[64])
    return [adapters(f"σ = 1e{e}", SIZES[64], init_std=10.0**e) if e != -2 else default for e in range(-7, 1)]


def variants() -> list[Variant]:
    """What the paper tried without gain (§3.6), and what others use."""
    settings: dict[str, dict[str, Any]] = {
        "LayerNorm inside": {"norm": "layer"},
        "BatchNorm inside": {"norm": "batch"},
        "depth 2": {"depth": 2},
        "tanh": {"activation": "tanh"},
        "ReLU": {"activation": "relu"},
        "swish": {"activation": "silu"},
        "attention only": {"placement": ["attention"]},
        "ffn only": {"placement": ["ffn"]},
        "parallel": {"placement": "parallel"},
    }
    return [SIZES[64], *(adapters(label, SIZES[64], **setting) for label, setting in settings.items())]


STUDIES = ("glue", "tradeoff", "ablation", "init", "variants")


def study(name: str, layers: int) -> list[Variant]:
    """The variants of one of STUDIES, for a model of so many layers."""
    return {
        "glue": lambda: [FULL, HEAD, *SIZES.values()],
        "tradeoff": lambda: tradeoff(layers),
        "ablation": lambda: [SIZES[64]],
        "init": init,
        "variants": variants,
    }[name]()


def prepare(model: "Classifier", method: str, setting: dict[str, Any]) -> None:
    """Makes trainable what the method trains, and nothing else; the head always."""
    if method == "adapters":
        add_adapter(model, "task", AdapterConfig(**setting))
        return
    encoder = model.encoder
    norms = [encoder.get_submodule(path) for path in find_norms(encoder)]
    trained: list[nn.Module] = {"full": [encoder], "head": [], "norms": norms, "top": []}[method]
    if method == "top":
        trained = stack(model)[-setting["layers"] :]
    model.requires_grad_(False)
    for module in (*trained, model.classifier):
        module.requires_grad_(True)
    if isinstance(pooler := getattr(encoder, "pooler", None), nn.Module):
        pooler.requires_grad_(False)  # the mean of the tokens is read, not its output


def stack(model: nn.Module) -> list[nn.Module]:
    """The model's layers, first to last. Raises ValueError for a family without a table of places."""
    return [model.get_submodule(path) for path in dict.fromkeys(s.name.rpartition(".")[0] for s in find_sites(model))]


def has_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 by itself, not in software."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
