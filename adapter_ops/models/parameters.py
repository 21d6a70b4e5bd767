"""A task's own parameters: its adapters, and its copies of LayerNorms and heads of the base."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..functional import DTYPES
from ..wrappers import loaded, runs_on
from .config import AdapterConfig
from .hooks import Bound, Slot
from .layers import AdapterLayer
from .sharding import check_shardable, unshard_copies
from .sites import Site

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def key_of(path: str) -> str:
    """A path or a task's name as the name of one module. It is part of a state dict's keys, and of file names where
    weights are offloaded to a disk."""
    return path.replace(".", "+")


class Labels(NamedTuple):
    """What the classes of a task's head mean, as in a transformers config."""

    num_labels: int
    id2label: dict[int, str] | None
    problem_type: str | None


class Task(nn.Module):
    """One task: everything that trains with it, and how it was added.

    `layer_at` and `copy_at` hold the same modules as its children, by name of the site and by path in the base.
    """

    def __init__(
        self,
        config: AdapterConfig,
        heads: tuple[str, ...],
        norms: tuple[str, ...],
        layers: dict[str, AdapterLayer],
        copies: dict[str, nn.Module],
        labels: Labels | None,
    ) -> None:
        super().__init__()
        self._trained = False  # whether `requires_grad_(True)` was called since it was frozen
        self.config = config
        self.heads = heads  # paths of the modules, such as a classifier, that the task has its own of
        self.norms = norms  # paths of the base's normalisations that it has copies of
        self.labels = labels
        self.layer_at = layers
        self.copy_at = copies
        self.reads_input = any(layer.reads_input for layer in layers.values())
        self.adapters = nn.ModuleDict({key_of(name): layer for name, layer in layers.items()})
        # No ModuleDicts, whose methods have names, such as `values`, that a head may have too. Whoever leaves
        # normalisations out of weight decay by their names finds the copies of all by that of `layernorms`.
        self.copies, self.layernorms = nn.Module(), nn.Module()
        for path, module in copies.items():
            (self.layernorms if path in norms else self.copies).add_module(key_of(path), module)
        self._holders = [module._parameters for module in self.modules() if module._parameters]

    def replace_head(self, path: str, module: nn.Module) -> None:
        self.copy_at[path] = module
        self.copies.add_module(key_of(path), module)
        self._holders = [module._parameters for module in self.modules() if module._parameters]

    def requires_grad_(self, requires_grad: bool = True) -> "Task":
        self._trained = requires_grad
        return super().requires_grad_(requires_grad)

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """What `parameters()` gives, without a walk over the modules."""
        return (p for parameters in self._holders for p in parameters.values() if p is not None)

    def freeze(self) -> None:
        """What `requires_grad_(False)` does, without a walk over the modules.

        With hundreds of tasks in a model, asking every parameter would be most of what it takes to load one more. So a
        task that was not trained is asked for its first and its last parameter alone, which tell whether all were made
        trainable (`model.requires_grad_(True)`).
        """
        ends = [next(iter(self._holders[i].values())) for i in (0, -1)] if self._holders else []
        if not self._trained and not any(p is not None and p.requires_grad for p in ends):
            return
        self._trained = False
        for parameters in self._holders:
            for parameter in parameters.values():
                if parameter is not None and parameter.requires_grad:
                    parameter.requires_grad_(False)


