"""What the rows of a study say: the learning rate that was chosen, means over seeds, and a Markdown table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, stdev

from ..table import row_of
from .runs import ABLATION, RUNS, Ablated, Cell, Result, Table
from .studies import SIZES, Variant, study

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


def best_rate(rows: Iterable[Result], variant: Variant, seed: int) -> float | None:
    """The learning rate of a variant that was best on validation; the first of equals."""
    wanted = variant.searched
    found = [r for r in rows if (r.method, r.setting, r.seed) == (wanted.method, wanted.text, seed)]
    return max(found, key=lambda r: r.validation).learning_rate if found else None


def summaries(rows: Sequence[Result], variants: Iterable[Variant]) -> list[Summary]:
    """A Summary of each variant that has runs; `rows` of one context, as they were written: the first seed searched."""
    found = []
    for variant in variants:
        rate = best_rate(rows, variant, rows[0].seed)
        mine = [r for r in rows if (r.method, r.setting, r.learning_rate) == (variant.method, variant.text, rate)]
        if mine:
            found.append(Summary(variant, tuple(mine)))
    return found


def table(name: str, rows: Sequence[Result], ablated: Sequence[Ablated], layers: int) -> str:
    """The Markdown table of a study, from rows of one context."""
    if name == "ablation":
        return ablation_table(ablated, layers)
    found = summaries(rows, study(name, layers))
    metric = rows[0].metric
    heads = [
        "",
        "trained parameters",
        "of the base",
        "learning rate",
        f"validation {metric}",
        "test",
        "test of the best seed",
    ]
    lines = [row_of(heads), row_of(["---", *["---:"] * (len(heads) - 1)])]
    for s in found:
        first, best = s.rows[0], max(s.rows, key=lambda r: r.validation)
        tests = f"{100 * mean(s.tests):.1f}" + (f" ± {100 * s.spread:.1f}" if len(s.rows) > 1 else "")
        figures = [f"{first.trained:,}", f"{first.share:.2%}", f"{first.learning_rate:g}"]
        lines.append(row_of([s.variant.label, *figures, f"{100 * s.validation:.1f}", tests, f"{100 * best.test:.1f}"]))
    text = "\n".join(lines)
    sizes = [s for s in found if s.variant in SIZES.values()]
    if name == "glue" and sizes:
        text += f"\n\nBest on validation: {max(sizes, key=lambda s: s.validation).variant.label}."
    seeds = sorted({r.seed for s in found for r in s.rows})
    return (
        f"{text}\n\n{caption(rows[0])} Mean ± standard deviation over seeds {', '.join(map(str, seeds))}, in percent."
    )


def caption(row: Result) -> str:
    dropout = f", dropout {row.dropout}" if row.dropout else ""
    return (
        f"{row.model}, {row.task}: {row.texts} texts, {row.epochs} epochs, batches of {row.batch}, {row.length} tokens"
        f"{dropout}, {row.dtype}; {row.device}; torch {row.torch}; commit {row.commit}; {row.date}."
    )


def grid(ablated: Iterable[Ablated]) -> dict[tuple[int, int], float]:
    """(first, last) → the mean over seeds of the score; (-1, -1): with every adapter."""
    found: dict[tuple[int, int], list[float]] = {}
    for row in ablated:
        found.setdefault((row.first, row.last), []).append(row.test)
    return {span: mean(values) for span, values in found.items()}


def ablation_table(ablated: Sequence[Ablated], layers: int) -> str:
    """None, each single layer, the lower half, the upper half, all."""
    scores, half = grid(ablated), layers // 2
    spans = {"none": (-1, -1)} | {f"layer {i}": (i, i) for i in range(layers)}
    spans |= {f"layers 0 to {half - 1}": (0, half - 1), f"layers {half} to {layers - 1}": (half, layers - 1)}
    spans |= {"all": (0, layers - 1)}
    lines = [row_of(["adapters left out", f"test {ablated[0].metric}", "change"]), row_of(["---", "---:", "---:"])]
    for label, span in spans.items():
        change = 100 * (scores[span] - scores[-1, -1])
        lines.append(row_of([label, f"{100 * scores[span]:.1f}", f"{change:+.1f}" if label != "none" else ""]))
    seeds = len({row.seed for row in ablated})
    return "\n".join(lines) + f"\n\nMean over {seeds} trained models, in percent; `{ABLATION}` has every span."


def from_files(folder: Path, name: str, task: str) -> str:
    """The table of a study from its files alone. Raises ValueError where they hold no runs, or several contexts."""
    results, ablated = Table(folder / RUNS, Result), Table(folder / ABLATION, Ablated)
    rows = [row for row in results.rows if row.task == task]
    contexts = {context(row) for row in rows}
    if len(contexts) != 1:
        raise ValueError(f"{folder / RUNS} has runs of {task!r} in {len(contexts)} contexts, expected one: {contexts}")
    mine = [row for row in ablated.rows if context(row) in contexts]
    layers = 1 + max((row.last for row in mine), default=0)
    return table(name, rows, mine, layers)
