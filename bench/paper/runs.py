"""The CSV files of a study: a row a run, which is never run again.

A run is known by its Cell, which is all that decides its result.
"""

import contextlib
import csv
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

from ..files import fcntl, try_lock

RUNS, ABLATION, LOCK = "runs.csv", "ablation.csv", "runs.lock"


@dataclass(frozen=True)
class Cell:
    """What a run is of."""

    model: str
    task: str
    data: str  # digest of its texts
    method: str
    setting: str  # what the method was told, "bottleneck=64 norm=layer"
    learning_rate: float
    epochs: int
    batch: int
    length: int  # tokens of a text
    dropout: str  # a number, or "" for the model's own
    dtype: str  # of the products
    texts: int  # that it was trained on
    seed: int


@dataclass(frozen=True)
class Result(Cell):
    """A row of runs.csv. No choice goes by `test`."""

    metric: str
    validation: float
    test: float
    others: str  # further metrics on test, "accuracy=0.9"
    loss: float  # mean over the last epoch
    trained: int  # parameters, the head's included
    share: float  # of the encoder's parameters
    seconds: float
    device: str
    torch: str
    commit: str
    date: str


@dataclass(frozen=True)
class Ablated(Cell):
    """A row of ablation.csv: the score without the adapters of layers first … last; with all of them for -1 … -1."""

    metric: str
    first: int
    last: int
    test: float


Row = TypeVar("Row", bound=Cell)


def cell_of(row: Cell) -> Cell:
    return Cell(*(getattr(row, f.name) for f in fields(Cell)))


class Table(Generic[Row]):
    """Rows of one kind in a CSV file that only grows: whatever happens to the process, what is in it stays.

    Several processes may add rows to one file. A line that was cut short is no row, and goes when the next is written.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has other columns, or a row (which the error names) has a cell too many, too few or of another
            type.
    """

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self.path, self.kind = path, kind
        self.heads = [f.name for f in fields(kind)]
        self.rows: list[Row] = []
        self.refresh()

    def refresh(self) -> None:
        """Reads the rows again, since another process may have added some."""
        content = self.path.read_bytes() if self.path.exists() else b""
        lines = list(csv.reader(io.StringIO(content[: content.rfind(b"\n") + 1].decode())))
        if lines and lines[0] != self.heads:
            raise ValueError(f"{self.path} has columns {lines[0]}, expected {self.heads}")
        self.rows = [self._row(number, line) for number, line in enumerate(lines[1:], 1)]

    def _row(self, number: int, line: list[str]) -> Row:
        try:
            return self.kind(*(f.type(text) for f, text in zip(fields(self.kind), line, strict=True)))  # type: ignore[operator]
        except ValueError as error:
            raise ValueError(f"{self.path}, row {number}: {error}") from error

    def add(self, rows: Iterable[Row]) -> None:
        """Appends rows in one write: all of them are in the file, or none is."""
        text = io.StringIO()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            fcntl().lockf(file, fcntl().LOCK_EX)  # waits while another process writes; the end of `with` unlocks
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            csv.writer(text, lineterminator="\n").writerows([self.heads] * (not whole) + [astuple(row) for row in rows])  # type: ignore[arg-type]
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def claim(folder: Path, cell: Cell) -> Iterator[bool]:
    """Claims a run for this process: yields True, or False where another process has claimed it.

    A claim is a lock on one byte of the folder's file LOCK, which stays empty; the cell's digest says on which. The
    system drops the lock when the process ends, however it ends, so that a run that was killed can be run again. A
    process claims one run at a time.

    Raises:
        OSError: the file system has no locks.
        RuntimeError: the platform has no locks.
    """
    byte = int.from_bytes(hashlib.sha256(repr(astuple(cell)).encode()).digest()[:7], "big")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "ab") as file:
        yield try_lock(file, folder / LOCK, 1, byte)
