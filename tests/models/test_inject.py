"""Tasks in a model: what trains, what switches, what stays untouched, what is counted."""

import copy
import pickle

import pytest
import torch
from helpers_tasks import STRONG, TOKENS, bert, checkpoint_layers, logits, step
from torch import nn
from transformers import BertModel

from adapter_ops import (
    AdapterConfig,
    adapter_summary,
    add_adapter,
    delete_adapter,
    set_active_adapter,
    skip_layers,
    train_adapter,
)

pytestmark = pytest.mark.usefixtures("aten")


def test_houlsby_trains_adapters_layer_norms_and_head_and_nothing_else():
    model = bert()
    add_adapter(model, "t", STRONG)
    model(TOKENS).logits.square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    kinds = (".adapters.", ".copies.classifier.", "LayerNorm.")
    assert all(n.startswith("adapter_ops.tasks.t.") and any(k in n for k in kinds) for n in trained)
    assert (
        sum("LayerNorm" in n for n in trained) == 2 * (1 + 2 * 3) and sum(".adapters." in n for n in trained) == 4 * 6
    )
    assert not any("pooler" in n for n in trained)


def test_adapters_stand_where_the_paper_puts_them():
    """dense → dropout → adapter → sum → LayerNorm, by hand, at one layer's two sites."""
    model = bert(BertModel)
    add_adapter(model, "t", STRONG)
    seen = {}
    out = model.encoder.layer[1].output
    out.register_forward_hook(lambda m, args, y: seen.update(h=args[0], r=args[1], y=y))
    logits(model)
    adapter = model.adapter_ops.task("t").layer_at["encoder.layer.1.ffn"]
    h = out.dense(seen["h"])
    expected = out.LayerNorm.forward(adapter(h, h) + seen["r"])
    torch.testing.assert_close(seen["y"], expected)


def test_bare_base_to_the_bit():
    model = bert()
    before, state = logits(model), {k: t.clone() for k, t in model.state_dict().items()}
    for name, config in (("a", STRONG), ("b", "pfeiffer"), ("c", "parallel"), ("d", "adapter_plus")):
        add_adapter(model, name, config)
        step(model)
    set_active_adapter(model, None)
    assert torch.equal(logits(model), before)
    found = model.state_dict()
    assert all(torch.equal(found[k], t) for k, t in state.items())
    for name in "abcd":
        delete_adapter(model, name)
    assert list(model.state_dict()) == list(state) and torch.equal(logits(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_each_task_has_its_own_norms_and_head():
    model = bert()
    outputs = {}
    for name in ("a", "b"):
        add_adapter(model, name, STRONG)
        step(model)
        outputs[name] = logits(model)
    assert not torch.equal(outputs["a"], outputs["b"])
    for name in ("a", "b", "a"):
        set_active_adapter(model, name)
        assert torch.equal(logits(model), outputs[name])
    train_adapter(model, "a")
    step(model)
    assert not torch.equal(logits(model), outputs["a"])
    set_active_adapter(model, "b")
    assert torch.equal(logits(model), outputs["b"])


@pytest.mark.parametrize("unfreeze", ["all", "another", "the middle of one that was trained"])
def test_only_the_parameters_of_the_task_in_training_train(unfreeze):
    model = bert()
    for name in "abc":
        add_adapter(model, name, STRONG)
    own = dict(model.adapter_ops.task("c").named_parameters())
    if unfreeze == "all":
        model.requires_grad_(True)
    elif unfreeze == "another":
        model.adapter_ops.task("b").requires_grad_(True)
    else:
        train_adapter(model, "b")
        trained = [m for m in model.adapter_ops.task("b").modules() if m._parameters]
        for module in (trained[0], trained[-1]):
            module.requires_grad_(False)
    train_adapter(model, "c")
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own.values()}


def test_skip_layers():
    model = bert()
    before = logits(model)
    add_adapter(model, "t", AdapterConfig(bottleneck=4, init_std=0.3, layer_norms="frozen"), modules=())
    whole = logits(model)
    with skip_layers(model, range(3)):
        assert torch.equal(logits(model), before)
    with skip_layers(model, [0]), skip_layers(model, [0, 1]):
        some = logits(model)
    assert not torch.equal(some, before) and not torch.equal(some, whole)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize(
    "fields",
    [
        {"depth": 2},
        {"norm": "layer"},
        {"norm": "batch", "norm_position": "after"},
        {"norm": "layer", "norm_position": "after"},
        {"activation": "tanh"},
        {"scale": "channel"},
        {"scale": "learned"},
        {"scale": 3.0},
        {"init": "bert"},
        {"dropout": 0.3},
        {"placement": ("attention",)},
        {"placement": ("ffn",)},
        {"placement": "parallel"},
        {"leave_out": (0, 2)},
        {"bottleneck": {"1": 7, "default": 2}},
        {"bottleneck": None, "reduction_factor": {"0": 2, "default": 16}},
        {"ln_before": True},
        {"ln_before": True, "ln_after": False, "residual": "input"},
    ],
    ids=str,
)
def test_every_field_works_and_matters(fields):
    def outputs(config):
        torch.manual_seed(1)
        model = bert()
        add_adapter(model, "t", config)
        model.train(config.dropout > 0 or config.norm == "batch")
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("scale"):
                    p.mul_(2)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        y = model(TOKENS).logits
        y.square().sum().backward()
        adapters = model.adapter_ops.task("t").adapters.parameters()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapters)
        return y

    changed = AdapterConfig(**({"bottleneck": 4, "init_std": 0.3} | fields))
    assert AdapterConfig.from_json(changed.to_json()) == changed
    assert not torch.allclose(outputs(changed), outputs(STRONG))


