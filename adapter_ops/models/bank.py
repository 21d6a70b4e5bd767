"""A bank: the weights of many tasks stacked once on the device, from which each call takes those of its examples."""

import contextlib
import copy
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters import LOCK, adapters_of, find_adapters, root_of
from .batches import check_task, names_of
from .building import check_name, prepare
from .checkpoint import SavedTask, read_task
from .mixed import TaskBatch
from .storage import Storage, check_bottlenecks, check_fits
from .tasks import delete_adapter


class BankStats(NamedTuple):
    """Counters of an AdapterBank since it was made; see `AdapterBank.stats`."""

    hits: int  # tasks of requests that were on the device
    misses: int  # tasks of requests that had to be loaded first
    evictions: int  # tasks that left the device to make room for another one
    loads: int  # tasks that were brought to the device, by a request or by `load` and `add`
    seconds_loading: float  # the time that all loads took together: reading, checking and copying
    rows: dict[str, int]  # by name of the task: the examples that requests had for it

    @property
    def seconds_per_load(self) -> float:
        """The mean time of a load; 0 where there was none."""
        return self.seconds_loading / self.loads if self.loads else 0.0


class _Folder(NamedTuple):
    """Where a task comes from that is not on the device."""

    path: str | os.PathLike[str]
    revision: str | None
    strict: bool


class _Read(NamedTuple):
    """A task that was read, what it was read from, and the seconds that it took."""

    source: Any
    saved: SavedTask
    seconds: float


