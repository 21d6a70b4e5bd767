"""One row of results: one provider on one shape, dtype and mode; and the CSV file of them."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any


@dataclass
class Row:
    """An empty cell is a figure that was not or could not be taken; `note` says why where it is an error."""

    provider: str
    device: str
    dtype: str
    mode: str
    M: int
    D: int
    R: int
    user_ms: float | None = None  # median, host included
    user_p20_ms: float | None = None
    user_p80_ms: float | None = None
    kernel_ms: float | None = None  # median of CUDA graph replays: the GPU alone
    kernel_p20_ms: float | None = None
    kernel_p80_ms: float | None = None
    user_speedup: float | None = None  # eager's time over this one
    kernel_speedup: float | None = None
    bytes: int | None = None  # that must be moved; see measure.work
    flops: int | None = None
    floor_ms: float | None = None  # max(bytes / bandwidth, flops / rate)
    percent_of_floor: float | None = None  # floor over kernel time, or over user time where there is none
    launches: int | None = None  # kernels, copies and fills on the GPU
    peak_bytes: int | None = None  # above inputs and parameters
    saved_bytes: int | None = None  # for backward
    error: float | None = None  # ‖found − fp64‖ / ‖fp64‖ of the result that does worst against eager
    eager_error: float | None = None  # eager's for the same result
    copy_bytes_per_second: float | None = None
    matmul_flops_per_second: float | None = None
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""
    note: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.M, self.D, self.R

    @property
    def ms(self) -> float | None:
        """The time to compare: kernel time, or user time where there is none."""
        return self.user_ms if self.kernel_ms is None else self.kernel_ms

    @property
    def speedup(self) -> float | None:
        return self.user_speedup if self.kernel_ms is None else self.kernel_speedup


COLUMNS = [field.name for field in fields(Row)]


class Writer:
    """Writes rows as they come, so that a run that is cut short leaves what it has."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.writer = file, csv.writer(file, lineterminator="\n")
        self.writer.writerow(COLUMNS)

    def write(self, rows: Iterable[Row]) -> None:
        for row in rows:
            values = (getattr(row, name) for name in COLUMNS)
            self.writer.writerow(f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in values)
        self.file.flush()


def read(path: Path | str) -> list[Row]:
    """The rows of a CSV file; ValueError where its columns are others."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file)
        if lines.fieldnames != COLUMNS:
            raise ValueError(f"{path} has columns {lines.fieldnames}, expected {COLUMNS}")
        return [Row(**{name: _parse(name, text) for name, text in cells.items()}) for cells in lines]


def row_of(cells: Iterable[str]) -> str:
    """One of Markdown's rows."""
    return f"| {' | '.join(cells)} |"


TYPES = {field.name: field.type for field in fields(Row)}


def _parse(name: str, text: str) -> Any:
    if TYPES[name] is str:
        return text
    return None if text == "" else int(text) if TYPES[name] in (int, int | None) else float(text)
