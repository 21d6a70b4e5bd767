"""Tasks in a model that `torch.distributed.fsdp.fully_shard` (FSDP2) has sharded."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .sites import base_modules, base_parameters


def _sharded(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 manages; none where torch.distributed.fsdp was never imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not any(isinstance(m, fsdp.FSDPModule) for _, m in base_modules(model)):
        return []
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered where it is sharded: every process of its mesh has to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 keeps gathered after a forward, so that the model holds the parameters which are sharded.

    Only these are what an optimizer updates and what a change is to be written to.
    """
    for module in _sharded(model):
        module.reshard()


def unshard_copies(module: nn.Module) -> None:
    """Makes whole the parameters of a copy of a module of a sharded model."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and hasattr(parameter, "full_tensor"):
                part._parameters[name] = nn.Parameter(full(parameter.detach()), requires_grad=False)


def check_shardable(model: nn.Module, paths: list[str]) -> None:
    """Raises ValueError if the model is sharded in a way that a new task cannot follow.

    Args:
        model: its parameters are sharded, not gathered (`reshard`).
        paths: of the modules that the task is to have copies of.
    """
    managed = _sharded(model)
    if not managed:
        return
    sharded = [(name, p) for name, p in base_parameters(model) if hasattr(p, "full_tensor")]
    mesh = _group(managed).mesh_info.mesh
    for name, parameter in sharded:
        if parameter.device_mesh != mesh:  # type: ignore[attr-defined]
            raise ValueError(
                f"{name!r} is sharded over {parameter.device_mesh}, the model over {mesh}, so a new task "  # type: ignore[attr-defined]
                "cannot be sharded like the model: add the task before the model is sharded"
            )
    for path in paths:
        if _sharded(model.get_submodule(path)):
            raise ValueError(
                f"{path!r} was given to fully_shard by itself, and PyTorch cannot copy such a module for a task: add "
                "the task before the model is sharded, or leave the module out with modules="
            )


def _group(managed: list[Any]) -> Any:
    """FSDP2's record of how the model's parameters are sharded."""
    groups = (module._get_fsdp_state()._fsdp_param_group for module in managed)
    return next(group for group in groups if group is not None)


def shard_like(model: nn.Module, units: list[nn.Module]) -> None:
    """Shards modules that are added to a sharded model, each by itself, as the model is sharded.

    They start with the values that the first process has, so that all processes that share the model have the same.
    """
    managed = _sharded(model)
    if not managed:
        return
    from torch.distributed.fsdp import fully_shard

    group = _group(managed)
    mesh = group.mesh_info.mesh
    for unit in units:
        if not any(True for _ in unit.parameters()):
            continue
        for parameter in unit.parameters():
            for dim in range(mesh.ndim):
                torch.distributed.broadcast(parameter.detach(), group=mesh.get_group(dim), group_src=0)
        fully_shard(
            unit,
            mesh=mesh,
            # Of the root it is the output that gets another dtype, not what passes between its layers.
            mp_policy=dataclasses.replace(group.mp_policy, output_dtype=None),
            offload_policy=group.offload_policy,
            # After the first forward of the model FSDP2 takes each of these for a root of its own, which it would keep
            # gathered after forward.
            reshard_after_forward=True,
        )


@torch.no_grad()
def fill(target: Tensor, values: Tensor) -> None:
    """Copies whole values into a tensor that may be sharded."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(
            values.to(target.device, target.dtype),
            target.device_mesh,  # type: ignore[attr-defined]
            target.placements,  # type: ignore[attr-defined]
            src_data_rank=None,
        )
    target.copy_(values)


@contextlib.contextmanager
def one_writer(task: nn.Module) -> Iterator[bool]:
    """Yields whether this process is the one that writes the files of a task.

    That is every process by itself, unless the task's parameters are sharded: then it is the first of their mesh, and
    all processes of the mesh leave the context together, after it has written. If it raises, all of them raise.

    Raises:
        RuntimeError: in the other processes, that the one which writes has raised an error.
    """
    mesh = _mesh(task)
    if mesh is None:
        yield True
        return
    writes = not any(mesh.get_coordinate())
    failure: list[str | None] = [None]
    try:
        yield writes
    except BaseException as error:
        failure = [f"{type(error).__name__}: {error}"]
        raise
    finally:
        for dim in range(mesh.ndim):
            torch.distributed.broadcast_object_list(failure, group=mesh.get_group(dim), group_src=0)
    if failure[0] is not None and not writes:
        raise RuntimeError(f"the process that writes for all that share the model failed: {failure[0]}")


def of_writer(task: nn.Module, value: Any) -> Any:
    """The value of the process that writes (see `one_writer`), in every process that shares the task."""
    mesh, values = _mesh(task), [value]
    for dim in range(0 if mesh is None else mesh.ndim):
        torch.distributed.broadcast_object_list(values, group=mesh.get_group(dim), group_src=0)
    return values[0]


def _mesh(task: nn.Module) -> Any:
    """The mesh that a task's parameters are sharded over, or None."""
    return next((p.device_mesh for p in task.parameters() if hasattr(p, "device_mesh")), None)
