"""GLUE: through Hugging Face's `datasets`, or from a folder of its TSV files.

The labels of GLUE's own test sets are not public. So its development set is the test set here, and what choices are
made on is held out of its training set, unless a folder has a test file with labels.
"""

import csv
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .data import Dataset, Example


class Glue(NamedTuple):
    """The hub's columns of text, and GLUE's metrics, of which the paper reports the first (Table 1)."""

    texts: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    development: str = "validation"


GLUE = {
    "cola": Glue(("sentence",), ("matthews",)),
    "sst2": Glue(("sentence",)),
    "mrpc": Glue(("sentence1", "sentence2"), ("f1", "accuracy")),
    "stsb": Glue(("sentence1", "sentence2"), ("spearman", "pearson")),
    "qqp": Glue(("question1", "question2"), ("f1", "accuracy")),
    "mnli": Glue(("premise", "hypothesis"), development="validation_matched"),
    "mnli-mm": Glue(("premise", "hypothesis"), development="validation_mismatched"),
    "qnli": Glue(("question", "sentence")),
    "rte": Glue(("sentence1", "sentence2")),
    "wnli": Glue(("sentence1", "sentence2")),
}
NUMBERS = ("spearman", "pearson")

# Columns of the TSV files, by their headers; the first that is there counts.
TEXTS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("#1 string", "#2 string"),
    ("sentence",),
    ("text",),
)
LABELS = ("gold_label", "label", "is_duplicate", "quality", "score")
HELD_OUT = 0.1  # of the training set, and no more than there are in the test set


def from_hub(name: str) -> Dataset:
    """`glue/<name>`. Raises ValueError for an unknown name, RuntimeError where `datasets` cannot load it."""
    if name not in GLUE:
        raise ValueError(f"unknown GLUE task {name!r}; known: {', '.join(GLUE)}")
    task = GLUE[name]
    try:
        import datasets

        found: Mapping[str, Any] = datasets.load_dataset("nyu-mll/glue", name.removesuffix("-mm"))
    except (ImportError, OSError, ValueError) as error:
        raise RuntimeError(
            f"glue/{name} cannot be loaded ({type(error).__name__}: {error}); "
            "a folder of GLUE's TSV files works as well"
        ) from error

    def examples(part: str) -> list[Example]:
        rows = found[part]
        texts = [rows[column][:] for column in task.texts]
        return [Example(t[0], label, *t[1:]) for *t, label in zip(*texts, rows["label"][:])]

    numbers = task.metrics[0] in NUMBERS
    labels = [] if numbers else list(found["train"].features["label"].names)
    return hold_out(f"glue/{name}", labels, examples("train"), examples(task.development), task.metrics)


def hold_out(
    name: str, labels: list[str], train: list[Example], test: list[Example], metrics: tuple[str, ...]
) -> Dataset:
    """A dataset whose validation split comes out of `train`, the same way every time."""
    rest = list(train)
    random.Random(0).shuffle(rest)
    size = max(1, min(round(len(rest) * HELD_OUT), len(test)))
    return Dataset(name, labels, rest[size:], rest[:size], test, metrics)


def from_folder(folder: Path) -> Dataset:
    """train.tsv, dev.tsv (dev_matched.tsv) and, if its labels are there, test.tsv, as GLUE has them.

    The columns are told by their header; four columns without one are CoLA's. A column "score" holds numbers to
    predict. A folder that is called after a task of GLUE, in whatever case and with or without "-", takes its metrics.

    Raises:
        ValueError: a file that is missing, empty, or has none of the columns; a label of held-out text that training
            has not; one label in all, or more than two where F1 counts one of them; a score that is no number.
    """
    development = next((f for f in (folder / "dev.tsv", folder / "dev_matched.tsv") if f.exists()), folder / "dev.tsv")
    parts = [_read(folder / "train.tsv"), _read(development)]
    if (folder / "test.tsv").exists() and (test := _read(folder / "test.tsv", labelled=False)).rows:
        parts.append(test)
    for path, part in zip((folder / "train.tsv", development), parts):
        if not part.rows:
            raise ValueError(f"{path} has a header and no rows")
    task = GLUE.get(folder.name.lower().replace("-", "").replace("_", ""))
    numbers = parts[0].label == "score" or (task is not None and task.metrics == NUMBERS)
    metrics = NUMBERS if numbers else task.metrics if task else ("accuracy",)
    found, labels = sorted({label for part in parts for _, label in part.rows}), list[str]()
    if numbers:
        if wrong := [text for text in found if not _is_number(text)]:
            raise ValueError(f"{folder}: expected numbers to predict, found {wrong[:3]}")
    else:
        labels = sorted({label for _, label in parts[0].rows})
        if unknown := sorted(set(found) - set(labels)):
            raise ValueError(f"{folder}: held-out text has labels {unknown}, training has {labels}")
        if len(labels) < 2 or (len(labels) > 2 and "f1" in metrics):
            raise ValueError(
                f"{folder}: {metrics[0]} is of two labels{' or more' * ('f1' not in metrics)}, found {labels}"
            )
    splits = [
        [Example(texts[0], float(label) if numbers else labels.index(label), *texts[1:]) for texts, label in part.rows]
        for part in parts
    ]
    if len(splits) == 2:
        return hold_out(folder.name, labels, splits[0], splits[1], metrics)
    return Dataset(folder.name, labels, splits[0], splits[1], splits[2], metrics)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


class _File(NamedTuple):
    label: str
    rows: list[tuple[Sequence[str], str]]  # texts, label


def _read(path: Path, labelled: bool = True) -> _File:
    """The texts and labels of one file; with `labelled` off, no rows where there is no column of labels."""
    if not path.exists():
        raise ValueError(f"{path.parent} has no {path.name}; a GLUE folder has train.tsv and dev.tsv")
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no TSV file: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty")
    columns: tuple[int, ...]
    heads = [cell.strip().lower() for cell in rows[0]]
    if len(heads) == 4 and heads[1] in ("0", "1"):
        columns, label, body = (3,), 1, rows
    else:
        texts = next((t for t in TEXTS if set(t) <= set(heads)), None)
        name = next((n for n in LABELS if n in heads), None)
        if name is None and not labelled:
            return _File("", [])
        if texts is None or name is None:
            wanted = "; ".join(", ".join(t) for t in TEXTS)
            raise ValueError(
                f"{path} has columns {rows[0]}; expected one of ({wanted}) and one of ({', '.join(LABELS)})"
            )
        columns, label, body = tuple(map(heads.index, texts)), heads.index(name), rows[1:]
    whole = [row for row in body if len(row) == len(heads)]
    if len(whole) < len(body):
        left_out = f"left out are {len(body) - len(whole)} of {len(body)} rows, whose columns are not {len(heads)}"
        print(f"warning: {path}: {left_out}", file=sys.stderr)
    return _File(heads[label], [([row[c] for c in columns], row[label].strip()) for row in whole])
