"""python -m bench paper: what is trained, what choices go by, what is made of the rows."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
from helpers_paper import MARKS, a_row, arguments
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, ErnieConfig, ErnieModel, GPT2Config, GPT2Model

from bench.paper import lab, report, runs, studies
from bench.paper.command import main
from bench.paper.finetune import Classifier, finetune, load_model, predict, scores, sizes, tokenise

pytestmark = MARKS


def check_runs(folder, layers, width, labels):
    """The parameters that adapters train in a BERT, and the spans that were left out. Returns the rows."""
    rows = runs.Table(folder / "runs.csv", runs.Result).rows
    found = next(row for row in rows if (row.method, row.setting) == ("adapters", "bottleneck=64"))
    adapters, norms = 2 * layers * (2 * 64 * width + 64 + width), (2 * layers + 1) * 2 * width
    assert found.trained == adapters + norms + labels * (width + 1)
    spans = runs.Table(folder / "ablation.csv", runs.Ablated).rows
    assert [(r.first, r.last) for r in spans] == [(-1, -1), *((i, j) for i in range(layers) for j in range(i, layers))]
    assert spans[0].test == found.test
    return rows


def test_every_study_end_to_end(tiny, tmp_path, capsys):
    """And nothing is run twice."""
    options = arguments(tiny, tmp_path)[1:]
    main(["all", *options])
    out = capsys.readouterr().out
    for name in studies.STUDIES:
        assert f"{name}, animals" in out
        assert (tmp_path / f"{name}-animals.png").stat().st_size > 10_000
        assert report.from_files(tmp_path, name, "animals") in out
    rows = check_runs(tmp_path, layers=2, width=16, labels=3)
    assert len({runs.cell_of(row) for row in rows}) == len(rows)
    assert {row.method for row in rows} == set(studies.RATES)

    files = {path: path.read_bytes() for path in tmp_path.glob("*.csv")}
    main(["all", *options])
    assert {path: path.read_bytes() for path in files} == files


def test_a_study_of_the_default_model_and_task(tmp_path, capsys):
    """MiniLM on docstrings."""
    main(["ablation", "--quick", "--out", str(tmp_path)])
    assert report.from_files(tmp_path, "ablation", "docstrings") in capsys.readouterr().out
    check_runs(tmp_path, layers=6, width=384, labels=12)


def test_the_recipe(tiny, monkeypatch):
    """Decay for matrices alone, warm-up over a tenth, then a straight line to nothing, gradients clipped at 1."""
    groups, rates, norms = [], [], []
    step, clip = torch.optim.AdamW.step, nn.utils.clip_grad_norm_

    def stepped(self, *args, **kwargs):
        groups[:] = self.param_groups
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    def clipped(parameters, most):
        found = list(parameters)
        norm = clip(found, most)
        norms.append((most, float(torch.stack([p.grad.norm() for p in found if p.grad is not None]).norm())))
        return norm

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clipped)
    data = lab.load_data(str(tiny / "animals.csv")).cut(80, 8)
    model, tokenizer = load_model(str(tiny), data.labels)
    studies.prepare(model, "full", {})
    finetune(model, tokenizer, tokenise(tokenizer, data).train, learning_rate=1.0, epochs=4, batch_size=4)
    assert len(rates) == 80
    expected = [i / 8 for i in range(8)] + [(80 - i) / 72 for i in range(8, 80)]
    assert rates == pytest.approx(expected)
    assert all(most == 1.0 and norm <= 1.0001 for most, norm in norms)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert decay[id(p)] == (0.0 if "LayerNorm" in name or name.endswith("bias") else 0.01), name


@pytest.mark.parametrize(
    "method, setting, wanted",
    [
        ("full", {}, r"(encoder\.(embeddings|encoder)|classifier)\..*"),
        ("head", {}, r"classifier\..*"),
        ("norms", {}, r".*LayerNorm.*|classifier\..*"),
        ("top", {"layers": 1}, r"(encoder\.encoder\.layer\.1|classifier)\..*"),
        ("adapters", {"bottleneck": 4}, r"adapter_ops\..*"),
        (
            "adapters",
            {"bottleneck": 4, "layer_norms": "frozen", "placement": ["ffn"]},
            r".*(\+ffn|copies\.classifier)\..*",
        ),
    ],
)
def test_what_a_method_trains(tiny, method, setting, wanted):
    """Adapters train a copy of the head, and of the LayerNorms."""
    model, _ = load_model(str(tiny), ["a", "b"])
    studies.prepare(model, method, setting)
    for name, p in model.named_parameters():
        assert p.requires_grad == bool(re.fullmatch(wanted, name)), name
    trained, share = sizes(model)
    base = sum(p.numel() for p in model.encoder.parameters())
    assert share == trained / base and trained >= 34 and (trained == 34) == (method == "head")


def test_choices_go_by_validation():
    """The rate by the first seed's, the bottleneck by the mean's; what did better on test is not taken."""
    small, large = studies.SIZES[8], studies.SIZES[64]
    rows = [
        a_row(small, 1e-3, 0, 0.8, 0.1),
        a_row(small, 3e-3, 0, 0.7, 0.9),
        a_row(large, 1e-3, 0, 0.5, 0.9),
        a_row(large, 3e-3, 0, 0.6, 0.6),
        a_row(small, 1e-3, 1, 0.6, 0.3),
        a_row(large, 3e-3, 1, 0.9, 0.4),
        a_row(studies.of_size(16), 1e-3, 1, 0.9, 0.4),
    ]
    found = report.summaries(rows, [small, large, studies.of_size(16)])
    assert [s.rows[0].learning_rate for s in found] == [1e-3, 3e-3, 1e-3]
    assert [s.tests for s in found] == [[0.1, 0.3], [0.6, 0.4], [0.4]]
    text = report.table("glue", rows, [])
    assert "| **adapters, m = 64**, best on validation | 0 | 0.00% | 0.003 | 75.0 | 50.0 ± 14.1 | 40.0 |" in text


def test_seeds_can_be_added(tiny, tmp_path, monkeypatch):
    """The first seed's search stands; what it found best is not searched again, whatever later seeds would prefer."""
    asked = []

    def train(self, variant, cell):
        asked.append((variant.label, cell.learning_rate, cell.seed))
        score = -abs(cell.learning_rate - (1e-3 if cell.seed == 0 else 3e-4))
        self.write(self.results, [dataclasses.replace(a_row(variant, 0.0, 0, score, score), **vars(cell))])

    monkeypatch.setattr(lab.Lab, "train", train)
    options = lab.Options(str(tiny), str(tiny / "animals.csv"), (0, 1), tmp_path)
    small, tanh = studies.SIZES[8], studies.adapters("tanh", studies.SIZES[8], activation="tanh")
    lab.Lab(options, {}).run([small, tanh])
    name = small.label
    assert asked == [
        *((name, rate, 0) for rate in studies.RATES["adapters"]),
        (name, 1e-3, 1),
        ("tanh", 1e-3, 0),
        ("tanh", 1e-3, 1),
    ]
    asked.clear()
    later = lab.Lab(dataclasses.replace(options, seeds=(3, 0, 4)), {})
    later.run([small, tanh])
    assert asked == [(name, 1e-3, 3), (name, 1e-3, 4), ("tanh", 1e-3, 3), ("tanh", 1e-3, 4)]
    assert [len(s.rows) for s in report.summaries(later.rows(), [small, tanh])] == [4, 4]
    other = lab.Lab(dataclasses.replace(options, epochs=4), {})
    assert other.rows() == [] and len(other.results.rows) == len(later.rows())


