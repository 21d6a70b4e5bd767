"""Files and states of tasks: what a load takes and trains, onto which base, and the usual ways to save by hand."""

import copy
import io
import warnings

import pytest
import torch
import transformers as hf
from helpers_tasks import STRONG, TOKENS, Top, bert, copy_of, logits, shake, step
from torch import nn

from adapter_ops import (
    add_adapter,
    delete_adapter,
    list_adapters,
    load_adapter,
    load_task_state_dict,
    save_adapter,
    set_active_adapter,
    task_state_dict,
    train_adapter,
)

pytestmark = pytest.mark.usefixtures("aten")


# What trains after a load, which modules are taken, and onto which base


def test_a_loaded_task_trains_and_nothing_else(tmp_path):
    model = bert()
    add_adapter(model, "t", STRONG)
    save_adapter(model, tmp_path, "t")
    fresh = bert()
    load_adapter(fresh, tmp_path, "u")
    trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {f"adapter_ops.tasks.u.{n}" for n, _ in fresh.adapter_ops.task("u").named_parameters()}


def distilbert(**fields):
    """The same base every time."""
    torch.manual_seed(0)
    config = hf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=50, **fields)
    return hf.DistilBertForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    "modules, taken",
    [
        ("classifier", ("classifier",)),
        (["pre_classifier", "classifier"], ("pre_classifier", "classifier")),
        ((m for m in ["pre_classifier", "classifier"]), ("pre_classifier", "classifier")),
        ((), ()),
        (["classifer"], None),
        ("head", None),
    ],
    ids=["name", "list", "generator", "none", "misspelt", "unknown"],
)
def test_which_modules_a_load_takes(tmp_path, modules, taken):
    model = distilbert()
    add_adapter(model, "t")
    save_adapter(model, tmp_path, "t")
    fresh = distilbert()
    if taken is None:
        with pytest.raises(ValueError, match=r"has no modules .*; it has: pre_classifier, classifier"):
            load_adapter(fresh, tmp_path, modules=modules)
        assert list_adapters(fresh) == {}
    else:
        load_adapter(fresh, tmp_path, modules=modules)
        assert list_adapters(fresh)["t"].modules == taken


def test_another_base_of_the_same_shape(tmp_path):
    model = bert()
    add_adapter(model, "t", STRONG)
    save_adapter(model, tmp_path, "t")
    same, other = bert(), bert()
    same.bert.load_state_dict({k: t for k, t in model.bert.state_dict().items() if "adapter_ops" not in k})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(same, tmp_path, strict=True)
    with pytest.raises(ValueError, match="trained on a base with other weights"):
        load_adapter(other, tmp_path, strict=True)
    assert not hasattr(other, "adapter_ops")
    with pytest.warns(UserWarning, match=r"trained on a base with other weights.*strict=True"):
        load_adapter(other, tmp_path)


def test_values_that_are_not_finite(tmp_path):
    model = bert()
    add_adapter(model, "t", STRONG)
    with torch.no_grad():
        model.adapter_ops.task("t").copy_at["classifier"].bias[1] = float("nan")
    save_adapter(model, tmp_path, "t")
    base = {k: t for k, t in model.bert.state_dict().items() if "adapter_ops" not in k}
    fresh = bert()
    fresh.bert.load_state_dict(base)
    with pytest.raises(ValueError, match=r"modules\.classifier\.bias \(1 NaN"):
        load_adapter(fresh, tmp_path, check_finite=True)
    assert not hasattr(fresh, "adapter_ops")
    load_adapter(fresh, tmp_path)


def test_a_module_outside_of_the_base_with_the_path_of_one_inside(tmp_path):
    """Both the wrapper and its base have a `pooler`, of the same shape."""
    encoder = bert(hf.BertModel)
    model = Top("pooler", encoder, copy.deepcopy(encoder.pooler))
    model.forward = lambda x: model.pooler(model.encoder(x)[0])
    base = copy.deepcopy(model.state_dict())
    for modules in (None, ["pooler", "encoder.pooler"]):
        add_adapter(model, "t", STRONG, modules=modules)
        shake(model)
        expected = (logits(model), model.encoder(TOKENS)[1])
        assert len(task_state_dict(model, "t")) == len(model.adapter_ops.task("t").state_dict())
        save_adapter(model, tmp_path, "t")
        delete_adapter(model, "t")
        load_adapter(model, tmp_path)
        assert all(map(torch.equal, expected, (logits(model), model.encoder(TOKENS)[1])))
        delete_adapter(model, "t")
        assert all(torch.equal(model.state_dict()[k], t) for k, t in base.items())
    bare = bert(hf.BertModel)
    bare.load_state_dict(encoder.state_dict())
    with pytest.raises(ValueError, match=r"the model has no modules .*'\+pooler'"):
        load_adapter(bare, tmp_path)


