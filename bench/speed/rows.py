"""One row of results: one provider on one shape, dtype and mode; and the CSV file of them."""

import contextlib
import csv
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .cases import MODES, PROVIDERS


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
    """The CSV file of a run: rows go to a file beside `path`, which `close` puts in its place if the run is whole.

    Until then `path` is as it was. The file beside it, `partial`, has a name that no file had, so that a run never
    writes over the rows of another one. Raises OSError where it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()  # of a link, the file behind it is replaced
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            self.partial = self.path.with_name(f"{self.path.stem}.partial{number}{self.path.suffix}")
            with contextlib.suppress(FileExistsError):
                self.file = self.partial.open("x", encoding="utf-8", newline="")
                break
        self.count = 0  # of rows
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(COLUMNS)

    def write(self, rows: Iterable[Row]) -> None:
        """Appends rows, and hands them to the system at once."""
        for row in rows:
            self.count += 1
            values = (getattr(row, name) for name in COLUMNS)
            self.writer.writerow(f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in values)
        self.file.flush()

    def close(self, whole: bool) -> None:
        """Puts the file in the place of `path` if the run is whole. Otherwise it stays, unless it has no rows."""
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        if whole:
            self.partial.replace(self.path)
        elif not self.count:
            self.partial.unlink()


def read(path: Path | str) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no CSV file, its columns are others, or a line (which the error names) has a cell too many,
            too few or of another type, or a provider or a mode that is not known.
    """
    found = []
    with open(path, encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        try:
            heads = next(lines, None)
            if heads != COLUMNS:
                raise ValueError(f"{path} has columns {heads}, expected {COLUMNS}")
            found = [_row(f"{path}, line {lines.line_num}", cells) for cells in lines if cells]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV file: {error}") from error
    return found


def _row(line: str, cells: list[str]) -> Row:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{line} has {len(cells)} cells, expected {len(COLUMNS)}")
    try:
        row = Row(**{name: _parse(name, text) for name, text in zip(COLUMNS, cells)})
    except ValueError as error:
        raise ValueError(f"{line}: {error}") from error
    for kind, name, known in (("provider", row.provider, PROVIDERS), ("mode", row.mode, MODES)):
        if name not in known:
            raise ValueError(f"{line} has the {kind} {name!r}; known: {', '.join(known)}")
    return row


def row_of(cells: Iterable[str]) -> str:
    """One of Markdown's rows."""
    return f"| {' | '.join(cells)} |"


TYPES = {field.name: field.type for field in fields(Row)}


def _parse(name: str, text: str) -> Any:
    kind = TYPES[name]
    if kind is str:
        return text
    if text == "" and kind not in (int, float):
        return None
    try:
        return int(text) if kind in (int, int | None) else float(text)
    except ValueError:
        raise ValueError(f"expected a number as {name}, found {text!r}") from None
