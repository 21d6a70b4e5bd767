"""Tasks of a model that two processes share: FSDP2, DistributedDataParallel and torch.distributed.checkpoint.

Whatever two processes do with half of the batch each has to equal what one process does with all of it. Everything runs
in fp64, so that a difference which is more than the order of a sum shows.
"""

import copy
import os
import queue
import traceback

import pytest
import torch
import torch.distributed as dist
from helpers_models import CONFIG, PLACES, tiny
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from adapter_ops import (
    active_adapter,
    add_adapter,
    load_adapter,
    load_task_state_dict,
    save_adapter,
    set_active_adapter,
    task_state_dict,
    train_adapter,
    using_adapter,
)

X = torch.linspace(-2, 2, 4 * 3 * 8, dtype=torch.float64).view(4, 3, 8)
Y = torch.tensor([0, 1, 2, 0])
CHOICES = ("a", "b", None)
SECONDS = 120


def base(seed=0):
    return tiny(seed).double()


def add(model, name, seed=0, config=CONFIG):
    torch.manual_seed(seed)
    add_adapter(model, name, config, places=PLACES)


def with_tasks(seed=0):
    """A model with the tasks "a" and "b", of which no parameter is equal to one of the other's or of the base's."""
    model = base()
    for number, name in enumerate("ab"):
        add(model, name)
        with torch.no_grad():
            torch.manual_seed(10 * seed + number)
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) / 5)
    return model


def shard(model, layers=True, reshard=True, **options):
    mesh = options.pop("mesh", None) or init_device_mesh("cpu", (2,))
    for layer in model.layers if layers else ():
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, **options)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard, **options)


def half(t):
    return t[dist.get_rank() :: 2]


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return gradients


def adam(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)


def train(shared, alone, steps=2):
    """Trains what trains in both models: `shared` on this process's half of the batch, `alone` on all of it."""
    one, two = adam(shared), adam(alone)
    for _ in range(steps):
        close(step(shared, one, half(X), half(Y)), step(alone, two, X, Y))


def whole(t):
    t = t.detach()
    return t.full_tensor() if hasattr(t, "full_tensor") else t.clone()


def values(model):
    return {n: whole(t) for n, t in model.state_dict().items()}


@torch.no_grad()
def outputs(model):
    """Of every task and of the bare base, each chosen for its call alone."""
    found = {}
    for name in CHOICES:
        with using_adapter(model, name):
            found[str(name)] = model(X)
    return found


def close(found, expected):
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, t in expected.items():
        assert found[name].shape == t.shape and found[name].dtype == t.dtype, name
        difference = (found[name] - t).abs().max().item() if t.numel() else 0.0
        assert difference <= 1e-12, f"{name} differs by {difference:.1e}"


def worker(rank, address, jobs, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    while (job := jobs.get()) is not None:
        function, arguments = job
        try:
            function(*arguments)
            results.put((rank, None))
        except BaseException:
            results.put((rank, traceback.format_exc()))
    dist.destroy_process_group()


class Pair:
    """Two processes that run a function at the same time; they are killed if it does not end."""

    def __init__(self, folder):
        context = torch.multiprocessing.get_context("spawn")
        self.jobs, self.results = [context.Queue(), context.Queue()], context.Queue()
        address = f"file://{folder}/processes"
        self.processes = [
            context.Process(target=worker, args=(rank, address, self.jobs[rank], self.results), daemon=True)
            for rank in range(2)
        ]
        interpreted = os.environ.pop("TRITON_INTERPRET", None)  # they take the CPU path, which is fast
        try:
            for process in self.processes:
                process.start()
        finally:
            if interpreted is not None:
                os.environ["TRITON_INTERPRET"] = interpreted

    def __call__(self, function, *arguments):
        for jobs in self.jobs:
            jobs.put((function, arguments))
        failures = []
        for _ in self.processes:
            try:
                rank, failure = self.results.get(timeout=SECONDS)
            except queue.Empty:
                self.kill()
                pytest.fail("\n".join([*failures, f"the processes did not end within {SECONDS} s"]))
            if failure:
                failures.append(f"process {rank}: {failure}")
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def alive(self):
        return all(process.is_alive() for process in self.processes)


@pytest.fixture(scope="module")
def pairs():
    made = []
    yield made
    for pair in made:
        pair.kill()


@pytest.fixture
def both(pairs, tmp_path):
    """both(function, *arguments) runs a function in two processes of one group, which outlive the test."""
    if not pairs or not pairs[-1].alive:
        pairs.append(Pair(tmp_path))
    return pairs[-1]


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
    add_adapter(model, "a", CONFIG, places=PLACES, modules=())  # as the error says
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
    close(outputs(resumed) | {"a": outputs(alone)["a"]}, outputs(alone))  # "a" was frozen, so it may be another


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
    for number in range(5):
        save_adapter(shared, f"{folder}/shared{number}", "a")
        load_adapter(base(), f"{folder}/shared{number}")  # at once: the files are in place in every process
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