def copy_modules(model: nn.Module, paths: Iterable[str], ours: Iterable[Any]) -> dict[str, nn.Module]:
    """Copies of the base's modules at these paths, which run in their place. What they share stays shared.

    `ours` are the objects that this library has put on the base; the copies do without them, and without the hooks on
    the module itself, which run around the copy, unless these compute its weights. The hooks of its parts are shared.

    Raises:
        ValueError: a module that cannot be copied, or whose parameters cannot be trained; before anything changed.
    """
    paths = list(paths)
    check_shardable(model, paths)
    memo: dict[int, Any] = {id(thing): thing for thing in ours}
    copies: dict[str, nn.Module] = {}
    for path in paths:
        module = model.get_submodule(path)
        parts = list(module.modules())
        # accelerate's hooks hold the weights of the whole model.
        memo |= {id(part._hf_hook): part._hf_hook for part in parts if hasattr(part, "_hf_hook")}
        # A user's hook may write to an object of the user's, or be a method of the model.
        memo |= {id(hook): hook for part in parts for name in _HOOKS for hook in getattr(part, name).values()}
        # What a module keeps of its last call deepcopy refuses, since it is part of a graph.
        kept = [t for part in parts for t in vars(part).values() if isinstance(t, torch.Tensor) and not t.is_leaf]
        memo |= {id(t): t.detach().clone() for t in kept}
        with loaded(parts):
            _check_trainable(model, path, module)
            try:
                copied = copy.deepcopy(module, memo)
            except Exception as error:  # whatever a module's own __deepcopy__ raises
                raise ValueError(
                    f"the module {path!r} cannot be copied for a task: {type(error).__name__}: {error}. Leave it out "
                    "with modules=, or give it parameters that can be copied"
                ) from error
        for name in _HOOKS:
            hooks = getattr(copied, name)
            setattr(copied, name, OrderedDict((n, hook) for n, hook in hooks.items() if _computes_weights(hook)))
        for part in copied.modules():
            if part.__dict__.pop("_hf_hook", None) is not None:  # accelerate's, which stands around the base's module
                part.__dict__.pop("_old_forward", None)
                part.__dict__.pop("forward", None)
            if isinstance(part.__dict__.get("forward"), Bound):
                del part.forward
            for name in _HOOKS[:2]:
                hooks = getattr(part, name)
                for number in [n for n, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Slot)]:
                    del hooks[number]
        unshard_copies(copied)
        copied.requires_grad_(False)
        copies[path] = copied
    return copies


def _computes_weights(hook: Any) -> bool:
    """Whether a hook is of torch.nn.utils' weight_norm, spectral_norm or prune."""
    return any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__)


def _check_trainable(model: nn.Module, path: str, module: nn.Module) -> None:
    for name, parameter in module.named_parameters(path):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{name!r} has no shape yet, so {path!r} cannot be a task's own: call the model once, which gives its "
                "lazy modules their parameters, or leave it out with modules="
            )
        if parameter.dtype not in DTYPES:
            raise ValueError(
                f"{name!r} has dtype {parameter.dtype}, which cannot be trained, so {path!r} cannot be a task's own: "
                "leave the module unquantised, or leave it out with modules="
            )
        if parameter.is_meta and not _all_meta(model):
            raise ValueError(
                f"{name!r} is on the meta device (offloaded, perhaps), so a task cannot have its own copy of {path!r}: "
                "load it first, or leave it out, a head with modules= and a normalisation with layer_norms='frozen'"
            )


def _all_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def beside(model: nn.Module, site: Site) -> tuple[torch.device, torch.dtype]:
    """The device and dtype for an adapter at a site: those of the nearest parameter that can be
    trained and has values, or will have them where accelerate brings it to run.

    Raises ValueError where the site's layer is offloaded and nothing says where it runs.
    """
    layer = site.name.rpartition(".")[0]
    path = site.output
    while True:
        module = model.get_submodule(path)
        parameters = [p for p in module.parameters() if p.dtype in DTYPES]
        for parameter in parameters:
            if not parameter.is_meta:
                return parameter.device, parameter.dtype
        if parameters:
            for part in module.modules():
                if (device := runs_on(part)) is not None:
                    return device, parameters[0].dtype
        if path == layer and parameters and not _all_meta(model):
            raise ValueError(
                f"the layer {layer!r} is on the meta device (offloaded, perhaps), and no hook of accelerate's says "
                f"where it runs, so the adapter at {site.name!r} has no device: load the layer first"
            )
        if not path:
            return (parameters[0].device, parameters[0].dtype) if parameters else (torch.device("cpu"), torch.float32)
        path = path.rpartition(".")[0]


def output_of(head: nn.Module) -> nn.Linear | None:
    """The last nn.Linear of a head, whose outputs are the classes."""
    return next((module for module in reversed(list(head.modules())) if isinstance(module, nn.Linear)), None)


def resize(head: nn.Module, old: nn.Linear, outputs: int) -> tuple[nn.Module, nn.Linear]:
    """A head with another number of outputs, and its last layer, made anew in place of `old`. That is on the meta
    device, so that a number of outputs that nobody has checked takes no memory."""
    new = nn.Linear(old.in_features, outputs, old.bias is not None, device="meta", dtype=old.weight.dtype)
    new.requires_grad_(False)
    for module in head.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return (new if head is old else head), new
