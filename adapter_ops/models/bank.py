"""A bank: the weights of many tasks stacked once on the device, from which each call takes those of its examples."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class BankStats(NamedTuple):
    """Counters of an AdapterBank since it was made; see `AdapterBank.stats`."""

    hits: int  # tasks of requests that were on the device
    misses: int  # tasks of requests that had to be loaded first
    evictions: int  # tasks that left the device to make room for another one
    loads: int  # tasks that were brought to the device, by a request or by `load` and `add`
    seconds_loading: float  # the time that all loads took together
    rows: dict[str, int]  # by name of the task: the examples that requests had for it

    @property
    def seconds_per_load(self) -> float:
        """The mean time of a load; 0 where there was none."""
        return self.seconds_loading / self.loads if self.loads else 0.0


class AdapterBank:
    """The weights of many tasks, stacked once on the device of the model.

    Args:
        model: as in `add_adapter`.
        capacity: the number of tasks that are on the device at the same time, at least 1.
        bottleneck: R, the largest bottleneck that a task may have.
        timeout: the seconds that `using`, `load` and `add` wait for a place on the device while requests use all.
    """

    def __init__(self, model: nn.Module, capacity: int, bottleneck: int = 64, *, timeout: float = 30.0) -> None:
        raise NotImplementedError

    def load(self, name: str, folder: str | os.PathLike[str], *, revision: str | None = None) -> None:
        """Reads a saved task, checks it whole, and brings it to the device. `folder`: as in `load_adapter`.

        Raises ValueError for a name that the bank has, or a task that does not fit into the bank; the errors of
        `load_adapter`; RuntimeError if no place became free within `timeout`. The bank is then as it was.
        """
        raise NotImplementedError

    def register(self, name: str, folder: str | os.PathLike[str], *, revision: str | None = None) -> None:
        """Remembers where a saved task is; the first request that needs it loads it."""
        raise NotImplementedError

    def add(self, name: str, *, delete: bool = False) -> None:
        """Brings a task of the model, which `add_adapter` made, to the device. `delete`: and deletes it there."""
        raise NotImplementedError

    def unload(self, name: str) -> None:
        """Forgets a task. Requests that use it end with it. Raises ValueError for an unknown name."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """The tasks that the bank knows, on the device or not, in the order in which they came."""
        raise NotImplementedError

    def resident(self) -> list[str]:
        """The tasks that are on the device, the least recently used one first."""
        raise NotImplementedError

    def stats(self) -> BankStats:
        """The counters as they are now."""
        raise NotImplementedError

    @contextlib.contextmanager
    def using(self, names: Sequence[str | None] | Tensor) -> Iterator[None]:
        """Within the context each example of a batch has the task of its name, or with None the bare base.

        Tasks that are not on the device are loaded first. Raises ValueError for an unknown name, before anything runs.
        """
        raise NotImplementedError
        yield