def test_mam_starts_at_the_identity_and_houlsby_near_it():
    model = bert()
    before = logits(model)
    add_adapter(model, "mam", AdapterConfig(bottleneck=4, init="mam"))
    assert torch.equal(logits(model), before)
    add_adapter(model, "houlsby")
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


def test_a_new_task_starts_from_the_base_not_from_the_last_task():
    model = bert()
    base = model.classifier.weight.clone()
    add_adapter(model, "a", STRONG)
    step(model)
    add_adapter(model, "b", STRONG)
    assert torch.equal(model.classifier.weight, base)


def test_copies_pickles_and_moves():
    model = bert()
    add_adapter(model, "a", STRONG)
    step(model)
    add_adapter(model, "b", STRONG)
    train_adapter(model, "a")
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        step(other)
        set_active_adapter(other, "b")
        assert not torch.equal(logits(other), expected)
        delete_adapter(other, "a")
        delete_adapter(other, "b")
    assert torch.equal(logits(model), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16 and all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert all(p.is_meta for p in copy.deepcopy(model).to("meta").parameters())


def test_adapters_follow_the_dtype_of_their_place():
    model = bert().to(torch.bfloat16)
    add_adapter(model, "t", STRONG)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    step(model)


def test_autocast():
    model = bert()
    add_adapter(model, "t", STRONG)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    torch.testing.assert_close(found.float(), logits(model), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = bert()
    add_adapter(model, "t", STRONG)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(TOKENS).logits.square().sum(), trained)
    checkpoint_layers(model, reentrant)
    model(TOKENS).logits.square().sum().backward()
    for p, e in zip(trained, expected):
        torch.testing.assert_close(p.grad, e)


def test_compile():
    torch.compiler.reset()
    model = bert(num_hidden_layers=1)
    add_adapter(model, "t", STRONG)
    torch.testing.assert_close(torch.compile(model)(TOKENS).logits, model(TOKENS).logits)


# The paper's numbers (Houlsby et al. 2019: Table 1, §3.6; and its code), on the meta device.


@pytest.mark.parametrize(
    "hidden, layers, bottleneck, adapters, norms, share",
    [
        (768, 12, 64, 2_379_264, 38_400, 0.0217),
        (768, 12, 2, 92_208, 38_400, 0.00084),
        (768, 12, 8, 313_536, 38_400, 0.00286),
        (768, 12, 256, 9_461_760, 38_400, 0.0864),
        (1024, 24, 8, 48 * (2 * 8 * 1024 + 1024 + 8), 49 * 2048, 0.0025),
        (1024, 24, 64, 48 * (2 * 64 * 1024 + 1024 + 64), 49 * 2048, 0.0189),
        (1024, 24, 256, 48 * (2 * 256 * 1024 + 1024 + 256), 49 * 2048, 0.0753),
    ],
)
def test_summary_gives_the_papers_numbers(hidden, layers, bottleneck, adapters, norms, share, capsys):
    with torch.device("meta"):
        model = bert(
            BertModel,
            vocab_size=30522,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            intermediate_size=4 * hidden,
            max_position_embeddings=512,
        )
    add_adapter(model, "t", AdapterConfig(bottleneck=bottleneck))
    summary = adapter_summary(model)
    (row,), everything = summary.tasks, summary.total
    assert (row.adapters, row.norms, row.modules, row.total) == (adapters, norms, 0, adapters + norms)
    assert adapters / sum(p.numel() for n, p in model.named_parameters() if "adapter_ops" not in n) == pytest.approx(
        share, rel=0.02
    )
    assert everything.total == row.total
    assert capsys.readouterr().out == ""  # it prints nothing of itself
    print(summary)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"base: {summary.base:,} parameters; active: t" and len(lines) == 4
    assert lines[2].split() == ["t", f"{adapters:,}", f"{norms:,}", "0", f"{row.total:,}", f"{row.share:.2%}"]


def test_summary_of_two_tasks():
    model = bert()
    add_adapter(model, "a", STRONG)
    add_adapter(model, "b", AdapterConfig(bottleneck=2, layer_norms="frozen"), modules=())
    a, b = adapter_summary(model).tasks
    both = adapter_summary(model).total
    assert a.modules == 5 * 32 + 5 and b.norms == b.modules == 0
    assert both.total == a.total + b.total and both.share == pytest.approx(a.share + b.share)


def test_summary_counts_the_active_tasks_own_head():
    model = bert()
    add_adapter(model, "five", STRONG)
    set_active_adapter(model, None)
    model.classifier = nn.Linear(32, 3)
    add_adapter(model, "three", STRONG)
    for active in ("five", "three", None):
        set_active_adapter(model, active)
        five, three = adapter_summary(model).tasks
        assert adapter_summary(model).active == active
        assert (five.modules, three.modules) == (5 * 33, 3 * 33)


# Bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("t",), "already has an adapter 't'"),
        (("a/b",), "may hold letters"),
        (("",), "may hold letters"),
        (("u", "hulsby"), "unknown preset 'hulsby'; known: houlsby, pfeiffer"),
    ],
)
def test_bad_add(arguments, message):
    model = bert()
    add_adapter(model, "t", STRONG)
    before, keys = logits(model), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_adapter(model, *arguments)
    with pytest.raises(ValueError, match=r"has no modules \['head'\]"):
        add_adapter(model, "u", modules=["head"])
    assert torch.equal(logits(model), before) and list(model.state_dict()) == keys


