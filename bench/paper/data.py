"""What a model is fine-tuned on: texts or pairs of texts, each with a label or a number, in three splits.

`load_data` takes the name of an embedded task, `glue/<name>`, a folder of GLUE's TSV files, or one CSV or TSV file.
"""

import csv
import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

csv.field_size_limit(2**24)


class Example(NamedTuple):
    text: str
    label: float  # the number of a label, or the number to predict
    pair: str | None = None


class Dataset(NamedTuple):
    """A task. Choices (learning rate, bottleneck) are made on `validation`; `test` is for the last figure alone."""

    name: str
    labels: list[str]  # none: a number is to be predicted
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    metrics: tuple[str, ...] = ("accuracy",)  # the first is what choices go by

    def cut(self, train: int, held_out: int) -> "Dataset":
        """The first texts of each split, for a run that only has to end."""
        few = self.validation[:held_out], self.test[:held_out]
        return self._replace(train=self.train[:train], validation=few[0], test=few[1])

    def digest(self) -> str:
        """Eight digits that are others for other texts, labels or splits."""
        return hashlib.sha256(repr(self[1:5]).encode()).hexdigest()[:8]


def score(metric: str, predicted: np.ndarray, wanted: np.ndarray) -> float:
    """accuracy, f1 (of label 1), matthews, pearson or spearman.

    0 for a correlation with predictions that are all equal, and for what a run that diverged predicts.
    """
    if not np.isfinite(predicted).all():
        return 0.0
    if metric == "accuracy":
        return float(np.mean(predicted == wanted))
    if metric in ("pearson", "spearman"):
        from scipy import stats

        constant = np.ptp(predicted) == 0 or np.ptp(wanted) == 0
        return 0.0 if constant else float(getattr(stats, f"{metric}r")(predicted, wanted).statistic)
    from sklearn import metrics

    return float({"f1": metrics.f1_score, "matthews": metrics.matthews_corrcoef}[metric](wanted, predicted))


def split(
    name: str, examples: Iterable[tuple[str, str, str | None]], test: float = 0.2, validation: float = 0.15
) -> Dataset:
    """Examples of (text, label, pair), shuffled and split the same way every time; train and test know every label.

    Raises ValueError where a label has a single example, or there are too few for a validation split.
    """
    by_label: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for text, label, pair in examples:
        by_label[label].append((text, pair))
    if small := sorted(label for label, texts in by_label.items() if len(texts) < 2):
        raise ValueError(f"labels with a single text cannot be split: {', '.join(small)}")
    labels, shuffler = sorted(by_label), random.Random(0)
    parts: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for number, label in enumerate(labels):
        texts = sorted(by_label[label], key=lambda e: (e[0], e[1] or ""))
        shuffler.shuffle(texts)
        last = max(1, round(len(texts) * test))
        middle = min(last + round(len(texts) * validation), len(texts) - 1)
        for part, few in zip(parts, (texts[middle:], texts[last:middle], texts[:last])):
            part += [Example(text, number, pair) for text, pair in few]
    if not parts[1]:
        raise ValueError(f"{name}: {sum(map(len, parts))} texts of {len(labels)} labels are too few for three splits")
    for part in parts:
        shuffler.shuffle(part)
    return Dataset(name, labels, *parts)


def load_data(name: str) -> Dataset:
    """A task by its name.

    Args:
        name: "docstrings" or "signatures", made from the standard library; "glue/cola" and the like, from the Hugging
            Face hub through `datasets`; a folder of GLUE-format TSV files; or one file of columns text and label, CSV
            or, by its ending, TSV (a header of these names may reorder them, and may name a column "pair").

    Raises:
        ValueError: nothing of that name, or a file that is not of the form (with file and row).
        RuntimeError: the hub cannot be reached.
    """
    from . import docstrings, glue

    embedded: dict[str, Callable[[], Dataset]] = {
        "docstrings": docstrings.docstrings,
        "signatures": docstrings.signatures,
    }
    if name in embedded:
        return embedded[name]()
    path = Path(name)
    if path.is_dir():
        return glue.from_folder(path.resolve())
    if path.is_file():
        return from_file(path)
    if name.startswith("glue/"):
        return glue.from_hub(name.removeprefix("glue/"))
    raise ValueError(f"no task, file or folder {name!r}; known tasks: {', '.join(embedded)}, glue/<name>")


def from_file(path: Path) -> Dataset:
    """One CSV or TSV file, split here; see `load_data`."""
    delimiter = "\t" if path.suffix in (".tsv", ".txt") else ","
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            rows = list(csv.reader(file, delimiter=delimiter))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no file of texts and labels: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty; expected rows of text and label")
    columns: dict[str, int] = {"text": 0, "label": 1}
    names = [c.strip().lower() for c in rows[0]]
    if {"text", "label"} <= set(names):
        columns = {n: names.index(n) for n in ("text", "label", "pair") if n in names}
        rows[0] = []
    for number, row in enumerate(rows, 1):
        if (row or number > 1) and (
            len(row) <= max(columns.values()) or not all(row[c].strip() for c in columns.values())
        ):
            raise ValueError(f"{path}, row {number}: expected {', '.join(columns)}, found {row}")
    text, label, pair = (columns.get(name) for name in ("text", "label", "pair"))
    examples = [(row[text], row[label], None if pair is None else row[pair]) for row in rows if row]  # type: ignore[index]
    if len({label for _, label, _ in examples}) < 2:
        raise ValueError(f"{path}: expected at least two labels in {len(examples)} rows")
    return split(path.stem, examples)
