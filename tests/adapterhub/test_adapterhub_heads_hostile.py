"""Damaged and hostile head files: an error that says why and what to do, and a model that is as it was."""

import random
from pathlib import Path

import pytest
import torch
from hub_helpers import HEAD_FILES, change_head, change_head_weights, classifier, state_of

from adapter_ops.integrations.adapterhub import load_adapterhub
from adapter_ops.models.config import AdapterConfig
from adapter_ops.models.tasks import add_adapter, list_adapters


def assert_rejected(folder, match, error=ValueError, kind="BertForSequenceClassification"):
    """Rejected by a model without tasks and by one that trains another; neither is changed."""
    bare, busy = classifier(kind=kind), classifier(kind=kind)
    add_adapter(busy, "other", AdapterConfig(bottleneck=4))
    for model in (bare, busy):
        before, values = state_of(model), {n: p.clone() for n, p in model.named_parameters()}
        with pytest.raises(error, match=match):
            load_adapterhub(model, folder)
        assert state_of(model) == before
        assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
        assert hasattr(model, "adapter_ops") == (model is busy)
    load_adapterhub(bare, folder, with_head=False)  # the way out that the messages name
    assert list_adapters(bare)["a"].modules == ()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            dict(model_class="BertForTokenClassification"),
            "is of class BertForTokenClassification, the model is a BertFor",
        ),
        (dict(model_type="roberta"), "head in .* for model_type 'roberta', the model has 'bert'"),
        (dict(hidden_size=64), "head in .* for hidden_size 64, the model has 32"),
        (dict(model_class=None), "head_config.json is no head's config: it lacks the field 'model_class'"),
        (dict(model_class=3), "field 'model_class' is 3, expected a string"),
        (dict(config=[]), r"field 'config' is \[\], expected an object"),
        (dict(num_labels=4), r"'classifier\.\w+' in .*head.bin has shape \(3.*expected \(4"),
        (dict(num_labels=2), r"has shape \(3.*expected \(2"),
        (dict(num_labels=-1), "num_labels is -1"),
        (dict(num_labels=2**40), "num_labels is 1099511627776"),
        (dict(num_labels="3"), "field 'num_labels' is '3', expected a whole number"),
        (dict(num_labels=True), "field 'num_labels' is True"),
        (dict(label2id=["x"]), "field 'label2id' is .*expected an object"),
        (dict(label2id={"x": "0"}), "field 'label2id', key 'x' is '0', expected a whole number"),
        (dict(config={}), r"field 'config' lacks the field 'head_type'|lacks the field 'name'|name' is None"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:label2id")
def test_configs_that_are_refused(changes, match, saved):
    change_head(saved[1], **changes)
    assert_rejected(saved[1], match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(classifier__weight=None), r"head.bin lacks 1 of 2 keys, first 'classifier.weight'"),
        (dict(classifier__weight=None, classifier__bias=None), "lacks 2 of 2 keys"),
        (dict(classifier__more=torch.ones(1)), "1 keys that do not belong, first 'classifier.more'"),
        (dict(other=torch.ones(1)), "has 'other', and no head of the BertForSequenceClassification has it"),
        (dict(bert__pooler__dense__bias=torch.ones(32)), "other values than in the model"),
        (dict(bert__pooler__dense__bias=torch.ones(3)), r"shape \(3,\), expected \(32,\)"),
        (dict(classifier__weight=torch.ones(3, 31)), r"shape \(3, 31\), expected \(3, 32\)"),
        (dict(classifier__weight=torch.ones(2, 32)), r"shape \(2, 32\), expected \(3, 32\)"),
        (dict(classifier__weight=torch.ones(3, 32, dtype=torch.int8)), "dtype torch.int8, expected one of"),
        (dict(classifier__weight=torch.ones(3, 32).to_sparse()), "no dense tensor"),
        (dict(classifier__weight=torch.ones(3, 32, device="meta")), "no dense tensor"),
        (dict(classifier__weight=Path("x")), "pytorch_model_head.bin cannot be read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_weights_that_are_refused(changes, match, saved):
    change_head_weights(saved[1], **changes)
    assert_rejected(saved[1], match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(layers=3), "layers=3.*a BertForSequenceClassification has head_type='classification', layers=1.* or"),
        (dict(layers=1), "layers=1, use_pooler=False"),
        (dict(layers=True), "field 'layers' is True"),
        (dict(head_type="tagging"), "head_type='tagging'"),
        (dict(head_type=[]), "field 'head_type'"),
        (dict(activation_function="relu"), "activation_function='relu'"),
        (dict(activation_function=5), "activation_function=5"),
        (dict(use_pooler=True), "layers=2.*use_pooler=True, a Bert"),
        (dict(use_pooler="no"), "use_pooler='no', a Bert"),
        (dict(bias=False), "bias=False"),
        (dict(name=None), "lacks the field 'name'"),
        (dict(name="b"), r"has 4 keys that do not belong, first 'heads\.a\.1\.bias'"),
        (dict(num_labels=7), r"shape \(3.*, expected \(7"),
    ],
    ids=str,
)
def test_flexible_heads_that_are_refused(changes, match, flexible):
    change_head(flexible, **changes)
    assert_rejected(flexible, match)