@pytest.mark.parametrize("labels", [5, 32])
def test_as_many_classes_as_another_layer_has_outputs(labels, tmp_path):
    """pre_classifier has 32 outputs in both models."""
    one, two = distilbert(num_labels=3), distilbert(num_labels=labels)
    add_adapter(one, "t", STRONG)
    shake(one)
    save_adapter(one, tmp_path, "t")
    load_adapter(two, tmp_path)
    assert torch.equal(logits(two), logits(one)) and list_adapters(two)["t"].labels.num_labels == 3


def test_an_offloaded_head_takes_the_labels_of_a_file(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    one, two = bert(num_labels=3), bert()
    two.bert.load_state_dict(one.bert.state_dict())
    add_adapter(one, "t", STRONG)
    shake(one)
    save_adapter(one, tmp_path, "t")
    accelerate.cpu_offload(two, execution_device=torch.device("cpu"))
    load_adapter(two, tmp_path)
    assert torch.equal(logits(two), logits(one))


def test_two_heads_take_the_labels_of_a_file(tmp_path):
    class Two(hf.BertForTokenClassification):
        def __init__(self, config):
            super().__init__(config)
            self.second = nn.Linear(32, config.num_labels)

    one, two = bert(Two, num_labels=3), bert(Two)
    two.bert.load_state_dict(one.bert.state_dict())
    add_adapter(one, "t", STRONG)
    save_adapter(one, tmp_path, "t")
    load_adapter(two, tmp_path)
    assert [copy_of(two, "t", path).out_features for path in ("classifier", "second")] == [3, 3]
    assert torch.equal(logits(two), logits(one))


# Saving by hand


def test_a_tasks_state_dict():
    model = bert()
    add_adapter(model, "a", STRONG)
    step(model)
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(task_state_dict(model, "a"), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert not any(t.requires_grad for t in state.values())
    set_active_adapter(model, None)
    add_adapter(model, "b", STRONG)
    assert not torch.equal(logits(model), expected)
    load_task_state_dict(model, "b", state)
    assert torch.equal(logits(model), expected)
    key = "modules.classifier.weight"
    for damage, message in (
        ({k: t for k, t in state.items() if k != key}, f"lacks 1 keys.*{key}"),
        (state | {"x": torch.ones(1)}, "has unknown 1 keys.*: x"),
        (state | {key: torch.ones(4, 32)}, r"has shape \(4, 32\) in the state, \(5, 32\) in the task 'b'"),
        (state | {key: torch.ones(5, 32).long()}, "has dtype torch.int64 in the state, torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task_state_dict(model, "b", damage)
        assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="no adapter 'c'; it has: a, b"):
        task_state_dict(model, "c")


def test_the_usual_ways_to_save_what_trains():
    """By the names of what requires a gradient, and through functional_call."""
    model = bert()
    base = copy.deepcopy(model.state_dict())
    add_adapter(model, "t", STRONG)
    step(model)
    expected = logits(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    saved = {k: t.clone() for k, t in model.state_dict().items() if k in trained}
    assert saved.keys() == trained
    fresh = bert()
    fresh.load_state_dict(base)
    add_adapter(fresh, "t", STRONG)
    assert not fresh.load_state_dict(saved, strict=False).unexpected_keys
    assert torch.equal(logits(fresh), expected)
    with torch.no_grad():
        found = torch.func.functional_call(model, model.state_dict(), (TOKENS,)).logits
    assert torch.equal(found, expected)


def test_the_base_is_saved_as_it_is_while_a_task_is_active(tmp_path):
    model = bert()
    base = copy.deepcopy(model.bert.state_dict())
    add_adapter(model, "t", STRONG)
    step(model)
    model.bert.save_pretrained(tmp_path)
    found = hf.BertModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[k], t) for k, t in base.items())


def test_a_heads_non_persistent_buffer_stays_out_of_files(tmp_path):
    def headed():
        model = bert()
        model.classifier = nn.Sequential(nn.Linear(32, 5))
        model.classifier.register_buffer("table", torch.arange(3), persistent=False)
        return model

    model = headed()
    add_adapter(model, "t", STRONG)
    assert not any("table" in key for key in (*model.state_dict(), *task_state_dict(model, "t")))
    save_adapter(model, tmp_path, "t")
    load_adapter(headed(), tmp_path)


def test_keys_are_names_of_files():
    model = bert()
    add_adapter(model, "a-v1.2", STRONG)
    assert all("/" not in key and "\\" not in key for key in model.state_dict())
    assert list(list_adapters(model)) == ["a-v1.2"]
    train_adapter(model, "a-v1.2")
    with pytest.raises(ValueError, match=r"already has an adapter 'a-v1\.2'"):
        add_adapter(model, "a-v1.2")
