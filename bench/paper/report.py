"""What the rows of a study say: the learning rate that was chosen, means over seeds, and a Markdown table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, stdev

from ..speed.rows import row_of
from .runs import ABLATION, RUNS, Ablated, Cell, Result, Table
from .studies import FULL, HEAD, SIZES, STUDIES, Variant, study

VARIED = ("method", "setting", "learning_rate", "seed")  # within one study; all else of a Cell is its context


@dataclass(frozen=True)
class Summary:
    """A variant's runs at its learning rate, one a seed."""

    variant: Variant
    rows: tuple[Result, ...]

    @property
    def validation(self) -> float:
        return mean(row.validation for row in self.rows)

    @property
    def tests(self) -> list[float]:
        return [row.test for row in self.rows]

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 of one."""
        return stdev(self.tests) if len(self.rows) > 1 else 0.0


def context(cell: Cell) -> tuple[object, ...]:
    return tuple(getattr(cell, f.name) for f in fields(Cell) if f.name not in VARIED)


def best_rate(rows: Iterable[Result], variant: Variant, seed: int) -> float:
    """The learning rate of a variant that was best on validation, the lowest of equals; NaN where none was tried.

    It does not depend on the order of the rows, which is not the same if several processes wrote them.
    """
    wanted = variant.searched
    found = [r for r in rows if (r.method, r.setting, r.seed) == (wanted.method, wanted.text, seed)]
    return max(found, key=lambda r: (r.validation, -r.learning_rate)).learning_rate if found else math.nan


def summaries(rows: Sequence[Result], variants: Iterable[Variant]) -> list[Summary]:
    """A Summary of each variant that has runs; `rows` of one context, as they were written: the first seed searched."""
    found = []
    for variant in variants:
        rate = best_rate(rows, variant, rows[0].seed)
        mine = [r for r in rows if (r.method, r.setting, r.learning_rate) == (variant.method, variant.text, rate)]
        if mine:
            found.append(Summary(variant, tuple(mine)))
    return found


def of_study(name: str, rows: Sequence[Result]) -> list[Summary]:
    """The summaries of a study's variants, as far as there are runs, from rows of one context."""
    tops = [int(row.setting.removeprefix("layers=")) for row in rows if row.method == "top"]
    return summaries(rows, study(name, max(tops, default=1)))


def table(name: str, rows: Sequence[Result], ablated: Sequence[Ablated]) -> str:
    """The Markdown table of a study, from rows of one context."""
    if name == "ablation":
        return ablation_table(ablated)
    metric = rows[0].metric
    heads = [
        "",
        "trained parameters",
        "of the base",
        "learning rate",
        f"validation {metric}",
        "test",
        "best seed's test",
    ]
    lines = [row_of(heads), row_of(["---", *["---:"] * (len(heads) - 1)])]
    found = of_study(name, rows)
    chosen = best_size(found) if name == "glue" else None
    for s in found:
        first, best = s.rows[0], max(s.rows, key=lambda r: (r.validation, -r.seed))
        tests = f"{100 * mean(s.tests):.1f}" + (f" ± {100 * s.spread:.1f}" if len(s.rows) > 1 else "")
        figures = [f"{first.trained:,}", f"{first.share:.2%}", f"{first.learning_rate:g}"]
        label = f"**{s.variant.label}**, best on validation" if s is chosen else s.variant.label
        lines.append(row_of([label, *figures, f"{100 * s.validation:.1f}", tests, f"{100 * best.test:.1f}"]))
    return "\n".join(lines) + f"\n\n{caption([row for s in found for row in s.rows])}"


def best_size(found: Iterable[Summary]) -> Summary:
    """Of adapters with the bottlenecks of SIZES, the one that is best on validation in the mean over seeds.

    Raises ValueError where none of them has a run.
    """
    tried = [s for s in found if s.variant in SIZES.values()]
    if not tried:
        raise ValueError(f"there is no run of adapters with a bottleneck of {', '.join(map(str, SIZES))}")
    return max(tried, key=lambda s: s.validation)


def caption(rows: Sequence[Result], words: str = "mean ± standard deviation over seeds") -> str:
    """What was run, on what; `words` say what is shown of the seeds, whose numbers follow."""
    row, seeds = rows[-1], sorted({row.seed for row in rows})
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    dropout = f", dropout {row.dropout}" if row.dropout else ""
    return (
        f"{row.model}, {row.task}: {row.texts} texts, {row.epochs} epochs, batches of {row.batch}, {row.length} tokens"
        f"{dropout}, {row.dtype}; {row.device}; torch {row.torch}; commit {commits}; {row.date}. "
        f"In percent; {words} {', '.join(map(str, seeds))}."
    )