def test_keys_of_flexible_heads(flexible):
    change_head_weights(flexible, heads__ab__1__weight=torch.ones(1))  # which AdapterHub writes too, and does not read
    load_adapterhub(classifier(), flexible)
    assert_rejected(flexible, "ElectraForTokenClassification|head_type", kind="BertForTokenClassification")
    change_head_weights(flexible, heads__a__2__weight=torch.ones(1))
    assert_rejected(flexible, r"1 keys that do not belong, first 'heads\.a\.2\.weight'")
    change_head_weights(flexible, heads__a__2__weight=None, heads__a__1__bias=None)
    assert_rejected(flexible, r"lacks 1 of 4 keys, first 'heads\.a\.1\.bias'")
    change_head_weights(flexible, heads__a__1__bias=torch.ones(31))
    assert_rejected(flexible, r"shape \(31,\), expected \(32,\)")
    assert_rejected(flexible, "a MobileBert|has no head that is known here", kind="BertForNextSentencePrediction")


def test_files_that_are_missing_or_damaged(saved):
    _, folder = saved
    config, weights = folder / "head_config.json", folder / "pytorch_model_head.bin"
    good = config.read_bytes(), weights.read_bytes()
    config.unlink()
    assert_rejected(folder, "has pytorch_model_head.bin and no head_config.json")
    config.write_bytes(good[0][:-9])
    assert_rejected(folder, "head_config.json is no head's config: it is no valid JSON")
    config.write_bytes(good[0])
    weights.unlink()
    assert_rejected(folder, "has head_config.json and no model_head.safetensors or pytorch_model_head.bin")
    for bad in (good[1][:200], b"", b"x"):
        weights.write_bytes(bad)
        assert_rejected(folder, "pytorch_model_head.bin cannot be read")
    config.unlink(), weights.unlink()
    model = classifier()
    load_adapterhub(model, folder)  # no head at all
    assert list_adapters(model)["a"].modules == ()


@pytest.mark.filterwarnings("ignore:label2id")
def test_random_damage(saved):
    """Mutated head files: ValueError, or a load; the model is unchanged after an error."""
    folder, rng = saved[1], random.Random(0)
    model = classifier()
    before, errors = state_of(model), 0
    originals = {name: (folder / name).read_bytes() for name in sorted(HEAD_FILES)}
    for trial in range(300):
        name = sorted(HEAD_FILES)[trial % 2]
        data = bytearray(originals[name])
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice((1, 1, 3, 20))):
                data[rng.randrange(len(data))] = rng.randrange(256)
        for file, content in originals.items():
            (folder / file).write_bytes(data if file == name else content)
        try:
            load_adapterhub(model, folder, f"t{trial}")
        except ValueError:
            errors += 1
            assert state_of(model) == before
        else:
            model = classifier()
            before = state_of(model)
    assert errors > 100
