"""python -m bench plot F.csv: latency, speed-up over eager and roofline of one run, a PNG of each for every dtype."""

from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ..cli import Parser, input_file, output_folder
from .cases import MODES, PROVIDERS
from .rows import Row, read

# Okabe and Ito's palette, which colour-blind readers can tell apart; ours is the one that stands out.
COLORS = {
    "eager": "#767676",
    "compile": "#56b4e9",
    "max-autotune": "#0072b2",
    "in-place": "#009e73",
    "adapterhub": "#cc79a7",
    "adapter_ops": "#d55e00",
    "copy": "#000000",
}
MARKERS = dict(zip(COLORS, "osD^vPx"))
NAMES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward", "copy": "copy of the same bytes"}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "axes.titlesize": 11,
    "figure.dpi": 130,
}
MANY = 12  # shapes past this are thinned out to the largest M, where panels hold one mark a shape


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench plot", description=__doc__)
    parser.add_argument("csv", type=input_file)
    parser.add_argument("--out", type=output_folder, help="folder of the PNGs (default: the CSV's)")
    args = parser.parse_args(argv)
    with parser.refusing():
        found = read(args.csv)
    rows = [row for row in found if row.ms is not None]
    if not rows:
        parser.error(f"{args.csv} has no row with a time")
    folder = args.out or args.csv.parent
    folder.mkdir(parents=True, exist_ok=True)
    for dtype in unique(row.dtype for row in rows):
        mine = [row for row in rows if row.dtype == dtype]
        refused = any(row.dtype == dtype and row.note.startswith("wrong") for row in found)
        for kind, figure in figures(mine, refused).items():
            path = folder / f"{args.csv.stem}-{dtype}-{kind.replace('+', '-')}.png"
            figure.savefig(path, bbox_inches="tight")
            plt.close(figure)
            print(path)
    return 0


def figures(rows: list[Row], refused: bool) -> dict[str, Figure]:
    """The figures that can be drawn of one dtype: without eager there is no speed-up, of copies alone no roofline."""
    found = {}
    if any(row.speedup is not None and row.provider not in ("eager", "copy") for row in rows):
        found["speedup"] = speedup(rows, refused)
    if any(row.provider != "copy" for row in rows):
        found["roofline"] = roofline(rows)
    if max(len({row.M for row in group}) for group in by_weights(rows).values()) >= 3:
        return found | {f"latency-{mode}": curves(rows, mode) for mode in modes(rows)}
    return found | {"latency": dots(rows)}


def unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def modes(rows: list[Row]) -> list[str]:
    return [mode for mode in MODES if any(row.mode == mode for row in rows)]


def providers(rows: list[Row]) -> list[str]:
    return [name for name in PROVIDERS if any(row.provider == name for row in rows)]


def by_weights(rows: list[Row]) -> dict[tuple[int, int], list[Row]]:
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.D, row.R), []).append(row)
    return groups


def few(rows: list[Row]) -> tuple[list[Row], str]:
    """All the rows, or those with the largest M where there are many shapes; and words for a title."""
    if len(shapes(rows)) <= MANY:
        return rows, ""
    M = max(row.M for row in rows)
    return [row for row in rows if row.M == M], f", {M} tokens"


def shapes(rows: list[Row]) -> list[tuple[int, int, int]]:
    return unique(row.shape for row in rows)