def test_the_table_of_several_tasks():
    """The best bottleneck is each task's own, and every task of full fine-tuning is a model of its own."""

    def rows(task, best):
        found = []
        for variant in studies.study("glue", 2):
            score = 0.9 if variant is studies.SIZES[best] else 0.7
            found.append(dataclasses.replace(a_row(variant, 1e-3, 0, score, 1.4 - score), task=task, share=0.05))
        return found

    lines = report.glue([rows("one", 8), rows("two", 256)]).splitlines()
    assert lines[0] == "|  | parameters, all tasks | trained a task | one | two | mean |"
    assert lines[2] == "| full fine-tuning | 2.00× | 5.00% | 70.0 | 70.0 | 70.0 |"
    assert lines[4] == "| adapters, best m | 1.10× | 5.00% | 50.0 (m = 8) | 50.0 (m = 256) | 50.0 |"
    assert lines[5] == "| adapters, m = 64 | 1.10× | 5.00% | 70.0 | 70.0 | 70.0 |"


def test_pairs_and_numbers_to_predict(tiny, tmp_path, capsys):
    """Every variant of a study on a folder of GLUE's files; what is learnt is the number, up to scale."""
    folder = tmp_path / "STS-B"
    folder.mkdir()
    words = ["no", "few", "some", "many"]
    for name, count in (("train", 60), ("dev", 20)):
        lines = [f"it is {words[i % 4]}\tof {i}\t{i % 4 + 0.5}\n" for i in range(count)]
        (folder / f"{name}.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(lines))
    arguments = ["--quick", "--model", str(tiny), "--task", str(folder), "--out", str(tmp_path)]
    main(["variants", *arguments])
    rows = runs.Table(tmp_path / "runs.csv", runs.Result).rows
    assert len(rows) == 10 and all(row.metric == "spearman" and "pearson=" in row.others for row in rows)
    assert "validation spearman" in capsys.readouterr().out

    data = lab.load_data(str(folder))
    model, tokenizer = load_model(str(tiny), data.labels)
    studies.prepare(model, "adapters", {"bottleneck": 8})
    texts = tokenise(tokenizer, data)
    finetune(model, tokenizer, texts.train, learning_rate=3e-2, epochs=20, batch_size=8, numbers=True)
    assert scores(predict(model, tokenizer, texts.test), texts.test, ("spearman",))["spearman"] > 0.9


def test_models_are_loaded_to_be_trained(tiny, tmp_path):
    """In fp32 whatever the checkpoint's dtype, with a token to pad with, and every dropout at the rate asked for."""
    model, tokenizer = load_model(str(tiny), ["a", "b"])
    model.encoder.half().save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    again, _ = load_model(str(tmp_path / "half"), ["a", "b"], dropout=0.25)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert {m.p for m in again.modules() if isinstance(m, nn.Dropout)} == {0.25}
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=tokenizer.vocab_size)
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.save_pretrained(tmp_path / "gpt2")
    data = lab.load_data(str(tiny / "animals.csv")).cut(16, 8)
    model, tokenizer = load_model(str(tmp_path / "gpt2"), data.labels, dropout=0.0)
    assert tokenizer.pad_token == "[SEP]" and model.config.attn_pdrop == 0.0 and not model.config.use_cache
    studies.prepare(model, "adapters", {"bottleneck": 4})
    finetune(model, tokenizer, tokenise(tokenizer, data).train, learning_rate=1e-3, epochs=1)


