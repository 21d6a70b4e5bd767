"""save_adapter and load_adapter: what comes back, and what a bad folder does to the model (nothing)."""

import json
import os

import pytest
import torch
from helpers_tasks import STRONG, bert, logits, step
from safetensors.torch import save_file
from torch import nn
from transformers import BertModel

from adapter_ops import (
    AdapterConfig,
    add_adapter,
    delete_adapter,
    load_adapter,
    save_adapter,
    set_active_adapter,
    train_adapter,
)
from adapter_ops.models import files

pytestmark = pytest.mark.usefixtures("aten")


@pytest.fixture
def saved(tmp_path):
    """A trained model, its outputs, and the folder of its task."""
    model = bert()
    add_adapter(model, "t", STRONG)
    step(model)
    save_adapter(model, tmp_path / "t", "t")
    return model, logits(model), tmp_path / "t"


def fresh(model):
    """A model with the same base, as it was before any task."""
    twin = bert()
    set_active_adapter(model, None)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("adapter_ops")})
    return twin


@pytest.mark.parametrize(
    "config",
    [
        STRONG,
        AdapterConfig(bottleneck={"1": 7, "default": 2}, scale="channel", norm="batch", depth=2, init_std=0.3),
        AdapterConfig(reduction_factor=4, layer_norms="frozen", placement="parallel", leave_out=(1,), init_std=0.3),
        "pfeiffer",
    ],
    ids=str,
)
def test_a_fresh_base_gives_the_same_outputs(tmp_path, config):
    model = bert()
    add_adapter(model, "t", config)
    model.train()
    step(model)
    model.eval()
    expected = logits(model)
    set_active_adapter(model, None)
    save_adapter(model, tmp_path, "t")
    twin = fresh(model)
    base = logits(twin)
    assert load_adapter(twin, tmp_path, "other") == "other"
    assert torch.equal(logits(twin), expected)
    train_adapter(twin, "other")
    step(twin)
    set_active_adapter(twin, None)
    assert torch.equal(logits(twin), base)
    assert sorted(os.listdir(tmp_path)) == ["adapter_ops.json", "adapter_ops.safetensors"]


def test_three_tasks_on_one_base(tmp_path):
    model, outputs = bert(), {}
    for name in ("a", "b", "c"):
        add_adapter(model, name, STRONG)
        step(model)
        outputs[name] = logits(model)
        save_adapter(model, tmp_path / name, name)
    twin = fresh(model)
    for name in ("c", "a", "b"):
        load_adapter(twin, tmp_path / name)
    for name, expected in outputs.items():
        set_active_adapter(twin, name)
        assert torch.equal(logits(twin), expected)


def test_without_the_head(saved):
    model, _, folder = saved
    set_active_adapter(model, None)
    bare = bert(BertModel)
    bare.load_state_dict(model.bert.state_dict())
    with pytest.raises(ValueError, match=r"the model has no modules \['classifier'\].*modules=\(\)"):
        load_adapter(bare, folder)
    load_adapter(bare, folder, modules=())
    set_active_adapter(model, "t")
    with torch.no_grad():
        assert torch.equal(bare(TOKENS := torch.arange(14).view(2, 7))[0], model.bert(TOKENS)[0])


def test_saving_again_replaces(saved):
    model, _, folder = saved
    step(model)
    save_adapter(model, folder, "t")
    expected = logits(model)
    twin = fresh(model)
    load_adapter(twin, folder)
    assert torch.equal(logits(twin), expected)


def test_an_interrupted_save_leaves_the_old_files(saved, monkeypatch):
    model, expected, folder = saved
    step(model)
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, folder, "t")
    monkeypatch.undo()
    assert sorted(os.listdir(folder)) == ["adapter_ops.json", "adapter_ops.safetensors"]
    twin = fresh(model)
    load_adapter(twin, folder)
    twin.eval()
    torch.testing.assert_close(logits(twin), expected)


def edit(change):
    """Damage that changes the header or the tensors of the weights file, which is what counts."""

    def damage(folder):
        saved = files.read(folder)
        header, tensors = change(dict(saved.header), dict(saved.tensors))
        save_file(tensors, folder / files.WEIGHTS_FILE, metadata={files.METADATA: json.dumps(header)})

    return damage


def edit_header(**changes):
    return edit(
        lambda header, tensors: (
            header | {k: (header[k] or {}) | v if isinstance(v, dict) else v for k, v in changes.items()},
            tensors,
        )
    )


def truncate(folder):
    file = folder / files.WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-100])


