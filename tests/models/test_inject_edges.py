"""Edges of tasks in a model: state dicts, buffers, odd names, interrupted saves and failed forwards."""

import copy
import os

import pytest
import torch
from helpers_tasks import STRONG, bert, logits, step
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from adapter_ops import (
    AdapterConfig,
    adapter_summary,
    add_adapter,
    delete_adapter,
    list_adapters,
    load_adapter,
    save_adapter,
    set_active_adapter,
    skip_layers,
    train_adapter,
)
from adapter_ops.models import files
from adapter_ops.models.layers import AdapterLayer
from adapter_ops.models.tasks import insert

pytestmark = pytest.mark.usefixtures("aten")


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_state_dict_has_the_base_under_the_bases_keys(tmp_path):
    model = bert()
    base = {k: t.clone() for k, t in model.state_dict().items()}
    add_adapter(model, "t", STRONG)
    step(model)
    expected, state = logits(model), copy.deepcopy(model.state_dict())
    assert all(torch.equal(state[k], t) for k, t in base.items())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert all(torch.equal(again.state_dict()[k], t) for k, t in base.items())
    for active in (None, "t"):
        twin = bert()
        add_adapter(twin, "t", STRONG)
        set_active_adapter(twin, active)
        twin.load_state_dict(state)
        set_active_adapter(twin, "t")
        assert torch.equal(logits(twin), expected)
        set_active_adapter(twin, None)
        assert all(torch.equal(twin.state_dict()[k], t) for k, t in base.items())


def headed():
    model = bert()
    torch.manual_seed(1)
    model.classifier = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 5))
    return model.eval()


def test_a_heads_buffers_belong_to_the_task(tmp_path):
    model = headed()
    base = {k: t.clone() for k, t in model.state_dict().items()}
    outputs = {}
    for name in ("a", "b"):
        add_adapter(model, name, STRONG)
        model.train()
        step(model)
        outputs[name] = logits(model.eval())
        save_adapter(model, tmp_path / name, name)
    set_active_adapter(model, "a")
    assert torch.equal(logits(model), outputs["a"])
    set_active_adapter(model, None)
    assert all(torch.equal(model.state_dict()[k], t) for k, t in base.items())
    fresh = headed()
    fresh.load_state_dict(base)
    load_adapter(fresh, tmp_path / "b")
    assert torch.equal(logits(fresh), outputs["b"])


def test_a_head_of_another_size_comes_with_its_labels(tmp_path):
    one = bert(num_labels=3)
    one.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    add_adapter(one, "three", STRONG)
    step(one)
    expected = logits(one)
    save_adapter(one, tmp_path, "three")
    model = bert()
    model.bert.load_state_dict(one.bert.state_dict())
    add_adapter(model, "five", STRONG)
    five = logits(model)
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)
    labels = list_adapters(model)["three"].labels
    assert labels.num_labels == 3 and labels.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert model.config.num_labels == 5 and model.classifier.out_features == 5
    set_active_adapter(model, "five")
    assert torch.equal(logits(model), five) and list_adapters(model)["five"].labels.num_labels == 5


def test_a_head_of_another_size_without_labels_is_refused_and_not_broadcast(tmp_path):
    one = bert(num_labels=1)
    one.classifier = nn.Linear(32, 2)  # which the config knows nothing of
    add_adapter(one, "two", STRONG)
    save_adapter(one, tmp_path, "two")
    model = bert()
    with pytest.raises(ValueError, match=r"shape \(2, 32\), the model has \(5, 32\)"):
        load_adapter(model, tmp_path)


def test_the_active_tasks_head_does_not_decide_what_loads(tmp_path):
    model = bert()
    add_adapter(model, "five", STRONG)
    set_active_adapter(model, None)
    model.classifier = nn.Linear(32, 3)
    add_adapter(model, "three", STRONG)
    expected = logits(model)
    save_adapter(model, tmp_path, "three")
    delete_adapter(model, "three")
    set_active_adapter(model, "five")
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)
    set_active_adapter(model, "five")
    assert logits(model).shape == (2, 5)


@pytest.mark.parametrize("name", ["train", "keys", "type", "training"])
def test_names_that_a_module_dict_has_itself(name):
    model = bert()
    with pytest.raises(ValueError, match="is taken by"):
        add_adapter(model, name)
    assert not hasattr(model, "adapter_ops") and hooks(model) == 0
    add_adapter(model, "t", STRONG)
    before = logits(model)
    with pytest.raises(ValueError, match="is taken by"):
        add_adapter(model, name)
    assert torch.equal(logits(model), before)


def test_layer_numbers_as_numbers():
    config = AdapterConfig(bottleneck={1: 7, "default": 2})
    assert config.size(1, 32) == 7 and AdapterConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "fields", [{"scale": None}, {"depth": 1.5}, {"leave_out": ("1",)}, {"ln_before": "no"}], ids=str
)
def test_wrong_types(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        AdapterConfig(**fields)


def test_a_save_cut_between_its_two_files_is_whole(tmp_path, monkeypatch):
    model = bert()
    add_adapter(model, "t", STRONG)
    save_adapter(model, tmp_path, "t")
    delete_adapter(model, "t")
    add_adapter(model, "t", AdapterConfig(bottleneck=5, init_std=0.3))
    expected, real = logits(model), os.replace

    def replace(a, b):
        if b.name == "adapter_ops.json":
            raise OSError("power")
        real(a, b)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="power"):
        save_adapter(model, tmp_path, "t")
    twin = bert()
    set_active_adapter(model, None)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter_ops" not in k})
    load_adapter(twin, tmp_path)
    assert torch.equal(logits(twin), expected)


