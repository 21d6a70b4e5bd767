"""What people do to a model that has tasks: modules that are replaced, shared, or contain the sites of adapters."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from helpers_tasks import STRONG, TOKENS, Top, bert, copy_of, logits, shake, step
from torch import nn

from adapter_ops import (
    AdapterConfig,
    add_adapter,
    delete_adapter,
    list_adapters,
    load_adapter,
    save_adapter,
    set_active_adapter,
    train_adapter,
    using_adapter,
)

pytestmark = pytest.mark.usefixtures("aten")


def test_a_replaced_module_does_not_take_its_adapter_along():
    model = bert()
    add_adapter(model, "t", STRONG)
    expected, output = logits(model), model.bert.encoder.layer[1].output
    old, output.dropout = output.dropout, nn.Dropout(0.0)
    with pytest.raises(RuntimeError, match=r"layer\.1\.output\.dropout' was replaced after .* save the tasks"):
        logits(model)
    with using_adapter(model, None):
        logits(model)
    output.dropout = nn.Sequential(old)  # a wrapper that calls the old one
    assert torch.equal(logits(model), expected)
    output.dropout = old
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("config", [STRONG, "pfeiffer"], ids=["copied", "read by an adapter"])
def test_a_replaced_norm_is_noticed_and_the_task_runs_there_again(config):
    model = bert()
    add_adapter(model, "t", config)
    shake(model)
    expected, output = logits(model), model.bert.encoder.layer[1].output
    old, output.LayerNorm = output.LayerNorm, nn.LayerNorm(32, eps=output.LayerNorm.eps)
    with pytest.raises(RuntimeError, match=r"layer\.1\.output\.LayerNorm' was replaced after the task 't'"):
        logits(model)
    set_active_adapter(model, "t")
    assert torch.equal(logits(model), expected) and "forward" not in vars(old)
    delete_adapter(model, "t")
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_head_in_a_replaced_module_is_noticed():
    model = bert(hf.BertForMaskedLM)
    add_adapter(model, "t", STRONG, modules=["cls.predictions.transform"])
    shake(model)
    expected = logits(model)
    model.cls = copy.deepcopy(bert(hf.BertForMaskedLM).cls)
    model.tie_weights()
    with pytest.raises(RuntimeError, match=r"'cls\.predictions\.transform' was replaced"):
        logits(model)
    set_active_adapter(model, "t")
    assert torch.equal(logits(model), expected)


def test_replaced_embeddings_are_the_bases_matter():
    model = bert()
    add_adapter(model, "t", STRONG)
    expected = logits(model)
    model.resize_token_embeddings(60, mean_resizing=False)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("inside", ["bert.encoder.layer.2", "bert.encoder.layer.2.output", "bert.encoder"])
def test_a_module_with_places_inside_is_no_tasks_own(inside):
    model = bert()
    with pytest.raises(ValueError, match=rf"'{inside}' contains .*layer\.2.*leave_out="):
        add_adapter(model, "t", AdapterConfig(bottleneck=4, leave_out=(0, 1)), modules=[inside])
    assert not hasattr(model, "adapter_ops")
    everywhere = AdapterConfig(bottleneck=4, leave_out=(0, 1, 2))
    add_adapter(model, "t", everywhere, modules=[inside])
    model(TOKENS).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_place_itself_and_its_norm_can_be_a_tasks_own(tmp_path):
    """The adapter stands behind the task's own module, and with ln_before on its own norm."""
    model = bert()
    norm, intermediate = "bert.encoder.layer.2.output.LayerNorm", "bert.encoder.layer.2.intermediate"
    add_adapter(model, "t", "pfeiffer", modules=[norm, intermediate])
    shake(model)
    x = copy_of(model, "t", norm).forward(torch.ones(1, 32) * torch.arange(32))
    assert list_adapters(model)["t"].modules == (norm, intermediate) and x.isfinite().all()
    expected, count = logits(model), sum(p.requires_grad for p in model.parameters())
    model(TOKENS).logits.square().sum().backward()
    assert sum(p.grad is not None and p.grad.any() for p in model.parameters()) == count
    save_adapter(model, tmp_path, "t")
    delete_adapter(model, "t")
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)


def test_the_tasks_of_a_model_and_of_its_part_do_not_run_on_top_of_each_other():
    model = bert()
    add_adapter(model, "t", STRONG)
    expected = logits(model)
    for other in (model.bert, Top(encoder=model.bert)):
        with pytest.raises(ValueError, match="runs the adapters of another model, which contains it too"):
            add_adapter(other, "u", STRONG)
        assert "adapter_ops" not in other._modules and torch.equal(logits(model), expected)
    delete_adapter(model, "t")
    add_adapter(model.bert, "u", STRONG)


def test_a_head_outside_of_the_part_that_has_the_tasks_is_named():
    model = bert()
    add_adapter(model.bert, "t", STRONG)
    for verb in (add_adapter, lambda model, name: train_adapter(model, "t")):
        with pytest.warns(UserWarning, match=r"2 parameters train .* outside of the BertModel .*classifier\.weight"):
            verb(model, "u")
    assert list_adapters(model) == list_adapters(model.bert) and list(list_adapters(model)) == ["t", "u"]
    model.classifier.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_adapter(model, "t")


def test_a_task_of_the_whole_runs_in_its_part_alone():
    model = bert()
    for name in ("a", "b"):
        add_adapter(model, name, STRONG)
        step(model)
    found = {}
    for name in ("a", "b", None):
        with using_adapter(model, name), torch.no_grad():
            found[name] = model.bert(TOKENS)[1]
            assert torch.equal(model.classifier(found[name]), logits(model))
    assert not torch.equal(found["a"], found["b"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(config={"bottleneck": 4}), r"unknown preset \{'bottleneck': 4\}; known: houlsby"),
        (dict(config=None), "unknown preset None"),
        (dict(sites={"ffn": 3}), r"sites\['ffn'\] is 3, expected a pattern or a SitePattern"),
        (dict(sites={"ffn": ("a.*", None, None)}), r"sites\['ffn'\] is \('a\.\*'.*expected a pattern or a SitePattern"),
        (dict(modules=[None]), r"has no modules \[None\]"),
        (dict(modules=[""]), r"has no modules \[''\]"),
        (dict(modules=["bert.pooler", "bert.pooler.dense"]), r"\['bert\.pooler\.dense'\] are parts of others"),
    ],
    ids=str,
)
def test_arguments_of_another_kind(arguments, message):
    model = bert()
    with pytest.raises(ValueError, match=message):
        add_adapter(model, "t", **arguments)
    assert "adapter_ops" not in model._modules
