"""AdapterConfig: what an adapter is and where it goes; the paper's and AdapterHub's presets."""

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ..kernels.activations import find_activation
from . import files, hub
from .disk import replace_files
from .strict_json import parse

Placement = Literal["attention", "ffn"]
Preset = Literal["houlsby", "pfeiffer", "parallel", "adapter_plus"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


class Wiring(NamedTuple):
    """What an adapter reads, and what it adds its result to, in words for tensors: "output" is h, the output of the
    sublayer; "input" is r, its input; "sum" is h + r; "norm" is what the normalisation behind it makes of h + r."""

    reads: Literal["output", "input", "sum", "norm"]
    adds_to: Literal["output", "sum", "norm"]


# The wiring by (whether placement is "parallel", ln_before, residual): where a normalisation of h + r follows the
# sublayer, and where none does. An adapter that is parallel has no ln_before.
_WIRINGS = {
    (False, False, "output"): (Wiring("output", "output"), Wiring("output", "output")),
    (False, False, "input"): (Wiring("output", "output"), Wiring("output", "output")),
    (False, True, "output"): (Wiring("norm", "sum"), Wiring("sum", "output")),
    (False, True, "input"): (Wiring("norm", "norm"), Wiring("sum", "sum")),
    (True, False, "output"): (Wiring("input", "output"), Wiring("input", "output")),
    (True, False, "input"): (Wiring("input", "output"), Wiring("input", "output")),
}
CONFIG_FILE = "adapter_ops_config.json"  # of `save_pretrained`; AdapterHub and PEFT have one without "ops_"
_LARGEST, _DEEPEST = 1 << 20, 64  # what is over these is a mistake, or a file that would fill the memory


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter for every layer of a model (Houlsby et al. 2019, §2.1), as plain data.

    The defaults are the paper's: a bottleneck of 64 after the attention projection and after the feed-forward layer,
    erf GELU, truncated normal with σ = 1e-2, LayerNorms trained with the task.

    Args:
        bottleneck: R, at least 1, or a map from numbers of layers to R with a "default". Give this or
            `reduction_factor`.
        reduction_factor: R = max(1, int(hidden size / factor)), or a map as above.
        placement: ("attention", "ffn"), either alone, or "parallel": beside the feed-forward layer, fed with its input.
        activation: see `bottleneck_adapter`.
        scale: a number, "learned" (one value) or "channel" (one per channel).
        init: "houlsby" (truncated normal of `init_std`, zero biases), "bert" (normal, σ = 0.02, zero biases) or "mam"
            (Kaiming-uniform down, zero up).
        init_std: for "houlsby".
        layer_norms: "train" (the task has its own copy of the base's normalisations, as in the paper) or "frozen".
        norm: a normalisation inside the adapter, "layer" or "batch", or None.
        norm_position: "before" (of the bottleneck's input; the residual stays as it is) or "after" (of the sum).
        depth: bottlenecks in a row.
        dropout: probability, on what the adapter adds to its residual.
        leave_out: numbers of layers without adapters.
        ln_before: the adapter reads what the layer's own LayerNorm makes of its input (AdapterHub's
            `original_ln_before`); where no LayerNorm follows the sublayer, the sum with the skip connection.
        ln_after: the layer's LayerNorm runs after the adapter (AdapterHub's `original_ln_after`). With "parallel" this
            field and `ln_before` keep their defaults.
        residual: what the adapter adds to: "output" of the sublayer, or its own "input".

    Raises:
        ValueError: a field that is out of range or unknown, or both or neither of the two sizes.

    >>> AdapterConfig(bottleneck=8).size(layer=0, hidden_size=768)
    8
    """

    bottleneck: int | Mapping[str, int] | None = None
    reduction_factor: float | Mapping[str, float] | None = None
    placement: tuple[Placement, ...] | Literal["parallel"] = PLACEMENTS
    activation: str = "gelu"
    scale: float | Literal["learned", "channel"] = 1.0
    init: Literal["houlsby", "bert", "mam"] = "houlsby"
    init_std: float = 1e-2
    layer_norms: Literal["train", "frozen"] = "train"
    norm: Literal["layer", "batch"] | None = None
    norm_position: Literal["before", "after"] = "before"
    depth: int = 1
    dropout: float = 0.0
    leave_out: tuple[int, ...] = ()
    ln_before: bool = False
    ln_after: bool = True
    residual: Literal["output", "input"] = "output"

    def __post_init__(self) -> None:
        if self.bottleneck is None and self.reduction_factor is None:
            object.__setattr__(self, "bottleneck", 64)
        if self.bottleneck is not None and self.reduction_factor is not None:
            raise ValueError(
                f"bottleneck {self.bottleneck} and reduction_factor {self.reduction_factor}: give one of the two"
            )
        self._check_sizes("bottleneck", whole=True)
        self._check_sizes("reduction_factor", whole=False)
        for name in ("scale", "init_std", "dropout"):
            value = getattr(self, name)
            if isinstance(value, numbers.Real):  # of numpy, perhaps, which JSON and the kernels do not take
                if not _is_number(value):
                    raise ValueError(f"{name} is {value}, expected a finite number")
                object.__setattr__(self, name, float(value))
            elif name != "scale":
                raise ValueError(f"{name} is {value!r}, expected a finite number")
        if self.placement != "parallel":
            placement = self._as_tuple("placement", str)
            if not placement or not set(placement) <= set(PLACEMENTS):
                raise ValueError(f"placement is {self.placement!r}, known: some of {PLACEMENTS}, or 'parallel'")
        self._as_tuple("leave_out", int)
        if not isinstance(self.activation, str):
            raise ValueError(f"activation is {self.activation!r}, expected a name")
        find_activation(self.activation)
        if not isinstance(self.scale, float):
            self._known("scale", "learned", "channel")
        self._known("init", "houlsby", "bert", "mam")
        self._known("layer_norms", "train", "frozen")
        self._known("norm", None, "layer", "batch")
        self._known("norm_position", "before", "after")
        self._known("residual", "output", "input")
        if type(self.depth) is not int or not 1 <= self.depth <= _DEEPEST:
            raise ValueError(f"depth is {self.depth}, must be a whole number from 1 to {_DEEPEST}")
        for name in ("ln_before", "ln_after"):
            self._known(name, True, False)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, must be in [0, 1)")
        if not (self.ln_after or self.ln_before):
            raise ValueError("ln_after=False without ln_before=True would leave the layer without its LayerNorm")
        if not self.init_std > 0:
            raise ValueError(f"init_std is {self.init_std}, must be positive")
        if self.placement == "parallel" and (self.ln_before or not self.ln_after):
            raise ValueError(
                f"placement='parallel' with ln_before={self.ln_before}, ln_after={self.ln_after}: an adapter beside "
                "the feed-forward layer reads that layer's input, so no LayerNorm stands before it, and the layer's "
                "own comes after it. Leave both fields at their defaults"
            )

    def _check_sizes(self, name: str, whole: bool) -> None:
        """Checks a size or a map of sizes, and gives a map strings as keys, since JSON knows no numbers there."""
        value = getattr(self, name)
        if value is None:
            return
        sizes = value if isinstance(value, Mapping) else {"default": value}
        kind: Any = numbers.Integral if whole else numbers.Real
        what = "whole numbers from 1" if whole else "numbers over 0"
        for key, size in sizes.items():
            if key != "default" and not str(key).isdigit():
                raise ValueError(f"{name} has the key {key!r}, expected numbers of layers and 'default'")
            if not (isinstance(size, kind) and _is_number(size) and 0 < size <= _LARGEST):
                raise ValueError(f"{name} is {value!r}, expected {what} up to {_LARGEST}")
        if "default" not in sizes:
            raise ValueError(f"{name} {dict(sizes)} has no entry 'default'")
        convert = int if whole else float
        plain = {str(key): convert(size) for key, size in sizes.items()}
        object.__setattr__(self, name, plain if isinstance(value, Mapping) else plain["default"])

    def _as_tuple(self, name: str, kind: type) -> tuple[Any, ...]:
        """Makes a tuple of a field, since JSON has lists only."""
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)) or not all(type(item) is kind for item in value):
            what = "names of placements" if kind is str else "numbers of layers"
            raise ValueError(f"{name} is {value!r}, expected a tuple of {what}")
        object.__setattr__(self, name, tuple(value))
        return tuple(value)

    def _known(self, name: str, *known: Any) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"{name} is {getattr(self, name)!r}, known: {', '.join(map(repr, known))}")

    def size(self, layer: int, hidden_size: int) -> int:
        """The bottleneck of a layer."""
        if self.bottleneck is not None:
            return int(_of_layer(self.bottleneck, layer))
        quotient = hidden_size // _of_layer(self.reduction_factor, layer)
        if not quotient <= _LARGEST:
            raise ValueError(
                f"hidden size {hidden_size} over reduction_factor {self.reduction_factor} is {quotient}, the limit is "
                f"{_LARGEST}"
            )
        return max(1, int(quotient))

    def at(self, placement: Placement, layer: int) -> bool:
        """Whether a layer has an adapter at a placement."""
        own = ("ffn",) if self.placement == "parallel" else self.placement
        return placement in own and layer not in self.leave_out

    def wiring(self, has_norm: bool) -> Wiring:
        """What an adapter of this config reads at a site, and what it adds to. `has_norm`: whether a normalisation of
        h + r follows the sublayer."""
        wiring = _WIRINGS[self.placement == "parallel", self.ln_before, self.residual][not has_norm]
        # Where no normalisation follows, the model itself adds r to what the adapter returns. With ln_after=False that
        # is to be the only r in the sum, so the adapter adds to h.
        return Wiring("sum", "output") if wiring == ("sum", "sum") and not self.ln_after else wiring

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the config alone into a folder, as adapter_ops_config.json. A folder that does not exist is made.

        A saved task has its config in its own files, so `save_adapter` needs no such file.

        Raises OSError where the system cannot write; the old file stays whole.
        """
        replace_files(Path(folder), {CONFIG_FILE: f"{self.to_json()}\n".encode()})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, revision: str | None = None) -> "AdapterConfig":
        """The config that `save_pretrained` wrote into a folder, or that of the task that `save_adapter` wrote there.

        Args:
            folder: has adapter_ops_config.json or adapter_ops.safetensors. With both, the first is read. Or a
                repository "user/name" on the Hugging Face hub, as in `load_adapter`.
            revision: of that repository: a branch, a tag or the hash of a commit.

        Raises:
            FileNotFoundError: the folder or the repository has neither, or cannot be reached.
            ValueError: a file that cannot be read, or a field that is unknown or out of range.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     AdapterConfig(bottleneck=8).save_pretrained(folder)
        ...     AdapterConfig.from_pretrained(folder).bottleneck
        8
        """
        local = hub.fetch(folder, (CONFIG_FILE, files.WEIGHTS_FILE), revision)
        path = local / CONFIG_FILE
        if path.is_file():
            fields = parse(path.read_bytes(), str(path))
        else:
            try:
                fields = files.read_header(local)["config"]
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error} or {CONFIG_FILE}") from None
        try:
            return cls.from_json(json.dumps(fields))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> "AdapterConfig":
        """The config that `to_json` wrote. Raises ValueError that names any field it does not know."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object with the fields of a config, got {type(fields).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown fields {unknown}; known: {sorted(known)}")
        return cls(**fields)


def _is_number(value: Any) -> bool:
    """Whether a number is finite, and no bool, which Python counts among the whole numbers."""
    try:
        return not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number over the largest float
        return False


def _of_layer(value: Any, layer: int) -> Any:
    return value.get(str(layer), value["default"]) if isinstance(value, Mapping) else value


# The paper's adapter, and AdapterHub's configs of the same names (seq_bn, par_bn and adapter_plus in its newer ones).
PRESETS: dict[Preset, AdapterConfig] = {
    "houlsby": AdapterConfig(bottleneck=64),
    "pfeiffer": AdapterConfig(
        reduction_factor=16,
        placement=("ffn",),
        activation="relu",
        init="bert",
        layer_norms="frozen",
        ln_before=True,
    ),
    "parallel": AdapterConfig(
        reduction_factor=2, placement="parallel", activation="relu", scale=4.0, init="mam", layer_norms="frozen"
    ),
    "adapter_plus": AdapterConfig(
        reduction_factor=96,
        placement=("ffn",),
        scale="channel",
        layer_norms="frozen",
        ln_before=True,
        ln_after=False,
        residual="input",
    ),
}