def test_both_files_are_as_readable(tmp_path):
    model = bert()
    add_adapter(model, "t", STRONG)
    save_adapter(model, tmp_path, "t")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_the_meta_device_refuses(tmp_path):
    model = bert()
    add_adapter(model, "t", STRONG)
    save_adapter(model, tmp_path, "t")
    with pytest.raises(ValueError, match="meta device"):
        load_adapter(bert().to("meta"), tmp_path)


def test_a_forward_that_fails_leaves_a_model_that_copies():
    model = bert()
    add_adapter(model, "t", "parallel")
    dense = model.bert.encoder.layer[2].output.dense
    dense.forward = None
    with pytest.raises(TypeError):
        model(torch.arange(14).view(2, 7))
    del dense.forward
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_a_head_that_is_gone_changes_nothing():
    model = bert()
    add_adapter(model, "t", STRONG)
    step(model)
    set_active_adapter(model, None)
    head = model.classifier
    del model.classifier
    model.classifier = lambda x: x
    before = logits(model)
    with pytest.raises(ValueError, match=r"no module 'classifier' any more, of which the task 't' has its own"):
        set_active_adapter(model, "t")
    assert torch.equal(logits(model), before)
    del model.classifier
    model.classifier = head
    set_active_adapter(model, "t")


def test_a_head_that_is_replaced_does_not_run_unnoticed():
    model = bert()
    add_adapter(model, "t", STRONG)
    step(model)
    expected = logits(model)
    model.classifier = nn.Linear(32, 3)
    with pytest.raises(RuntimeError, match=r"'classifier' was replaced after the task 't' got its own"):
        logits(model)
    set_active_adapter(model, "t")
    assert torch.equal(logits(model), expected)
    set_active_adapter(model, None)
    assert logits(model).shape == (2, 3)


def two():
    model, outputs = bert(), {}
    for name in ("a", "b"):
        add_adapter(model, name, STRONG)
        step(model)
        outputs[name] = logits(model)
    return model, outputs


def test_insert_keeps_the_active_task():
    model, outputs = two()
    insert(model, "c", STRONG)
    assert torch.equal(logits(model), outputs["b"])
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".tasks.c." in n)


def test_saving_keeps_the_active_task(tmp_path):
    model, outputs = two()
    save_adapter(model, tmp_path, "a")
    assert torch.equal(logits(model), outputs["b"])
    set_active_adapter(model, "a")
    assert torch.equal(logits(model), outputs["a"])


def test_a_load_that_fails_late_changes_nothing(tmp_path, monkeypatch):
    model, outputs = two()
    save_adapter(model, tmp_path, "a")
    keys = list(model.state_dict())

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(AdapterLayer, "to_empty", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        load_adapter(model, tmp_path, "c")
    assert torch.equal(logits(model), outputs["b"]) and list(model.state_dict()) == keys


def test_dropout_is_on_what_is_added_and_in_training_only():
    layer = AdapterLayer(
        AdapterConfig(bottleneck=4, init_std=0.3, dropout=0.5), 0, 32, torch.device("cpu"), torch.float32
    )
    x, residual = torch.randn(64, 32), torch.randn(64, 32)
    added = layer.eval()(x, residual) - residual
    found = layer.train()(x, residual) - residual
    dropped = found.abs() < 1e-6
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(found[~dropped], 2 * added[~dropped], rtol=1e-4, atol=1e-5)
    plain = layer.bottlenecks[0](x, residual)
    assert torch.equal(layer.eval()(x, residual), plain)


def test_the_share_is_of_the_base_without_head_and_adapters():
    model = bert()
    base = sum(p.numel() for p in model.bert.parameters())
    add_adapter(model, "t", STRONG)
    summary = adapter_summary(model)
    assert summary.base == base and summary.tasks[0].share == summary.tasks[0].total / base


def test_norm_inside_after_depth_and_residual_by_hand():
    config = AdapterConfig(bottleneck=4, init_std=0.3, norm="layer", norm_position="before", depth=2)
    layer = AdapterLayer(config, 0, 32, torch.device("cpu"), torch.float32)
    x, residual = torch.randn(8, 32), torch.randn(8, 32)
    first = layer.bottlenecks[0](layer.norm(x), residual)
    assert torch.equal(layer(x, residual), layer.bottlenecks[1](first, first))


def test_skipping_ends_with_an_error_too():
    model, outputs = two()
    with pytest.raises(KeyError), skip_layers(model, range(3)):
        raise KeyError
    assert torch.equal(logits(model), outputs["b"])
    with skip_layers(model, [0]):
        before = logits(model)
        with skip_layers(model, [0]):
            pass
        assert torch.equal(logits(model), before)


def test_training_one_task_freezes_the_other():
    model, _ = two()
    train_adapter(model, "a")
    a = {n for n, p in model.named_parameters() if p.requires_grad}
    assert a == {f"adapter_ops.tasks.a.{n}" for n, _ in model.adapter_ops.task("a").named_parameters()}


def test_a_task_added_in_training_trains():
    model = bert().train()
    add_adapter(model, "t", STRONG)
    assert all(m.training for m in model.adapter_ops.modules() if isinstance(m, AdapterLayer))


def test_another_family_of_the_same_sizes(tmp_path):
    model = bert()
    add_adapter(model, "t", "pfeiffer", modules=())
    save_adapter(model, tmp_path, "t")
    fields = {
        k: getattr(model.config, k)
        for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    with pytest.raises(ValueError, match=r"'bert'.*'roberta'"):
        load_adapter(RobertaForSequenceClassification(RobertaConfig(**fields)), tmp_path)


def test_deleting_one_of_two_leaves_nothing_of_it():
    model, outputs = two()
    delete_adapter(model, "a")
    assert not any(".tasks.a." in k for k in model.state_dict())
    assert torch.equal(logits(model), outputs["b"])
