"""Two processes on this machine, and small models that they share, to be held against one process with the whole batch.

Everything runs in fp64, so that a difference which is more than the order of a sum shows.
"""

import contextlib
import os
import queue
import time
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers_models import CONFIG, SITES, tiny
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adapter_ops import add_adapter, using_adapter

X = torch.linspace(-2, 2, 4 * 3 * 8, dtype=torch.float64).view(4, 3, 8)
Y = torch.tensor([0, 1, 2, 0])
CHOICES = ("a", "b", None)
SECONDS = 120


def base(seed=0):
    return tiny(seed).double()


def add(model, name, seed=0, config=CONFIG):
    torch.manual_seed(seed)
    add_adapter(model, name, config, sites=SITES)


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


class Died(Exception):
    """A process ended without a report."""


class Pair:
    """Two processes that run a function at the same time; they are killed if it does not end.

    Now and then a thread of gloo's ends a process that waits for the other one, under load. So where a process has died
    the function runs once more, in two new processes.
    """

    def __init__(self, folder):
        self.folder, self.starts = folder, 0
        self.start()

    def start(self):
        context = torch.multiprocessing.get_context("spawn")
        self.jobs, self.results = [context.Queue(), context.Queue()], context.Queue()
        self.starts += 1
        address = f"file://{self.folder}/processes{self.starts}"
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
        try:
            failures = self._run(function, arguments)
        except Died as death:
            warnings.warn(f"{function.__name__}: {death}; it runs once more", stacklevel=2)
            self.start()
            try:
                failures = self._run(function, arguments)
            except Died as death:
                failures = [f"twice, {death}"]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)

    def _run(self, function, arguments):
        """What failed. Raises Died."""
        for jobs in self.jobs:
            jobs.put((function, arguments))
        failures, end = [], time.monotonic() + SECONDS
        for _ in self.processes:
            answer = self._answer(end)
            if answer is None:
                self.kill()
                return [*failures, f"the processes did not end within {SECONDS} s"]
            rank, failure = answer
            if failure:
                failures.append(f"process {rank}: {failure}")
        return failures

    def _answer(self, end):
        """What a process reports, or None if none does in time. Raises Died."""
        while time.monotonic() < end:
            alive = self.alive  # before the queue is asked, as a process may report and then die
            with contextlib.suppress(queue.Empty):
                return self.results.get(timeout=1)
            if not alive:
                codes = [process.exitcode for process in self.processes]
                self.kill()
                raise Died(f"a process has died: the exit codes are {codes}")
        return None

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def alive(self):
        return all(process.is_alive() for process in self.processes)