KEY = "adapters.encoder.layer.0.ffn.bottlenecks.0.down.weight"
DAMAGE = {
    "truncated": (truncate, ValueError, "adapter_ops.safetensors has .* bytes of weights"),
    "no weights": (
        lambda f: (f / files.WEIGHTS_FILE).unlink(),
        FileNotFoundError,
        "adapter_ops.safetensors",
    ),
    "missing key": (
        edit(lambda h, t: (h, {k: v for k, v in t.items() if k != KEY})),
        ValueError,
        f"lacks 1 of .* tensors: {KEY}",
    ),
    "surplus key": (edit(lambda h, t: (h, t | {"x": torch.ones(1)})), ValueError, "do not belong to this model: x"),
    "wrong shape": (
        edit(lambda h, t: (h, t | {KEY: torch.ones(4, 31)})),
        ValueError,
        rf"{KEY} in .* has shape \(4, 31\), the model has \(4, 32\)",
    ),
    "wrong dtype": (edit(lambda h, t: (h, t | {KEY: torch.ones(4, 32).bool()})), ValueError, "dtype 'BOOL'"),
    "other type": (edit_header(base={"model_type": "gpt2"}), ValueError, "saved from a base with .*gpt2.* this model"),
    "other config": (edit_header(config={"bottleneck": -1}), ValueError, "bottleneck is -1"),
    "unknown field": (edit_header(config={"botleneck": 1}), ValueError, "unknown fields"),
    "deep": (edit_header(config={"depth": 10**6}), ValueError, "depth is 1000000"),
    "huge": (edit_header(config={"bottleneck": 10**6}), ValueError, "lacks|has shape"),
    "taken by the container": (edit_header(name="keys"), ValueError, "taken by nn.ModuleDict"),
    "many labels": (edit_header(labels={"num_labels": 10**9}), ValueError, "has shape"),
    "no labels": (edit_header(labels={"num_labels": 0}), ValueError, "num_labels is 0"),
    "labels by name": (edit_header(labels={"id2label": {"x": "y"}}), ValueError, r"id2label has the keys \['x'\]"),
    "odd sites": (
        edit_header(sites={"mlp": {"output": "a.*", "entry": None, "norm": None}}),
        ValueError,
        "sites has keys",
    ),
    "module twice": (edit_header(modules=["classifier", "classifier"]), None, ""),
    "ours as a head": (edit_header(modules=["adapter_ops"]), ValueError, r"no modules \['adapter_ops'\]"),
    "part of a head": (edit_header(modules=["bert"]), ValueError, "'bert' contains .*attention.output.dropout"),
}


@pytest.mark.parametrize("damage, error, message", DAMAGE.values(), ids=DAMAGE)
def test_a_bad_folder_changes_nothing(saved, damage, error, message):
    model, _, folder = saved
    damage(folder)
    twin = fresh(model)
    add_adapter(twin, "mine", STRONG)
    state = {k: t.clone() for k, t in twin.state_dict().items()}
    trainable = [p.requires_grad for p in twin.parameters()]
    expected = logits(twin)
    if error is None:
        load_adapter(twin, folder)
        return
    with pytest.raises(error, match=message):
        load_adapter(twin, folder)
    found = twin.state_dict()
    assert list(found) == list(state) and all(torch.equal(found[k], t) for k, t in state.items())
    assert [p.requires_grad for p in twin.parameters()] == trainable and torch.equal(logits(twin), expected)
    bare = fresh(model)
    with pytest.raises(error, match=message):
        load_adapter(bare, folder)
    assert not hasattr(bare, "adapter_ops") and "forward" not in vars(bare)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare.modules())


@pytest.mark.parametrize("changes", [{"hidden_size": 16}, {"num_hidden_layers": 2}], ids=str)
def test_another_architecture(saved, changes):
    twin = bert(**changes)
    with pytest.raises(ValueError, match=r"was saved from a base with .*this model has"):
        load_adapter(twin, saved[2])
    assert not hasattr(twin, "adapter_ops")


def test_a_name_that_is_taken(saved):
    model, expected, folder = saved
    with pytest.raises(ValueError, match="already has an adapter 't'"):
        load_adapter(model, folder)
    assert torch.equal(logits(model), expected)
    delete_adapter(model, "t")
    load_adapter(model, folder)
    assert torch.equal(logits(model), expected)


def test_any_module(tmp_path):
    """Places given by patterns: the same patterns load again."""

    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))))

    sites = {"ffn": "1.*.0"}
    model, x = build(), torch.randn(4, 8)
    add_adapter(model, "t", STRONG, sites=sites)
    expected = model(x)
    save_adapter(model, tmp_path, "t")
    twin = build()
    load_adapter(twin, tmp_path, sites=sites)
    assert torch.equal(twin(x), expected)
