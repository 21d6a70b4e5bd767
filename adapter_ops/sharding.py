"""Tasks in a model that `torch.distributed.fsdp.fully_shard` (FSDP2) has sharded."""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def _sharded(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 manages; none where torch.distributed.fsdp was never imported."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered where it is sharded: every process of its mesh has to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 keeps gathered after a forward, so that the model holds the parameters which are sharded."""
    for module in _sharded(model):
        module.reshard()


def unshard_copies(module: nn.Module) -> None:
    """Makes whole the parameters of a copy of a module of a sharded model."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and hasattr(parameter, "full_tensor"):
                part._parameters[name] = nn.Parameter(full(parameter.detach()), requires_grad=False)


def shard_like(model: nn.Module, units: list[nn.Module]) -> None:
    """Shards modules that are added to a sharded model, each by itself, over the same mesh and with the same dtypes."""
    managed = _sharded(model)
    mesh = next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)  # type: ignore[attr-defined]
    if not managed or mesh is None:
        return
    from torch.distributed.fsdp import fully_shard

    policy = managed[0]._get_fsdp_state()._mp_policy
    for unit in units:
        if any(True for _ in unit.parameters()):
            fully_shard(unit, mesh=mesh, mp_policy=policy)


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


def is_writer() -> bool:
    """Whether this process is the one that writes files: the first of a group that shares a model."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
