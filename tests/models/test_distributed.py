"""Tasks of a model that `fully_shard` (FSDP2) shares between two processes.

Whatever two processes do with half of the batch each has to equal what one process does with all of it.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from helpers_distributed import (
    CHOICES,
    X,
    Y,
    adam,
    add,
    base,
    close,
    half,
    outputs,
    shard,
    step,
    train,
    values,
    with_tasks,
)
from helpers_models import CONFIG, SITES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from adapter_ops import (
    active_adapter,
    adapter_summary,
    add_adapter,
    delete_adapter,
    load_adapter,
    load_task_state_dict,
    save_adapter,
    set_active_adapter,
    task_state_dict,
    train_adapter,
    using_adapter,
)

wrapping = pytest.mark.parametrize(("layers", "reshard"), [(True, True), (True, False), (False, True), (False, False)])


def _switching(layers, reshard, folder):
    alone = with_tasks()
    shared = shard(copy.deepcopy(alone), layers, reshard)
    close(outputs(shared), outputs(alone))
    for name in "ab":
        train_adapter(shared, name)
        train_adapter(alone, name)
        train(shared, alone)
        close(outputs(shared), outputs(alone))
        assert active_adapter(shared) == name
        save_adapter(shared, f"{folder}/{name}", name)
    close(values(shared), values(alone))
    fresh = base()
    for name in "ab":
        assert os.path.exists(f"{folder}/{name}/adapter_ops.safetensors")
        load_adapter(fresh, f"{folder}/{name}", strict=True)
        close(task_state_dict(shared, name), task_state_dict(alone, name))
    close(outputs(fresh), outputs(alone))
    for name in CHOICES:
        set_active_adapter(shared, name)
        set_active_adapter(alone, name)
        with torch.no_grad():
            close({"y": shared(X)}, {"y": alone(X)})
    assert adapter_summary(shared) == adapter_summary(alone)
    for model in (shared, alone):
        delete_adapter(model, "a")
        train_adapter(model, "b")
    train(shared, alone)
    close(values(shared), values(alone))


@wrapping
def test_fsdp2_trains_and_switches_as_one_process_does(both, layers, reshard, tmp_path):
    """Outputs, gradients and parameters of two tasks trained in turn; what is saved serves a model that is whole."""
    both(_switching, layers, reshard, str(tmp_path))


def _using_adapter(layers, reshard):
    alone = with_tasks()
    set_active_adapter(alone, "a")
    shared = shard(copy.deepcopy(alone), layers, reshard)
    for model in (shared, alone):
        for name in "ab":
            for p in model.adapter_ops.task(name).parameters():
                p.requires_grad_(True)
    one, two = adam(shared), adam(alone)
    for name in "abba":
        with using_adapter(shared, name), using_adapter(alone, name):
            close(step(shared, one, half(X), half(Y)), step(alone, two, X, Y))
    close(values(shared), values(alone))


@wrapping
def test_fsdp2_trains_several_tasks_under_using_adapter(both, layers, reshard):
    """Under `using_adapter` each step trains the task of its own block, and the default stays."""
    both(_using_adapter, layers, reshard)


def _state(layers, reshard):
    """What a task is given after a forward, which may have left the model gathered, is what runs next."""
    alone, shared = with_tasks(), shard(with_tasks(), layers, reshard)
    other = with_tasks(seed=3)
    outputs(shared)
    for name in "ab":
        state = task_state_dict(other, name)
        load_task_state_dict(shared, name, state)
        load_task_state_dict(alone, name, state)
        close(task_state_dict(shared, name), state)
    close(outputs(shared), outputs(alone))
    train_adapter(shared, "a")
    train_adapter(alone, "a")
    train(shared, alone)
    close(outputs(shared), outputs(alone))


@wrapping
def test_fsdp2_task_state_after_a_forward(both, layers, reshard):
    """`load_task_state_dict` writes to the sharded parameters, also where a forward has left gathered ones."""
    both(_state, layers, reshard)


def _frozen_first(layers, reshard):
    alone = with_tasks().requires_grad_(False)
    shared = shard(copy.deepcopy(alone), layers, reshard)
    close(outputs(shared), outputs(alone))
    train_adapter(shared, "b")
    train_adapter(alone, "b")
    train(shared, alone)
    close(values(shared), values(alone))


@wrapping
def test_fsdp2_trains_a_model_that_was_frozen_when_it_was_sharded(both, layers, reshard):
    both(_frozen_first, layers, reshard)


def _add(layers, reshard, forward_first, folder):
    alone = base()
    add(alone, "c", seed=7)
    adam(alone).param_groups[0]["params"][0].data.add_(1)
    if dist.get_rank() == 0:
        save_adapter(alone, folder, "c")
    dist.barrier()
    alone, shared = base(), shard(base(), layers, reshard)
    for model in (alone, shared) if forward_first else ():
        with torch.no_grad():
            model(X)
    for name in "ab":
        add(alone, name, seed=ord(name))
        add(shared, name, seed=ord(name) + dist.get_rank())  # the first process's values are everyone's
        close(values(shared), values(alone))
        train(shared, alone)
    for model in (alone, shared):
        load_adapter(model, folder, strict=True)
    train(shared, alone)
    close(outputs(shared), outputs(alone))
    close(values(shared), values(alone))
    train_adapter(shared, "a")
    train_adapter(alone, "a")
    train(shared, alone)
    close(values(shared), values(alone))
    assert all(hasattr(p, "full_tensor") for p in shared.parameters())


@pytest.mark.parametrize("forward_first", [False, True])
@wrapping
def test_tasks_of_a_model_that_is_sharded_already(both, layers, reshard, forward_first, tmp_path):
    """`add_adapter` and `load_adapter` shard a task as the model is, with one process's start, and it trains."""
    both(_add, layers, reshard, forward_first, str(tmp_path))


