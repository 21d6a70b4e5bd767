"""What goes into files from a model that two processes share, and DistributedDataParallel.

The files are those of this library and those of torch.distributed.checkpoint.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers_distributed import (
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
    whole,
    with_tasks,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from transformers import BertConfig, BertModel

from adapter_ops import add_adapter, load_adapter, save_adapter, task_state_dict, train_adapter
from adapter_ops.integrations.adapterhub import load_adapterhub, save_adapterhub
from adapter_ops.models import files


def _checkpoint(whole_state, frozen_too):
    """The idiom of PyTorch's tutorials: save model and optimizer, and go on in another process group."""
    options = StateDictOptions(full_state_dict=whole_state, ignore_frozen_params=not frozen_too, strict=frozen_too)
    alone, shared = with_tasks(), shard(with_tasks())
    train(shared, alone)
    outputs(shared)
    state = get_model_state_dict(shared, options=options)
    expected = {n: p for n, p in alone.named_parameters() if p.requires_grad or frozen_too}
    if dist.get_rank() == 0 or not whole_state:  # a state that is gathered is on the first process alone
        close({n: whole(t) for n, t in state.items()}, expected)
        assert any(n.startswith("adapter_ops.tasks.b.copies.head") for n in state)
    resumed = shard(with_tasks(seed=4))
    outputs(resumed)
    options = StateDictOptions(full_state_dict=whole_state, broadcast_from_rank0=whole_state, strict=frozen_too)
    set_model_state_dict(resumed, state, options=options)
    if frozen_too:
        close(values(resumed), values(alone))
    close({"b": outputs(resumed)["b"]}, {"b": outputs(alone)["b"]})


@pytest.mark.parametrize(("whole_state", "frozen_too"), [(False, True), (False, False), (True, True)])
def test_dcp_has_the_values_of_tasks_under_their_names(both, whole_state, frozen_too):
    """`get_model_state_dict` of a trained task, with `ignore_frozen_params` too, and back into another model."""
    both(_checkpoint, whole_state, frozen_too)


def _resume():
    alone, shared, resumed = with_tasks(), shard(with_tasks()), shard(with_tasks(seed=4))
    one, two, three = adam(shared), adam(alone), adam(resumed)
    for _ in range(2):
        step(shared, one, half(X), half(Y))
        step(alone, two, X, Y)
    state = copy.deepcopy(get_state_dict(shared, one))
    set_state_dict(resumed, three, model_state_dict=state[0], optim_state_dict=state[1])
    close(values(resumed), values(alone))
    step(resumed, three, half(X), half(Y))
    step(alone, two, X, Y)
    close(values(resumed), values(alone))
    close(outputs(resumed), outputs(alone))


def test_dcp_resumes_model_and_optimizer(both):
    both(_resume)


def test_dcp_resumes_model_and_optimizer_in_one_process():
    """The same without a process group: the optimizer's state is under the names of the task's parameters."""
    model, resumed = with_tasks(), with_tasks(seed=4)
    one, two = adam(model), adam(resumed)
    for _ in range(2):
        step(model, one, X, Y)
    state = copy.deepcopy(get_state_dict(model, one))
    assert all(name.startswith("adapter_ops.tasks.b.") for name in state[1]["state"])
    set_state_dict(resumed, two, model_state_dict=state[0], optim_state_dict=state[1])
    step(model, one, X, Y)
    step(resumed, two, X, Y)
    close(values(resumed), values(model))
    trained = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    assert trained.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


def _writers(folder):
    rank = dist.get_rank()
    mine = with_tasks()
    save_adapter(mine, f"{folder}/mine{rank}", "a")  # of this process alone: no other takes part
    load_adapter(base(), f"{folder}/mine{rank}")
    shared = shard(with_tasks())
    written, write = [], files.write
    files.write = lambda folder, *rest: written.append(folder) or write(folder, *rest)
    for number in range(5):
        save_adapter(shared, f"{folder}/shared{number}", "a")
        load_adapter(base(), f"{folder}/shared{number}")  # at once: the files are in place in every process
    files.write = write
    assert len(written) == (5 if rank == 0 else 0)
    with open(f"{folder}/a file {rank}", "w") as file:
        file.write("no folder")
    dist.barrier()
    with pytest.raises((OSError, RuntimeError), match=r"exists|failed: FileExistsError"):
        save_adapter(shared, f"{folder}/a file 0", "a")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        save_adapter(shared, folder, "other")
    dist.barrier()


def test_which_process_writes(both, tmp_path):
    """Each writes a model of its own; of a sharded one the first writes, and all wait for it and hear of its error."""
    both(_writers, str(tmp_path))


def _adapterhub_writers(folder):
    rank = dist.get_rank()
    for sharded in (False, True):
        torch.manual_seed(0)
        model = BertModel(BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8))
        add_adapter(model, "a", "pfeiffer")
        where = f"{folder}/{'shared' if sharded else f'mine{rank}'}"
        model = shard(model, layers=False) if sharded else model
        model(torch.ones(1, 3, dtype=torch.long))  # FSDP2 may keep gathered what is to be saved
        save_adapterhub(model, where, "a")
        fresh = BertModel(model.config)
        load_adapterhub(fresh, where)  # at once: it is in place in every process
        saved = {n: whole(t) for n, t in model.named_parameters() if t.requires_grad and "adapters" in n}
        close({n: t for n, t in fresh.named_parameters() if t.requires_grad}, saved)


def test_which_process_writes_an_adapterhub_folder(both, tmp_path):
    both(_adapterhub_writers, str(tmp_path))


def _data_parallel():
    alone = with_tasks()
    shared = copy.deepcopy(alone)
    for name in "ab":
        train_adapter(shared, name)
        train_adapter(alone, name)
        wrapped = nn.parallel.DistributedDataParallel(shared)  # with the task that is to train, as train_adapter says
        one, two = adam(wrapped), adam(alone)
        for _ in range(2):
            found = step(wrapped, one, half(X), half(Y))
            close({n.removeprefix("module."): t for n, t in found.items()}, step(alone, two, X, Y))
        close(outputs(wrapped), outputs(alone))
        close(task_state_dict(wrapped, name), task_state_dict(alone, name))
    close(values(shared), values(alone))
    for change in (lambda: train_adapter(wrapped, "a"), lambda: add(wrapped, "c")):
        with pytest.warns(UserWarning, match="wrap the model again"):
            change()


def test_data_parallel_trains_as_one_process_does(both):
    """Each task is chosen before DistributedDataParallel wraps the model; after that, `train_adapter` warns."""
    both(_data_parallel)