def test_unknown_names_and_models():
    model = bert()
    for call in (set_active_adapter, train_adapter, delete_adapter):
        with pytest.raises(ValueError, match="no adapter 'x'; it has: none"):
            call(model, "x")
    add_adapter(model, "t", STRONG)
    with pytest.raises(ValueError, match="no adapter 'x'; it has: t"):
        set_active_adapter(model, "x")
    with pytest.raises(ValueError, match="no sites known for model type None; known: bert"):
        add_adapter(nn.Linear(3, 3), "t")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bottleneck": 0}, "bottleneck is 0"),
        ({"bottleneck": 4, "reduction_factor": 2}, "give one of the two"),
        ({"reduction_factor": -1.0}, "reduction_factor is -1.0"),
        ({"bottleneck": {"1": 4}}, "no entry 'default'"),
        ({"placement": ("mlp",)}, "placement is"),
        ({"placement": "ffn"}, "placement is 'ffn', expected a tuple"),
        ({"placement": ()}, "placement is"),
        ({"activation": "gelo"}, "unknown activation"),
        ({"scale": "chanel"}, "scale is 'chanel', known: 'learned', 'channel'"),
        ({"init": "kaiming"}, "init is 'kaiming', known: 'houlsby', 'bert', 'mam'"),
        ({"norm": "group"}, "norm is 'group'"),
        ({"depth": 0}, "depth is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"init_std": 0.0}, "init_std is 0.0"),
        ({"ln_after": False}, "ln_after=False without ln_before=True"),
    ],
)
def test_bad_config(fields, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**fields)


def test_json_with_an_unknown_field():
    with pytest.raises(ValueError, match=r"unknown fields \['botleneck'\]; known: .*bottleneck"):
        AdapterConfig.from_json('{"botleneck": 4}')
