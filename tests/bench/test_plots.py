"""The plots of bench: which are drawn, what they say, and that nothing hides in them."""

import dataclasses

import matplotlib.pyplot as plt
import pytest
from helpers_bench import made_up, write
from helpers_paper import a_row

from bench.paper import plots, runs, studies
from bench.speed import plot
from bench.speed.cases import MODES, PROVIDERS
from bench.speed.rows import Row

SHAPES = [(4096, 768, 64), (16384, 768, 64), (2048, 4096, 64), (4096, 768, 8)]


@pytest.mark.parametrize(
    ("shapes", "kinds"),
    [
        ([(8, 16, 4), (4, 32, 8)], {"latency", "speedup", "roofline"}),
        (
            [(4**i, D, 4) for i in range(7) for D in (16, 64)],
            {"latency-fwd", "latency-bwd", "latency-fwd-bwd", "speedup", "roofline"},
        ),
    ],
    ids=["few shapes", "many"],
)
def test_plots(shapes, kinds, tmp_path, capsys):
    plot.main([str(write(tmp_path / "f.csv", made_up(shapes))), "--out", str(tmp_path / "png")])
    pngs = {p.name: p for p in (tmp_path / "png").iterdir()}
    assert set(pngs) == {f"f-bfloat16-{kind}.png" for kind in kinds}
    assert all(p.stat().st_size > 10_000 and p.read_bytes()[:4] == b"\x89PNG" for p in pngs.values())


def test_plot_of_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plot.main([str(write(tmp_path / "f.csv", []))])
    assert "has no row with a time" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names, kinds",
    [
        (["adapter_ops"], {"latency", "roofline"}),
        (["eager", "copy"], {"latency", "roofline"}),
        (["copy"], {"latency"}),
        (["eager", "adapter_ops"], {"latency", "roofline", "speedup"}),
    ],
)
def test_plots_of_few_providers(names, kinds, tmp_path, capsys):
    """Without eager there is no speed-up to draw, and of copies alone no roofline."""
    rows = [
        Row(name, "a machine", "float32", mode, 8, 16, 4, user_ms=1.0, bytes=9, flops=9)
        for name in names
        for mode in MODES
    ]
    for row in rows:
        row.user_speedup = 1.0 if "eager" in names else None
    assert plot.main([str(write(tmp_path / "f.csv", rows))]) == 0
    assert {path.stem.rpartition("-")[2] for path in tmp_path.glob("*.png")} == kinds


def marks(axes):
    """(x, y) of every single mark."""
    return [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_no_mark_of_latency_hides_another():
    """Also where all times are equal; and the copy, which is much faster, does not take the axis for itself."""
    rows = [dataclasses.replace(row, kernel_ms=0.01 if row.provider == "copy" else 5.0) for row in made_up(SHAPES)]
    figure = plot.dots(rows)
    for axes, mode in zip(figure.axes, MODES):
        timed = [row for row in rows if row.mode == mode and row.provider != "copy"]
        assert len(marks(axes)) == len(set(marks(axes))) == len(timed)
        assert axes.get_xlim()[0] > 0.1 and texts(axes).count("copy 0.01") == len(SHAPES)
        bands = [round(y) for _, y in marks(axes)]
        assert [bands.count(band) for band in range(len(SHAPES))] == [len(timed) // len(SHAPES)] * len(SHAPES)
    assert any("copy: ms of a copy of the bytes" in axes.get_xlabel() for axes in figure.axes)
    plt.close(figure)


def test_every_shape_of_a_roofline_has_a_column_with_its_name():
    """Providers of a shape stand at one place, shapes of one bottleneck side by side, which the axis says."""
    figure = plot.roofline(list(made_up(SHAPES)))
    for axes, mode in zip(figure.axes, MODES):
        columns = {}
        for x, y in marks(axes):
            columns.setdefault(x, []).append(y)
        known = [name for name, provider in PROVIDERS.items() if mode in provider.modes]
        count = len([name for name in ("eager", "in-place", "adapter_ops") if name in known])
        assert [len(ys) for ys in columns.values()] == [count] * len(SHAPES)
        named = {text.xy[0]: text.get_text() for text in axes.texts if "×" in text.get_text()}
        assert named.keys() == columns.keys() and set(named.values()) == {"×".join(map(str, s)) for s in SHAPES}
    assert any("stand side by side" in axes.get_xlabel() for axes in figure.axes)
    plt.close(figure)
    alone = plot.roofline(list(made_up([(8, 16, 4), (8, 16, 8)])))
    assert all("side by side" not in axes.get_xlabel() for axes in alone.axes)
    plt.close(alone)


def test_plots_of_studies_say_what_they_show(tmp_path, monkeypatch):
    """The title has the metric, the model and the data; the caption speaks of what is drawn."""
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    own = dict(model="a-model", task="a-task", share=0.05, trained=1000)
    variants = {v.text: v for name in studies.STUDIES for v in studies.study(name, 2)}.values()
    rows = [dataclasses.replace(a_row(v, 1e-3, seed, 0.5, 0.5 + seed / 10), **own) for v in variants for seed in (0, 1)]
    cell = vars(runs.cell_of(next(row for row in rows if row.setting == "bottleneck=64")))
    spans = [(-1, -1, 0.8), (0, 0, 0.7), (0, 1, 0.5), (1, 1, 0.6)]
    ablated = [runs.Ablated(**cell, metric="accuracy", first=a, last=b, test=score) for a, b, score in spans]
    for name, words in {
        "glue": "Test accuracy of each variant",
        "tradeoff": "Test accuracy against trained parameters",
        "ablation": "Test accuracy lost without the adapters of a span of layers",
        "init": "Test accuracy against the spread of the first weights",
        "variants": "Test accuracy of each variant",
    }.items():
        plots.draw(name, tmp_path, rows, ablated)
        axes, *rest = figures[-1].axes
        assert axes.get_title().startswith(words) and axes.get_title().endswith("\na-model on a-task")
        caption = " ".join(figures[-1].texts[0].get_text().split())
        assert "±" not in caption, "no plot has it but init, which has it in its legend"
        if name == "ablation":
            assert rest[0].get_ylabel() == "change of test accuracy from 80.0%, points"
            assert texts(axes) == ["−10.0", "−30.0", "−20.0"] and caption.endswith("means over seeds 0.")
        else:
            assert caption.endswith("large marks are means, and dots single runs, over seeds 0, 1.")