def figure_of(
    rows: list[Row], what: str, grid: tuple[int, int], size: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """A figure whose title says what it shows, on which device and in which dtype; its foot, of what."""
    first = rows[0]
    kernel = "kernel time (CUDA graph)" if any(row.kernel_ms for row in rows) else "user time"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(*grid, figsize=size, squeeze=False, layout="constrained")
        figure.suptitle(f"{what}\n{first.device}, {first.dtype}", fontsize=13, fontweight="bold")
        foot = f"Median {kernel}; torch {first.torch}, triton {first.triton}, commit {first.commit}, {first.date}"
        figure.supxlabel(foot, fontsize=8, color="#555555")
    return figure, list(axes.flat)


def legend(figure: Figure, names: list[str], lines: bool = True) -> None:
    handles = [
        Line2D([], [], **style(n), linestyle=(":" if n == "copy" else "-") if lines else "", label=NAMES.get(n, n))
        for n in names
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)


def log_axis(axis: Any, unit: str = "") -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def style(name: str) -> dict[str, Any]:
    own = name == "adapter_ops"
    return {"color": COLORS[name], "marker": MARKERS[name], "zorder": 5 if own else 3, "markersize": 7 if own else 5.5}


def curves(rows: list[Row], mode: str) -> Figure:
    """Latency over M, a panel for each pair of D and R."""
    rows = [row for row in rows if row.mode == mode]
    groups = by_weights(rows)
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    what = f"Latency of the adapter, {NAMES[mode]}"
    figure, axes = figure_of(rows, what, (lines, columns), (4.2 * columns + 2, 2.9 * lines + 1))
    for ax, ((D, R), group) in zip(axes, groups.items()):
        for name in providers(group):
            points = sorted((row.M, row.ms) for row in group if row.provider == name)
            ruler = {"linestyle": ":"} if name == "copy" else {"linewidth": 2.4 if name == "adapter_ops" else 1.4}
            ax.plot(*zip(*points), **style(name), **ruler)
        ax.set_title(f"hidden {D}, bottleneck {R}", loc="left")
        ax.set(xscale="log", yscale="log", xlabel="tokens M", ylabel="ms")
        ticks = sorted({row.M for row in group})
        ax.set_xticks(ticks, [f"{M // 1024}k" if M >= 1024 else str(M) for M in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        log_axis(ax.yaxis)
    for ax in axes[len(groups) :]:
        ax.set_visible(False)
    legend(figure, providers(rows))
    return figure


def dots(rows: list[Row]) -> Figure:
    """Latency of a handful of shapes: one line of marks each, a panel for each mode."""
    names, places = modes(rows), {shape: i for i, shape in enumerate(shapes(rows))}
    size = (4.4 * len(names) + 3, 0.55 * len(places) + 2.2)
    figure, axes = figure_of(rows, "Latency of the adapter", (1, len(names)), size)
    for ax, mode in zip(axes, names):
        of_mode = [row for row in rows if row.mode == mode]
        for shape, y in places.items():
            times = [row.ms for row in of_mode if row.shape == shape and row.ms is not None]
            if times:
                ax.plot([min(times), max(times)], [y, y], color="#cccccc", linewidth=1, zorder=1)
        for name in providers(of_mode):
            points = [(row.ms, places[row.shape]) for row in of_mode if row.provider == name]
            ax.plot(*zip(*points), linestyle="", **style(name))
        ax.set_title(NAMES[mode], loc="left")
        ax.set(xscale="log", xlabel="ms, logarithmic")
        ax.set_yticks(list(places.values()), ["×".join(map(str, s)) for s in places] if ax is axes[0] else [])
        ax.set_ylim(len(places) - 0.5, -0.5)
        log_axis(ax.xaxis)
    axes[0].set_ylabel("tokens × hidden × bottleneck")
    legend(figure, providers(rows), lines=False)
    return figure


def speedup(rows: list[Row], refused: bool) -> Figure:
    """Eager's time over each provider's, a group of bars for each shape and a panel for each mode."""
    rows, words = few([row for row in rows if row.speedup is not None])
    names, places = modes(rows), shapes(rows)
    bars = [name for name in providers(rows) if name not in ("eager", "copy")]
    size = (max(7.0, 0.95 * len(places) * max(1, len(bars)) / 3 + 3.5), 2.6 * len(names) + 1.2)
    figure, axes = figure_of(rows, f"Speed-up over eager PyTorch{words}", (len(names), 1), size)
    width = 0.84 / max(1, len(bars))
    for ax, mode in zip(axes, names):
        for place, shape in enumerate(places):
            group = [r for r in rows if r.mode == mode and r.shape == shape and r.provider in bars]
            for i, row in enumerate(group):
                x = place + (i - (len(group) - 1) / 2) * width
                drawn = ax.bar(x, row.speedup or 0, width * 0.92, color=COLORS[row.provider], zorder=2)
                weight = "bold" if row.provider == "adapter_ops" else "normal"
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
                ax.bar_label(drawn, fmt="%.2f", fontsize=8, padding=2, fontweight=weight, bbox=box, zorder=4)
        ax.axhline(1, color=COLORS["eager"], linewidth=1.5, zorder=3)
        ax.set_title(NAMES[mode], loc="left")
        ax.set_ylabel("eager / provider")
        ax.set_xticks(range(len(places)), ["×".join(map(str, shape[1:] if words else shape)) for shape in places])
        ax.grid(axis="x", visible=False)
        ax.margins(x=0.02, y=0.12)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    absent = "\nno bar: refused, for an error over twice eager's" if refused else ""
    axes[-1].set_xlabel(f"{'' if words else 'tokens × '}hidden × bottleneck{absent}")
    handles = [Line2D([], [], color=COLORS[n], marker="s", linestyle="", markersize=9, label=n) for n in bars]
    handles.append(Line2D([], [], color=COLORS["eager"], linewidth=1.5, label="eager"))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    return figure


def roofline(rows: list[Row]) -> Figure:
    """FLOP/s reached over the FLOPs a byte that the work has, under both ceilings of the run."""
    rows, words = few([row for row in rows if row.provider != "copy"])
    names = modes(rows)
    figure, axes = figure_of(rows, f"Roofline{words}", (1, len(names)), (4.6 * len(names) + 2, 5.4))
    bandwidth, rate = rows[0].copy_bytes_per_second or 1.0, rows[0].matmul_flops_per_second or 1.0
    ridge, shown = rate / bandwidth, providers(rows)
    points = [(r, (r.flops or 0) / (r.bytes or 1), (r.flops or 0) / (r.ms or 1) * 1e3) for r in rows]
    left, right = min(ridge / 10, min(p[1] for p in points) / 2), max(ridge, *(p[1] for p in points)) * 3
    bottom = min(p[2] for p in points) / 3
    for ax, mode in zip(axes, names):
        ax.plot([left, ridge, right], [bandwidth * left, rate, rate], color="black", linewidth=1.6, zorder=2)
        for row, intensity, reached in points:
            if row.mode == mode:
                apart = 1.06 ** (shown.index(row.provider) - (len(shown) - 1) / 2)  # or equal ones hide each other
                ax.plot(intensity * apart, reached, linestyle="", alpha=0.85, **style(row.provider))
        for R, intensity in {row.R: x for row, x, _ in points if row.mode == mode}.items():
            ax.annotate(f"R = {R}", (intensity, bottom), (0, 4), textcoords="offset points", ha="center", fontsize=9)
        ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, rate * 2))
        ax.set_xlabel("FLOP per byte that must move")
        ax.annotate(f"matmul {si(rate)}FLOP/s", (right, rate), (-3, 4), textcoords="offset points", ha="right")
        ax.annotate(f"copy {si(bandwidth)}B/s", (left, bandwidth * left), (4, 34), textcoords="offset points")
        ax.set_title(NAMES[mode], loc="left")
        log_axis(ax.xaxis)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    axes[0].set_ylabel("FLOP/s")
    legend(figure, shown, lines=False)
    return figure


def si(value: float) -> str:
    """3.35e12 as "3.35 T"."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g} "