class AdapterBank:
    """Many tasks for one model: those in use on its device, the others in their folders.

    The weights of `capacity` tasks are stacked once, in one tensor [capacity, ...] for each site and parameter, and a
    call takes those of its examples from there. A task that is not on the device is loaded when a request needs it, in
    the place of the one that was used least recently. All methods may be called from several threads at once, and
    requests go on while tasks are loaded and unloaded. A place is not overwritten while a request uses it.

    Args:
        model: as in `add_adapter`, in eval mode and on its device. The bank may be its only source of tasks, or be
            used beside `add_adapter`.
        capacity: the number of tasks that are on the device at the same time, at least 1. A batch may have as many
            different tasks.
        bottleneck: R, the largest bottleneck of a task, at least 1. Smaller ones are filled up with zeros, which does
            not change their results.
        timeout: the seconds that `using`, `load` and `add` wait for a place while requests that run use all.

    Raises:
        ValueError: a capacity or a bottleneck under 1, or a timeout under 0.
        TypeError: a model that is no torch.nn.Module.

    The tasks of one bank have one config but for bottleneck, reduction_factor, init, init_std and dropout, and heads of
    the same sizes; the first task decides. They do not train: no gradients reach them, and there is no dropout in
    their adapters. The first task is to be loaded while no other thread calls the model.

    >>> bank = AdapterBank(model, capacity=64, bottleneck=64)  # doctest: +SKIP
    >>> bank.load("cola", "tasks/cola")  # doctest: +SKIP
    >>> bank.register("sst2", "tasks/sst2")  # read when it is needed  # doctest: +SKIP
    >>> with torch.no_grad(), bank.using(["cola", "sst2", None]):  # doctest: +SKIP
    ...     logits = model(**batch).logits  # of three examples
    """

    def __init__(self, model: nn.Module, capacity: int, bottleneck: int = 64, *, timeout: float = 30.0) -> None:
        for name, value in (("capacity", capacity), ("bottleneck", bottleneck)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        if not timeout >= 0:
            raise ValueError(f"timeout is {timeout!r}, expected a number of seconds of at least 0")
        root_of(model)
        self.model: nn.Module = model
        self.capacity: int = capacity
        self.bottleneck: int = bottleneck
        self.timeout: float = timeout
        self._changed = threading.Condition()  # holds the lock of everything below
        self._storage: Storage | None = None
        self._sources: dict[str, _Folder | SavedTask] = {}
        self._places: OrderedDict[str, int] = OrderedDict()  # of the tasks on the device, least recently used first
        self._pins = [0] * capacity  # requests that use each place
        self._events = _Events(capacity)
        self._hits = self._misses = self._evictions = self._loads = 0
        self._seconds = 0.0
        self._rows: Counter[str] = Counter()

    def load(
        self, name: str, folder: str | os.PathLike[str], *, revision: str | None = None, strict: bool = False
    ) -> None:
        """Reads a saved task, checks it whole, and brings it to the device.

        Args:
            name: of the task in this bank, whatever it was saved under. The model's own tasks may have the same name.
            folder, revision, strict: as in `load_adapter`; a hub id works too. Keep the folder while the bank is in
                use: a task that left the device is read again when a request needs it.

        Raises:
            ValueError: a name that is malformed or that the bank has, a task that does not fit into the bank, or a file
                that `load_adapter` refuses.
            FileNotFoundError, ImportError: as in `load_adapter`.
            RuntimeError: all places were in use by requests for `timeout` seconds.

        After an error the bank is as it was.
        """
        self._enter_and_bring(name, _Folder(folder, revision, strict))

    def register(
        self, name: str, folder: str | os.PathLike[str], *, revision: str | None = None, strict: bool = False
    ) -> None:
        """Remembers where a saved task is. The first request that needs it loads it, and has the errors of `load`.

        So thousands of tasks can be known of which only those in use are on the device. Arguments as in `load`.

        Raises ValueError for a name that is malformed or that the bank has.
        """
        self._enter(name, _Folder(folder, revision, strict))

    def add(self, name: str, *, delete: bool = False) -> None:
        """Brings a task that the model has, as `add_adapter` makes it, to the device, with the values it has now.

        Args:
            name: of the task in the model, and then also in the bank.
            delete: whether to delete the task from the model (`delete_adapter`) afterwards.

        A copy of the task's own parameters is kept in host memory, for when it has left the device; the base is not
        copied. Raises ValueError for a name that the model does not have or the bank has, or a task that does not fit;
        RuntimeError as in `load`. The bank and the model are then as they were.
        """
        adapters = adapters_of(self.model, name)
        task = adapters.task(name)
        check_task(adapters, task)
        with LOCK:
            kept = copy.deepcopy(task).requires_grad_(False).to("cpu")
        self._enter_and_bring(name, SavedTask(name, kept, adapters.sites, adapters.patterns))
        if delete:
            delete_adapter(self.model, name)

    def unload(self, name: str) -> None:
        """Takes a task off the device and forgets it. Requests that use it end with it, and its folder stays.

        Raises ValueError for an unknown name.
        """
        with self._changed:
            if name not in self._sources:
                names_of(self._sources, [name], "the bank")  # raises ValueError
            del self._sources[name]
            self._places.pop(name, None)
            self._rows.pop(name, None)
            self._changed.notify_all()

    def names(self) -> list[str]:
        """The tasks that the bank knows, on the device or not, in the order in which they came."""
        with self._changed:
            return list(self._sources)

    def resident(self) -> list[str]:
        """The tasks that are on the device, the least recently used one first."""
        with self._changed:
            return list(self._places)

    def stats(self) -> BankStats:
        """The counters as they are now. A request counts each of its tasks once as a hit or a miss."""
        with self._changed:
            counts = self._hits, self._misses, self._evictions, self._loads
            return BankStats(*counts, self._seconds, dict(self._rows))

    @contextlib.contextmanager
    def using(self, names: Sequence[str | None] | Tensor) -> Iterator[None]:
        """Within the context each example of a batch has the task of its name: in this thread or async task alone.

        Args:
            names: one for each example of the batch: the name of a task, or None for the bare base. Or a tensor of
                integers [examples], the numbers of tasks in the order of `names()`, and -1 for the base.

        Raises:
            ValueError: an unknown name, more different tasks than the bank has places, or a folder that cannot be
                loaded, before anything runs; a call of the model whose batch is not of as many examples.
            TypeError: something else than a sequence or a tensor of integers.
            RuntimeError: requests that run used the places that were needed for `timeout` seconds.

        Works as `using_adapters` does, also in `generate()`, and under torch.compile one compilation serves every mix
        of as many examples, whatever is loaded. Rows whose task is None run the base's own LayerNorms and head.
        """
        with self._changed:
            wanted = names_of(self._sources, names, "the bank")
        distinct = list(dict.fromkeys(name for name in wanted if name is not None))
        if len(distinct) > self.capacity:
            raise ValueError(
                f"the batch has {len(distinct)} different tasks, and the bank has places for {self.capacity}: give "
                "AdapterBank a larger capacity, or split the batch"
            )
        places = self._bring(distinct, wanted)
        adapters = find_adapters(self.model)
        try:
            if adapters is None:  # nothing was loaded yet, so there is the base alone
                yield
            else:
                with adapters.selection.choose(True, self._batch(wanted, places)):
                    yield
        finally:
            with self._changed:
                for place in places.values():
                    self._pins[place] -= 1
                    self._events.used(place)
                self._changed.notify_all()

    def _batch(self, wanted: Sequence[str | None], places: Mapping[str, int]) -> TaskBatch:
        storage = self._storage
        numbers = [-1 if name is None else places[name] for name in wanted]
        if storage is None or not places:
            return TaskBatch({}, {}, (), numbers)
        refusal = None
        if not storage.base_fits and None in wanted:
            refusal = (
                "the base's head has another number of outputs than the tasks of the bank, and the model computes one "
                "loss for all rows: call the model without labels=, and compute the loss from the logits"
            )
        return TaskBatch(storage.layers, storage.copies, storage.like.heads, numbers, refusal=refusal)

    def _enter(self, name: str, source: _Folder | SavedTask) -> None:
        check_name(name)
        with self._changed:
            if name in self._sources:
                raise ValueError(
                    f"the bank already has an adapter {name!r}: unload it first, or give the new one another name"
                )
            self._sources[name] = source

    def _enter_and_bring(self, name: str, source: _Folder | SavedTask) -> None:
        self._enter(name, source)
        try:
            self._bring([name], None)
        except BaseException:
            with self._changed:
                if self._sources.get(name) is source:
                    del self._sources[name]
                    self._places.pop(name, None)
            raise

    def _bring(self, names: Sequence[str], wanted: Sequence[str | None] | None) -> dict[str, int]:
        """Brings tasks to the device, and returns their places.

        `wanted` is the batch of a request, whose places are then not overwritten until it gives them back; None is no
        request. The places of a request are taken all at once, so that requests do not wait for one another.
        """
        read: dict[str, _Read] = {}
        end = time.monotonic() + self.timeout
        counted = wanted is None
        while True:
            with self._changed:
                sources = {name: self._sources.get(name) for name in names}
                if gone := [name for name, source in sources.items() if source is None]:
                    raise ValueError(f"the bank has no adapter {gone[0]!r} any more: it was unloaded meanwhile")
                missing = [name for name in names if name not in self._places]
                if not counted:
                    self._hits += len(names) - len(missing)
                    self._misses += len(missing)
                    counted = True
                # Between two turns a name may have been given to another folder.
                read = {name: found for name, found in read.items() if found.source is sources[name]}
                if all(name in read for name in missing):
                    if self._take(missing, names, read):
                        return self._pin(names, wanted)
                    if not self._changed.wait(max(0.0, end - time.monotonic())) and time.monotonic() >= end:
                        raise RuntimeError(
                            f"the bank has no place for {', '.join(map(repr, missing))}: requests that run used all of "
                            f"its {self.capacity} places for {self.timeout} seconds; give AdapterBank a larger capacity"
                        )
                    continue
            for name in missing:
                if name not in read:
                    read[name] = self._read(name, sources[name])

    def _read(self, name: str, source: Any) -> "_Read":
        """A task that is not on the device. Where another thread brings it meanwhile, it is read in vain."""
        start = time.perf_counter()
        saved = source
        if isinstance(source, _Folder):
            saved = read_task(self.model, source.path, name, revision=source.revision, strict=source.strict)
        return _Read(source, saved, time.perf_counter() - start)

    def _take(self, missing: Sequence[str], names: Sequence[str], read: Mapping[str, "_Read"]) -> bool:
        """Writes tasks to places that no request uses, if there are as many."""
        for name in missing:
            check_bottlenecks(name, read[name].saved.task, self.bottleneck)
        if missing and self._storage is None:
            self._make_storage(read[missing[0]].saved)
        try:
            for name in missing:
                check_fits(name, read[name].saved.task, self._storage)  # type: ignore[arg-type]
        except ValueError:
            if not self._loads:
                self._storage = None  # which the first of these tasks has shaped
            raise
        owned = set(self._places.values())
        free = [place for place in range(self.capacity) if place not in owned and not self._pins[place]]
        idle = [name for name, place in self._places.items() if not self._pins[place] and name not in names]
        if len(free) + len(idle) < len(missing):
            return False
        for name in missing:
            start = time.perf_counter()
            if not free:
                free.append(self._places.pop(idle.pop(0)))
                self._evictions += 1
            place = free.pop()
            self._events.before_write(place)
            self._storage.write(place, read[name].saved.task)  # type: ignore[union-attr]
            self._events.written(place)
            self._places[name] = place
            self._loads += 1
            self._seconds += read[name].seconds + time.perf_counter() - start
        return True

    def _pin(self, names: Sequence[str], wanted: Sequence[str | None] | None) -> dict[str, int]:
        places = {name: self._places[name] for name in names}
        for name, place in places.items():
            self._places.move_to_end(name)
            if wanted is not None:
                self._pins[place] += 1
                self._events.before_read(place)
        if wanted is not None:
            self._rows.update(name for name in wanted if name is not None)
        return places

    def _make_storage(self, saved: SavedTask) -> None:
        """The stacks, for tasks like this one, and what runs them in the model."""
        with LOCK:
            new = find_adapters(self.model) is None
            adapters = prepare(self.model, saved.task.copy_at, saved.sites, saved.patterns)
            try:
                storage = Storage(adapters, saved.task, saved.name, self.capacity, self.bottleneck)
            except BaseException:
                if new:
                    adapters.detach()
                raise
            adapters.serves_bank = True
            self._storage = storage
            self._events.devices = {t.device for t in storage.tensors if t.is_cuda}


class _Events:
    """On a GPU, the order of what different streams do with a place: a request's kernels may run after it has given the
    place back, and another stream may be the one that writes there."""

    def __init__(self, capacity: int) -> None:
        self.devices: set[torch.device] = set()
        self._used: list[list[torch.cuda.Event]] = [[] for _ in range(capacity)]
        self._written: list[list[torch.cuda.Event]] = [[] for _ in range(capacity)]

    def _record(self) -> list[torch.cuda.Event]:
        found = []
        for device in self.devices:
            with torch.cuda.device(device):
                found.append(event := torch.cuda.Event())
                event.record(torch.cuda.current_stream(device))
        return found

    def _wait(self, events: Sequence[torch.cuda.Event]) -> None:
        for device in self.devices:
            for event in events:
                torch.cuda.current_stream(device).wait_event(event)

    def used(self, place: int) -> None:
        if self.devices:
            self._used[place] = [e for e in self._used[place] if not e.query()] + self._record()

    def before_write(self, place: int) -> None:
        self._wait(self._used[place])
        self._used[place] = []

    def written(self, place: int) -> None:
        if self.devices:
            self._written[place] = self._record()

    def before_read(self, place: int) -> None:
        self._wait(self._written[place])
