"""The CSV files of a study: a row a run, which is never run again.

A run is known by its Cell, which is all that decides its result.
"""

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

RUNS, ABLATION = "runs.csv", "ablation.csv"


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

    A line that was cut short is no row, and goes when the next is written. Raises ValueError for other columns.
    """

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self.path = path
        self.heads = [f.name for f in fields(kind)]
        self.rows: list[Row] = []
        content = path.read_bytes() if path.exists() else b""
        lines = list(csv.reader(io.StringIO(content[: content.rfind(b"\n") + 1].decode())))
        if lines and lines[0] != self.heads:
            raise ValueError(f"{path} has columns {lines[0]}, expected {self.heads}")
        for line in lines[1:]:
            self.rows.append(kind(*(f.type(text) for f, text in zip(fields(kind), line))))  # type: ignore[operator]

    def add(self, rows: Iterable[Row]) -> None:
        """Appends rows in one write: all of them are in the file, or none is."""
        new, text = list(rows), io.StringIO()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            csv.writer(text, lineterminator="\n").writerows([self.heads] * (not whole) + [astuple(row) for row in new])  # type: ignore[arg-type]
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += new