def _replicated():
    """Two copies of the model, each whole: FSDP2 over a mesh whose first dimension is of replicas."""
    alone, shared = base(), shard(base(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards")))
    add(alone, "a", seed=1)
    add(shared, "a", seed=1 + dist.get_rank())
    train(shared, alone)
    close(values(shared), values(alone))


def test_a_task_of_a_replicated_model_starts_with_the_same_values_everywhere(both):
    both(_replicated)


def _refused():
    mesh = init_device_mesh("cpu", (2,))
    model = base()
    fully_shard(model.head, mesh=mesh)
    shard(model, mesh=mesh)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="'head' was given to fully_shard by itself"):
        add(model, "a")
    assert set(model.state_dict()) == before and all(p.requires_grad for p in model.parameters())
    add_adapter(model, "a", CONFIG, sites=SITES, modules=())  # as the error says
    model = base()
    fully_shard(model.layers[0], mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards")))
    fully_shard(model, mesh=mesh)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=r"sharded over .* add the task before"):
        add(model, "a")
    assert set(model.state_dict()) == before and all(p.requires_grad for p in model.parameters())


def test_a_task_that_cannot_be_sharded_like_the_model_is_refused(both):
    """A head that fully_shard was given by itself, and modules on several meshes: nothing has changed after."""
    both(_refused)


def _mixed_precision():
    alone = with_tasks().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    shared = shard(copy.deepcopy(alone), False, False, mp_policy=policy)
    with torch.no_grad():
        shared(X.float())  # which leaves parameters in bf16 in the model
    for name in "ab":
        close(task_state_dict(shared, name), task_state_dict(alone, name))
    with torch.no_grad():
        shared(X.float())
    set_active_adapter(shared, None)
    add(shared, "c", seed=5)
    add(alone, "c", seed=5)
    close(task_state_dict(shared, "c"), task_state_dict(alone, "c"))
    dtypes = []
    shared.adapter_ops.task("c").layer_at["layers.0.ffn"].register_forward_hook(lambda m, a, y: dtypes.append(y.dtype))
    assert shared(X.float()).dtype == torch.float32 and dtypes == [torch.bfloat16]


def test_fsdp2_in_mixed_precision_saves_and_copies_the_parameters_in_full(both):
    """A forward leaves bf16 parameters in the model; states and copies have the fp32 ones that are trained."""
    both(_mixed_precision)