def glue(tasks: Sequence[Sequence[Result]]) -> str:
    """The paper's Table 1: a column a task, from the rows of each, the mean, and what all tasks together take.

    The best bottleneck is each task's own, by the mean of validation over seeds.
    """
    found = [{s.variant.label: s for s in of_study("glue", rows)} for rows in tasks]
    for rows, by in zip(tasks, found):
        if missing := [v.label for v in (FULL, HEAD, SIZES[64]) if v.label not in by]:
            raise ValueError(f"the task {rows[0].task!r} has no run of {', '.join(missing)}")
    lines: dict[str, list[Summary]] = {
        "full fine-tuning": [by[FULL.label] for by in found],
        "head only": [by[HEAD.label] for by in found],
        "adapters, best m": [best_size(by.values()) for by in found],
        "adapters, m = 64": [by[SIZES[64].label] for by in found],
    }
    names = [rows[0].task for rows in tasks]
    heads = ["", "parameters, all tasks", "trained a task", *names, *(["mean"] if len(names) > 1 else [])]
    text = [row_of(heads), row_of(["---", *["---:"] * (len(heads) - 1)])]
    for label, of_tasks in lines.items():
        shares = [s.rows[0].share for s in of_tasks]
        total = len(tasks) if label == "full fine-tuning" else 1 + sum(shares)
        cells = [f"{total:.2f}×", f"{mean(shares):.2%}"]
        for s in of_tasks:
            m = f" (m = {s.variant.setting['bottleneck']})" if label.endswith("best m") else ""
            cells.append(f"{100 * mean(s.tests):.1f}{m}")
        if len(names) > 1:
            cells.append(f"{100 * mean(mean(s.tests) for s in of_tasks):.1f}")
        text.append(row_of([label, *cells]))
    return "\n".join(text)


def grid(ablated: Iterable[Ablated]) -> dict[tuple[int, int], float]:
    """(first, last) → the mean over seeds of the score; (-1, -1): with every adapter."""
    found: dict[tuple[int, int], list[float]] = {}
    for row in ablated:
        found.setdefault((row.first, row.last), []).append(row.test)
    return {span: mean(values) for span, values in found.items()}


def ablation_table(ablated: Sequence[Ablated]) -> str:
    """None, each single layer, the lower half, the upper half, all."""
    scores, layers = grid(ablated), 1 + max(row.last for row in ablated)
    spans = {"none": (-1, -1)} | {f"layer {i}": (i, i) for i in range(layers)}
    if half := layers // 2:
        spans |= {f"layers 0 to {half - 1}": (0, half - 1), f"layers {half} to {layers - 1}": (half, layers - 1)}
    spans |= {"all": (0, layers - 1)}
    lines = [row_of(["adapters left out", f"test {ablated[0].metric}", "change"]), row_of(["---", "---:", "---:"])]
    for label, span in spans.items():
        change = 100 * (scores[span] - scores[-1, -1])
        lines.append(row_of([label, f"{100 * scores[span]:.1f}", f"{change:+.1f}" if label != "none" else ""]))
    seeds = len({row.seed for row in ablated})
    return "\n".join(lines) + f"\n\nIn percent, over the models of {seeds} seeds; `{ABLATION}` has every span."


def from_files(folder: Path, name: str, task: str) -> str:
    """The table of a study from its files alone; of several tasks, with commas, the one of `glue`.

    Raises ValueError for an unknown study, and where there are no runs of a task or of what the table compares, or
    runs in several contexts.
    """
    if name not in STUDIES:
        raise ValueError(f"unknown study {name!r}; known: {', '.join(STUDIES)}")
    results, ablated = Table(folder / RUNS, Result).rows, Table(folder / ABLATION, Ablated).rows
    found = []
    for each in task.split(","):
        rows = [row for row in results if row.task == each]
        contexts = {context(row) for row in rows}
        if len(contexts) != 1:
            raise ValueError(
                f"{folder / RUNS} has runs of {each!r} in {len(contexts)} contexts, expected one: {contexts}"
            )
        found.append(rows)
    if len(found) > 1:
        return glue(found)
    spans = [row for row in ablated if context(row) in contexts]
    if name == "ablation" and not spans:
        raise ValueError(f"{folder / ABLATION} has no rows of {task!r}")
    return table(name, found[0], spans)
