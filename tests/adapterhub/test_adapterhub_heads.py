"""AdapterHub's head files, without its package: what is read, written and refused."""

import json
import os
from pathlib import Path

import huggingface_hub.constants as constants
import pytest
import torch
from helpers_distributed import Pair, shard
from helpers_hub import cached, contents
from hub_helpers import HEAD_FILES, IDS, bert, change_head, change_head_weights, classifier, logits, randomise

from adapter_ops import save_adapter
from adapter_ops.integrations.adapterhub import files, load_adapterhub, save_adapterhub
from adapter_ops.models.tasks import add_adapter, list_adapters

transformers = pytest.importorskip("transformers")


def test_the_head_comes_along(saved, tmp_path):
    model, folder = saved
    assert {path.name for path in folder.iterdir()} == HEAD_FILES | {"adapter_config.json", "pytorch_adapter.bin"}
    for ours in (classifier(3), classifier(5), torch.compile(classifier())):
        add_adapter(ours, "other", "pfeiffer")
        load_adapterhub(ours, folder, "new")
        ours = getattr(ours, "_orig_mod", ours)
        assert torch.equal(logits(ours), logits(model))
        info = list_adapters(ours)["new"]
        assert info.modules == ("classifier",) and info.labels == (3, {0: "x", 1: "y", 2: "z"}, None)
        trained = [name for name, p in ours.named_parameters() if p.requires_grad]
        assert len(trained) == 14 and all(".new." in name for name in trained)
    save_adapter(ours, tmp_path / "ours", "new")  # and goes into our own format
    save_adapterhub(ours, tmp_path / "b", "new")
    again = classifier()
    load_adapterhub(again, tmp_path / "b")
    assert torch.equal(logits(again), logits(model))


def test_dtypes_and_the_base_stay(saved):
    folder = saved[1]
    ours = classifier().to(torch.bfloat16)
    before = {n: p.clone() for n, p in ours.named_parameters()}
    load_adapterhub(ours, folder)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters() if n in before)
    task = ours.adapter_ops.tasks["a"].copy_at["classifier"]
    assert torch.equal(task.weight, torch.load(folder / "pytorch_model_head.bin")["classifier.weight"].bfloat16())


def test_a_bare_base_takes_the_adapter_alone(saved, recwarn):
    model, folder = saved
    ours = bert()
    load_adapterhub(ours, folder)
    (warning,) = [w for w in recwarn if issubclass(w.category, UserWarning)]
    assert "has a head of class BertForSequenceClassification, and the model, a BertModel, has none" in str(
        warning.message
    )
    assert warning.filename == __file__ and list_adapters(ours)["a"].labels is None
    assert torch.equal(ours(IDS)[0], model.bert(IDS)[0]) or torch.allclose(ours(IDS)[0], model.bert(IDS)[0])
    recwarn.clear()
    load_adapterhub(bert(), folder, with_head=False)
    assert not recwarn


def test_a_flexible_head_is_converted(flexible, tmp_path):
    """BERT's pooler with the head's own weights is AdapterHub's first layer. It goes back as what it was."""
    model = classifier()
    load_adapterhub(model, flexible)
    assert list_adapters(model)["a"].modules == ("bert.pooler.dense", "classifier")
    tensors = torch.load(flexible / "pytorch_model_head.bin")
    x = model.bert(IDS)[0][:, 0]
    hidden = torch.tanh(x @ tensors["heads.a.1.weight"].T + tensors["heads.a.1.bias"])
    expected = hidden @ tensors["heads.a.4.weight"].T + tensors["heads.a.4.bias"]
    torch.testing.assert_close(logits(model), expected)
    save_adapterhub(model, tmp_path / "b", "a")
    back = torch.load(tmp_path / "b" / "pytorch_model_head.bin")
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], t) for key, t in tensors.items())
    info = json.loads((tmp_path / "b" / "head_config.json").read_text())
    assert info["model_class"] == "BertAdapterModel" and info["name"] == "a"
    assert info["config"].items() >= json.loads((flexible / "head_config.json").read_text())["config"].items()


def test_what_the_base_has_too_may_stand_in_the_file(saved):
    """As AdapterHub's own files of language models have it."""
    model, folder = saved
    ours = classifier()
    change_head_weights(folder, bert__pooler__dense__bias=ours.bert.pooler.dense.bias.detach())
    load_adapterhub(ours, folder)
    assert torch.equal(logits(ours), logits(model))


def test_labels_that_name_something_else(saved):
    for ids in ({"x": 0, "y": 1}, {"x": 0, "y": 1, "z": 3}, {"x": 0, "y": 1, "z": 1}, {"x": -1, "y": 0, "z": 1}):
        change_head(saved[1], label2id=ids)
        model = classifier()
        with pytest.warns(UserWarning, match="does not name the 3 outputs") as record:
            load_adapterhub(model, saved[1])
        assert record[0].filename == __file__
        assert list_adapters(model)["a"].labels == (3, None, None)
        assert torch.equal(logits(model), logits(saved[0]))


