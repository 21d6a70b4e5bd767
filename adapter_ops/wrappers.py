"""What stands around a model, and where in it the adapters hang."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, DistributedDataParallel, DataParallel and PEFT return.

    `fully_shard` (FSDP2) returns the model itself. The first FSDP, which flattens parameters into others, is refused
    with a ValueError, and anything that is no module with a TypeError.
    """
    if not isinstance(model, nn.Module):  # torch.compile makes a function of a model that it has compiled already
        raise TypeError(f"expected the model, a torch.nn.Module, not {type(model).__name__}")
    while True:
        inner: Any = model._modules.get("_orig_mod")  # torch.compile
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        elif type(model).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) flattens the parameters of a model, so that no task can be told from "
                "the base: use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if inner is None or inner is model:
            return model
        model = inner


def is_data_parallel(model: nn.Module) -> bool:
    """Whether a wrapper of the model took note of the parameters that trained when it was made."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return True
        inner = model._modules.get("_orig_mod")
        if inner is None:
            return False
        model = inner


def holders(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have an `adapter_ops` child, by path."""
    if "adapter_ops" in model._modules:
        return {"": model}
    return {path: module for path, module in model.named_modules() if "adapter_ops" in module._modules}


def holder_of(model: nn.Module, outputs: list[str]) -> nn.Module:
    """The module that gets the child `adapter_ops`.

    The model itself, but not an nn.Sequential, as sentence_transformers' models are: whoever counts, calls or saves
    the children of one would meet ours among them. Then it is the first of its children that holds sites.

    Args:
        model: the model.
        outputs: paths of the modules whose output an adapter reads.
    """
    module, start = model, ""
    while isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        name = outputs[0].removeprefix(start).partition(".")[0]
        start += f"{name}."
        module = module._modules[name]  # type: ignore[assignment]
        if outputs[0].startswith(start) is False:
            return model  # the output is this module itself
    return module


def around(model: nn.Module, first: str, second: str) -> str:
    """The path of the innermost module that has a forward and contains both modules."""
    parts = []
    for a, b in zip(first.split(".")[:-1], second.split(".")[:-1]):
        if a != b:
            break
        parts.append(a)
    while parts and type(model.get_submodule(".".join(parts))).forward is nn.Module.forward:
        parts.pop()
    return ".".join(parts)


@contextlib.contextmanager
def loaded(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, the parameters that accelerate has offloaded from these modules are where they run.

    accelerate loads them with a hook around the module's forward, so it does not where nobody calls that. Modules
    without such a hook stay as they are.
    """
    offloaded = [
        m for m in modules if hasattr(m, "_hf_hook") and any(p.is_meta for p in m._parameters.values() if p is not None)
    ]
    with contextlib.ExitStack() as stack:
        for module in offloaded:
            hook: Any = module._hf_hook
            stack.callback(hook.post_forward, module, None)
            hook.pre_forward(module)
        yield


def runs_on(module: nn.Module) -> torch.device | None:
    """Where accelerate's hook brings what it has offloaded from this module; None where there is no such hook."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):  # of several hooks on one module accelerate makes one
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None
