"""A plot a study. The title says what is shown, and the caption on what, and what marks and dots stand for."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ..files import replacing
from ..speed.plot import COLORS, STYLE
from .report import Summary, caption, grid, of_study
from .runs import Ablated, Result, cell_of

OURS, OTHER, THIRD, GREY = COLORS["adapter_ops"], COLORS["max-autotune"], COLORS["in-place"], COLORS["eager"]
KINDS = {  # of methods: color, marker, name
    "adapters": (OURS, "o", "adapters"),
    "top": (OTHER, "s", "top layers fine-tuned"),
    "full": (OTHER, "D", "full fine-tuning"),
    "norms": (THIRD, "^", "LayerNorms only"),
    "head": (GREY, "v", "head only"),
}


def draw(name: str, folder: Path, rows: Sequence[Result], ablated: Sequence[Ablated]) -> Path:
    """Draws a study from rows of one context into `folder`; returns the PNG's path."""
    with plt.rc_context(STYLE):
        words = "large marks are means, and dots single runs, over seeds"
        if name == "ablation":
            words, figure = "means over seeds", ablation(ablated)
            cells = {cell_of(row) for row in ablated}
            shown = [row for row in rows if cell_of(row) in cells]
        else:
            found = of_study(name, rows)
            kinds: dict[str, Callable[[list[Summary]], Figure]] = {"tradeoff": tradeoff, "init": init}
            figure = kinds.get(name, compared)(found)
            shown = [row for s in found for row in s.rows]
        lines = textwrap.fill(caption(shown, words), int(21 * figure.get_figwidth()))
        figure.text(0.01, 0.01, lines, fontsize=6, color=GREY)
        path = folder / f"{name}-{rows[0].task.replace('/', '-')}.png"
        with replacing(path) as new:
            figure.savefig(new, dpi=150)
        plt.close(figure)
    return path


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.36 / height, 1, 1 - 0.36 / height))  # type: ignore[union-attr,call-arg]
    return figure, axes


def percent(values: Sequence[float]) -> list[float]:
    return [100 * v for v in values]


def metric_of(found: list[Summary]) -> str:
    return f"test {found[0].rows[0].metric}"


def titled(axes: Axes, found: list[Summary], words: str) -> None:
    """A title that says what is shown: the metric, `words`, and the model and data."""
    row = found[0].rows[0]
    axes.set_title(f"{metric_of(found).capitalize()} {words}\n{row.model} on {row.task}")


def compared(found: list[Summary]) -> Figure:
    """A line a variant, best mean on top, as glue and variants have it."""
    figure, axes = canvas(7.5, 1.2 + 0.36 * len(found))
    order = sorted(found, key=lambda s: mean(s.tests))
    for y, s in enumerate(order):
        color, marker, _ = KINDS[s.variant.method]
        axes.scatter(percent(s.tests), [y] * len(s.tests), s=14, color=color, alpha=0.45, linewidths=0)
        axes.scatter(100 * mean(s.tests), y, s=60, color=color, marker=marker, zorder=3)
        note = f"{100 * mean(s.tests):.1f}   {s.rows[0].share:.2%}"
        axes.annotate(note, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)
    heads = "mean   share trained"
    axes.annotate(heads, (1.01, len(order) - 0.4), xycoords=("axes fraction", "data"), fontsize=7, color=GREY)
    axes.set_yticks(range(len(order)), [s.variant.label for s in order])
    axes.set(xlabel=f"{metric_of(found)}, %", ylim=(-0.6, len(order) - 0.2))
    titled(axes, found, "of each variant, best on top")
    return figure


def tradeoff(found: list[Summary]) -> Figure:
    """Score against trained parameters (Figure 4 of the paper)."""
    figure, axes = canvas(7.5, 4.6)
    for method, (color, marker, name) in KINDS.items():
        mine = sorted((s for s in found if s.variant.method == method), key=lambda s: s.rows[0].trained)
        if not mine:
            continue
        x = [s.rows[0].trained for s in mine]
        y = percent([mean(s.tests) for s in mine])
        for s in mine:
            axes.scatter(
                [s.rows[0].trained] * len(s.tests), percent(s.tests), s=12, color=color, alpha=0.4, linewidths=0
            )
        name += {"adapters": ", bottleneck at the mark", "top": ", number at the mark"}.get(method, "")
        axes.plot(x, y, marker=marker, color=color, label=name, markersize=6)
        for s, a, b in zip(mine, x, y):
            if method in ("adapters", "top"):
                text = axes.annotate(
                    s.variant.text.partition("=")[2],
                    (a, b),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=color,
                    zorder=6,
                )
                text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # over dots and lines
    axes.set(xscale="log", xlabel="trained parameters, head included", ylabel=f"{metric_of(found)}, %")
    titled(axes, found, "against trained parameters")
    axes.legend(frameon=False, loc="upper left")
    return figure


def init(found: list[Summary]) -> Figure:
    """Score against the standard deviation of the adapters' first weights, with its spread over seeds."""
    figure, axes = canvas(6.5, 4)
    x = [s.variant.setting.get("init_std", 1e-2) for s in found]
    y = np.array([mean(s.tests) for s in found]) * 100
    spread = np.array([s.spread for s in found]) * 100
    axes.fill_between(x, y - spread, y + spread, color=OURS, alpha=0.18, linewidth=0, label="± standard deviation")
    axes.plot(x, y, "o-", color=OURS, label="mean")
    for s, a in zip(found, x):
        axes.scatter([a] * len(s.tests), percent(s.tests), s=12, color=OURS, alpha=0.45, linewidths=0)
    axes.axvline(1e-2, color=GREY, linewidth=0.8, linestyle=":")
    along = dict(xytext=(-3, 0), textcoords="offset points", fontsize=8, color=GREY, ha="right", rotation=90)
    axes.annotate("the paper's", (1e-2, 0.02), xycoords=("data", "axes fraction"), **along)  # type: ignore[arg-type]
    axes.set(xscale="log", xlabel="σ of the adapters' weights at the start", ylabel=f"{metric_of(found)}, %")
    titled(axes, found, "against the spread of the first weights")
    axes.legend(frameon=False, loc="lower left")
    return figure


def ablation(ablated: Sequence[Ablated]) -> Figure:
    """The change of the score when the adapters of layers first … last are left out (Figure 6 of the paper)."""
    figure, axes = canvas(6.4, 5.2)
    scores, layers = grid(ablated), 1 + max(row.last for row in ablated)
    change = np.full((layers, layers), np.nan)
    for (first, last), value in scores.items():
        if first >= 0:
            change[first, last] = 100 * (value - scores[-1, -1])
    shown: Any = axes.imshow(change, cmap="viridis", vmax=max(0.0, np.nanmax(change)))
    middle = (np.nanmin(change) + max(0.0, np.nanmax(change))) / 2
    for first in range(layers):
        for last in range(first, layers):
            value = change[first, last]
            axes.text(
                last,
                first,
                f"{value:+.1f}".replace("-", "−"),
                ha="center",
                va="center",
                fontsize=8,
                color="w" if value < middle else "k",
            )
    axes.set_xticks(range(layers))
    axes.set_yticks(range(layers))
    axes.grid(visible=False)
    axes.set(xlabel="last layer without adapters", ylabel="first layer without adapters")
    row = ablated[0]
    axes.set_title(f"Test {row.metric} lost without the adapters of a span of layers\n{row.model} on {row.task}")
    figure.colorbar(shown, shrink=0.8, label=f"change of test {row.metric} from {100 * scores[-1, -1]:.1f}%, points")
    return figure
