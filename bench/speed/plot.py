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
from ..files import replacing
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
            with replacing(path) as new:
                figure.savefig(new, bbox_inches="tight")
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


def below(axes: list[Axes], words: str) -> None:
    """Writes a line under the middle panel's axis."""
    middle = axes[len(axes) // 2]
    middle.set_xlabel(f"{middle.get_xlabel()}\n{words}")


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
    """Latency of a handful of shapes: a band for each, a panel for each mode, and in a band a line for each provider.

    The copy's time is written and not drawn, since an axis that reaches down to it has no room for the others.
    """
    names, bands = modes(rows), shapes(rows)
    lanes = [name for name in providers(rows) if name != "copy"] or ["copy"]
    size = (4.4 * len(names) + 3, (0.22 * len(lanes) + 0.3) * len(bands) + 2.2)
    figure, axes = figure_of(rows, "Latency of the adapter, by provider", (1, len(names)), size)
    for ax, mode in zip(axes, names):
        of_mode = [row for row in rows if row.mode == mode]
        for row in of_mode:
            band, ms = bands.index(row.shape), row.ms or 0.0
            if row.provider in lanes:
                y = band + 0.8 * ((lanes.index(row.provider) + 0.5) / len(lanes) - 0.5)
                ax.plot(ms, y, linestyle="", **style(row.provider))
                ax.annotate(f"{ms:.3g}", (ms, y), (7, 0), textcoords="offset points", va="center", fontsize=7.5)
            else:
                ax.annotate(f"copy {ms:.3g}", (0.01, band), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        ax.set_title(NAMES[mode], loc="left")
        ax.set(xscale="log", xlabel="ms, logarithmic")
        ax.margins(x=0.25)
        ax.set_yticks(range(len(bands)), ["×".join(map(str, s)) for s in bands] if ax is axes[0] else [])
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(len(bands) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        for edge in range(1, len(bands)):
            ax.axhline(edge - 0.5, color=STYLE["grid.color"], linewidth=1, zorder=1)
        log_axis(ax.xaxis)
    axes[0].set_ylabel("tokens × hidden × bottleneck")
    if any(row.provider == "copy" for row in rows) and lanes != ["copy"]:
        below(axes, "copy: ms of a copy of the bytes that have to be moved")
    legend(figure, lanes, lines=False)
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
    """FLOP/s reached over the FLOPs a byte that the work has, under both ceilings of the run; a column a shape.

    Shapes of one R have the same FLOPs a byte, so their columns are set side by side, which the axis says.
    """
    rows, words = few([row for row in rows if row.provider != "copy"])
    names = modes(rows)
    what = f"Roofline: FLOP/s that each provider reaches{words}"
    figure, axes = figure_of(rows, what, (1, len(names)), (4.6 * len(names) + 2, 5.8))
    bandwidth, rate = rows[0].copy_bytes_per_second or 1.0, rows[0].matmul_flops_per_second or 1.0
    ridge = rate / bandwidth
    points = [(r, (r.flops or 0) / (r.bytes or 1), (r.flops or 0) / (r.ms or 1) * 1e3) for r in rows]
    left, right = min(ridge / 10, min(p[1] for p in points) / 2), max(ridge, *(p[1] for p in points)) * 3
    lowest, top = min(p[2] for p in points), 1.6 * rate
    bottom = (lowest / top**0.3) ** (1 / 0.7)  # the lower 30% of the height are the names of the columns
    aside = False
    for ax, mode in zip(axes, names):
        ax.plot([left, ridge, right], [bandwidth * left, rate, rate], color="black", linewidth=1.6, zorder=2)
        columns: dict[float, list[tuple[int, int, int]]] = {}
        for row, intensity, _ in points:
            if row.mode == mode and row.shape not in (column := columns.setdefault(intensity, [])):
                column.append(row.shape)
        apart = min(1.4, 2.2 ** (1 / max(map(len, columns.values()))))
        aside |= max(map(len, columns.values())) > 1
        for intensity, column in columns.items():
            for place, shape in enumerate(column):
                x = intensity * apart ** (place - (len(column) - 1) / 2)
                mine = [(row, reached) for row, _, reached in points if row.mode == mode and row.shape == shape]
                ends = [bottom, max(reached for _, reached in mine)]
                ax.plot([x, x], ends, color=STYLE["grid.color"], linewidth=0.8, zorder=1)
                for row, reached in mine:
                    ax.plot(x, reached, linestyle="", alpha=0.85, **style(row.provider))
                name, box = "×".join(map(str, shape)), {"facecolor": "white", "edgecolor": "none", "pad": 1}
                along = dict(textcoords="offset points", rotation=90, ha="center", va="bottom", fontsize=8, bbox=box)
                ax.annotate(name, (x, bottom), (0, 4), **along)  # type: ignore[arg-type]
        ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
        ax.set_xlabel("FLOP per byte that must move")
        ax.annotate(f"matmul {si(rate)}FLOP/s", (right, rate), (-3, 4), textcoords="offset points", ha="right")
        above = min(rate, bandwidth * left * (right / left) ** 0.36)  # of the line, where the words end
        ax.annotate(f"copy {si(bandwidth)}B/s", (left, above), (4, 4), textcoords="offset points")
        ax.set_title(NAMES[mode], loc="left")
        ax.grid(axis="x", visible=False)
        log_axis(ax.xaxis)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    axes[0].set_ylabel("FLOP/s")
    if aside:
        below(axes, "shapes of one bottleneck have the same FLOP per byte, and stand side by side")
    legend(figure, providers(rows), lines=False)
    return figure


def si(value: float) -> str:
    """3.35e12 as "3.35 T"."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g} "