def test_what_cannot_work_is_said_before_any_work(tiny, tmp_path, capsys):
    thin = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ErnieModel(ErnieConfig(**thin)).save_pretrained(tmp_path / "ernie")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "ernie")
    capsys.readouterr()  # bars of progress
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path / "ernie", tmp_path, "--task", str(tiny / "animals.csv")))
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "model type 'ernie'" in err and err.count("\n") == 1
    assert not (tmp_path / "runs.csv").exists()
    with pytest.raises(ValueError, match=r"runs.csv has runs of 'docstrings' in 0 contexts, expected one"):
        report.from_files(tmp_path, "glue", "docstrings")


def test_ablation_leaves_out_what_it_says(tiny, tmp_path, monkeypatch):
    """As if the adapters of those layers added nothing: their last weights and biases zero."""
    bench = lab.Lab(lab.Options(str(tiny), str(tiny / "animals.csv"), (0,), tmp_path, dtype="fp32"), {})
    model, tokenizer = load_model(str(tiny), bench.data.labels, dropout=0.0)
    nn.init.normal_(model.classifier.weight)
    studies.prepare(model, "adapters", {"bottleneck": 4, "init_std": 1.0})
    found = []
    monkeypatch.setattr(bench, "score", lambda m, part: found.append(outputs(m)) or {"accuracy": 0.0})

    def outputs(m):
        return predict(m, tokenizer, bench.texts.test)

    bench.ablate(model, bench.cell(studies.SIZES[64], 1e-3, 0))
    rows = runs.Table(tmp_path / "ablation.csv", runs.Ablated).rows
    assert [(row.first, row.last) for row in rows] == [(-1, -1), (0, 0), (0, 1), (1, 1)]
    for row, values in zip(rows, found):
        whole = copy.deepcopy(model)
        for name, p in whole.named_parameters():
            layer = re.fullmatch(r"adapter_ops\..*\+layer\+(\d)\+.*\.up\.(weight|bias)", name)
            if layer and row.first <= int(layer[1]) <= row.last:
                nn.init.zeros_(p)
        np.testing.assert_allclose(values, outputs(whole), rtol=1e-4, atol=1e-5)
    assert all(np.abs(values - found[0]).max() > 1e-3 for values in found[1:])


def test_files(tmp_path):
    """A line that was cut short is no row; a file of other columns is left alone."""
    path = tmp_path / "runs.csv"
    table = runs.Table(path, runs.Result)
    row = a_row(studies.FULL, 3e-5, 0, 0.5, 1 / 3)
    table.add([row])
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:40])
    again = runs.Table(path, runs.Result)
    assert again.rows == [row]
    again.add([dataclasses.replace(row, seed=1)])
    assert [r.seed for r in runs.Table(path, runs.Result).rows] == [0, 1]
    with pytest.raises(ValueError, match=r"has columns \['model'.*expected \['model'"):
        runs.Table(path, runs.Ablated)


def test_studies_follow_the_model():
    labels = [v.label for v in studies.study("tradeoff", 12)]
    assert [label for label in labels if label.startswith("top")] == [
        "top layer",
        "top 2 layers",
        "top 4 layers",
        "top 8 layers",
        "top 12 layers",
    ]
    assert studies.of_size(2).searched is studies.SIZES[8] and studies.of_size(128).searched is studies.SIZES[64]
    assert [v.setting.get("init_std", 1e-2) for v in studies.study("init", 6)] == pytest.approx(
        [10.0**e for e in range(-7, 1)]
    )
    model = Classifier(BertModel(BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)), 2)
    assert studies.stack(model) == list(model.encoder.encoder.layer)