def test_a_save_replaces_adapter_and_head_together(saved, monkeypatch):
    """Another save takes place before every step of a read in turn: both are of the same one. No step is repeated."""
    model, folder = saved
    states = []
    for value in (0.25, 0.5):
        for parameter in model.adapter_ops.parameters():
            torch.nn.init.constant_(parameter, value)
        save_adapterhub(model, folder, "a")
        states.append(contents(folder))
    real_stat, real_read, steps, read = os.stat, Path.read_bytes, 0, []

    def after_a_save(real, point):
        def step(path, *args, **kwargs):
            nonlocal steps
            if isinstance(path, Path) and path.parent == folder:
                steps += 1
                read.append((real.__name__, path.name))
                if steps == point:
                    with monkeypatch.context() as patch:
                        patch.setattr(os, "stat", real_stat)
                        patch.setattr(Path, "read_bytes", real_read)
                        files._replace(folder, states[1])
            return real(path, *args, **kwargs)

        return step

    for point in range(16):
        files._replace(folder, states[0])
        fresh, steps = classifier(), 0
        read.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", after_a_save(real_stat, point))
            patch.setattr(Path, "read_bytes", after_a_save(real_read, point))
            load_adapterhub(fresh, folder)
        values = {p.flatten()[0].item() for p in fresh.parameters() if p.requires_grad}
        assert len(values) == 1, point
        if point == 0:
            assert sorted(name for what, name in read if what == "read_bytes") == sorted(states[0])


def test_a_folder_with_a_head_is_replaced(saved):
    """Also by an adapter without one: the folder is that of the task that was saved last."""
    _, folder = saved
    model = bert()
    add_adapter(model, "b", "pfeiffer", modules=())
    save_adapterhub(model, folder, "b")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "pytorch_adapter.bin"}
    for name in HEAD_FILES:  # a head alone is no adapter
        (folder.parent / "c").mkdir(exist_ok=True)
        (folder.parent / "c" / name).touch()
    with pytest.raises(FileExistsError, match=r"head.*but no adapter of AdapterHub"):
        save_adapterhub(model, folder.parent / "c", "b")


def test_a_save_that_fails_leaves_the_head(saved, monkeypatch):
    model, folder = saved
    before = contents(folder)

    def full(*args):
        raise OSError("disk full")

    randomise(model, "adapter_ops")
    for module, name in ((os, "fsync"), (os, "replace"), (torch, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="disk full"):
                save_adapterhub(model, folder, "a")
        assert contents(folder) == before
    model.adapter_ops.tasks["a"].copies.classifier.to("meta")
    with pytest.raises(ValueError, match="2 of the adapter's tensors are on the meta device"):
        save_adapterhub(model, folder, "a")
    assert contents(folder) == before


def test_a_task_with_a_part_of_the_head(tmp_path):
    """AdapterHub's files have all of it, so the rest comes from the base."""
    model, fresh = (classifier(3, "DebertaV2ForSequenceClassification", pooler_hidden_size=32) for _ in range(2))
    torch.nn.init.normal_(model.pooler.dense.weight)
    add_adapter(model, "a", "pfeiffer", modules="classifier")
    randomise(model, "adapter_ops")
    save_adapterhub(model, tmp_path / "a", "a")
    load_adapterhub(fresh, tmp_path / "a")
    assert list_adapters(fresh)["a"].modules == ("pooler", "classifier")
    assert torch.equal(logits(fresh), logits(model))


def test_a_repository_on_the_hub(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, folder = saved
    commit = cached(tmp_path / "cache", "user/name", contents(folder))
    for name, revision in (("a", None), ("b", commit)):
        ours = classifier()
        load_adapterhub(ours, "user/name", name, revision=revision)
        assert torch.equal(logits(ours), logits(model))
    for arguments, match in (
        (dict(folder="user/none"), "there is no folder 'user/none', and 'user/none' is not in the cache"),
        (dict(folder="user/name", revision="v1"), "'user/name' at the revision 'v1' is not in the cache"),
    ):
        with pytest.raises(FileNotFoundError, match=match):
            load_adapterhub(classifier(), **arguments)
    with pytest.raises(ValueError, match="local path and no hub id"):
        load_adapterhub(classifier(), folder, revision="v1")


def _sharded(folder):
    alone = classifier(3)
    add_adapter(alone, "a", "pfeiffer")
    torch.manual_seed(1)
    randomise(alone, "adapter_ops")
    save_adapterhub(alone, f"{folder}/alone{os.getpid()}", "a")
    alone.layers = alone.bert.encoder.layer
    shared = shard(alone)
    save_adapterhub(shared, f"{folder}/shared", "a")
    one, two = (torch.load(f"{folder}/{n}/pytorch_model_head.bin") for n in (f"alone{os.getpid()}", "shared"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    fresh = classifier(3)
    fresh.layers = fresh.bert.encoder.layer
    fresh = shard(fresh)
    load_adapterhub(fresh, f"{folder}/shared")
    torch.testing.assert_close(logits(fresh), logits(shared))


def test_sharded_models(tmp_path):
    pair = Pair(tmp_path)
    try:
        pair(_sharded, str(tmp_path))
    finally:
        pair.kill()
