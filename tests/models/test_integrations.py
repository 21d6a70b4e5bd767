"""Places in models: every family of transformers on a tiny random model, and patterns on anything else."""

import re

import pytest
import torch
import transformers as hf
from helpers_families import MODELS, PARALLEL, PASSES, TOWERS, TOWERS_ALONE, build, each_family, forward, same
from torch import nn

from adapter_ops.models.config import AdapterConfig
from adapter_ops.models.families import FAMILIES, SitePattern
from adapter_ops.models.sites import find_heads, find_norms, find_sites
from adapter_ops.models.tasks import add_adapter, delete_adapter, set_active_adapter

pytestmark = [
    pytest.mark.usefixtures("aten"),
    pytest.mark.filterwarnings("ignore:.*outside the base belong to no head"),  # the bias of a tied head
]


def test_every_family_is_tested():
    assert set(FAMILIES) - TOWERS_ALONE == {name.split()[0] for name in MODELS}


@each_family
def test_sites_stand_around_the_skip_connection(family):
    """h and r at every site: called once a forward, of the stated size, and the model goes on with h + r.

    Where there is no entry to tell r, `test_layers_by_hand` in test_families.py has to do.
    """
    model, inputs, _ = build(family)
    sites = find_sites(model)
    assert len(sites) == len({site.name for site in sites}) == 2 * 2 * TOWERS.get(family, 1) // PASSES.get(family, 1)
    came, went, calls = {}, {}, []

    def before(path):
        def hook(module, args, kwargs):
            came[path] = args[0] if args else kwargs.get("hidden_states")

        return hook

    def after(path):
        def hook(module, args, output):
            calls.append(path)
            went[path] = output[0] if isinstance(output, tuple) else output

        return hook

    for path, module in model.named_modules():
        module.register_forward_pre_hook(before(path), with_kwargs=True)
        module.register_forward_hook(after(path))
    with torch.no_grad():
        model(**inputs)
    tensors = [
        t.flatten(0, -2) for t in [*came.values(), *went.values()] if isinstance(t, torch.Tensor) and t.dim() > 1
    ]
    for site in sites:
        assert calls.count(site.output) == PASSES.get(family, 1)
        assert went[site.output].shape[-1] == site.hidden_size
        if site.entry is None:
            continue
        layer = site.name.removesuffix("." + site.placement)
        added = [s for s in sites if s.name.startswith(layer + ".")] if family in PARALLEL else [site]
        total, r = sum(went[s.output] for s in added) + came[site.entry], came[site.entry]
        assert any(torch.equal(t, total.flatten(0, -2)) for t in tensors), site.name
        if site.norm is not None:
            assert torch.equal(came[site.norm].view_as(total), total)
        if site.placement == "attention" or family in PARALLEL:  # the first sublayer; the last is ffn
            assert torch.equal(r, came[layer])
        if site.placement == "ffn":
            last = total if site.norm is None else went[site.norm]
            assert torch.equal(went[layer], last.view_as(went[layer]))


@each_family
def test_bare_base_has_the_same_sites_and_no_head(family):
    model, _, heads = build(family)
    bare = hf.AutoModel.from_config(model.config)
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    assert [prefix + site.name for site in find_sites(bare)] == [site.name for site in find_sites(model)]
    assert find_heads(bare) == [] and find_heads(model) == heads


@each_family
def test_base_comes_back_to_the_bit(family):
    """Without an active adapter, with one whose up-projection is zero, and after deletion."""
    model, inputs, _ = build(family)
    model.requires_grad_(False)  # where weights require gradients, PyTorch may round a product otherwise
    keys = list(model.state_dict())
    with torch.no_grad():
        base = forward(model, inputs)
        add_adapter(model, "t", AdapterConfig(bottleneck=4, init="mam"))
        assert same(forward(model, inputs), base)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.5
        assert not same(forward(model, inputs), base)
        set_active_adapter(model, None)
        assert same(forward(model, inputs), base)
        delete_adapter(model, "t")
        assert list(model.state_dict()) == keys and same(forward(model, inputs), base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@each_family
def test_gradients_reach_what_trains(family):
    model, inputs, heads = build(family)
    # By name: what transformers calls its normalisations, whatever their class.
    own = {n for n, _ in model.named_parameters() if n.startswith(tuple(heads)) or re.search("norm|ln_", n.lower())}
    add_adapter(model, "t", AdapterConfig(bottleneck=4, init_std=0.2))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    task = model.adapter_ops.task("t")
    assert trainable == {f"adapter_ops.tasks.t.{n}" for n, _ in task.named_parameters()}
    assert own == {f"{path}.{n}" for path, module in task.copy_at.items() for n, _ in module.named_parameters()}
    assert len(list(task.adapters.parameters())) == 4 * len(find_sites(model))
    sum(t.square().sum() for t in forward(model, inputs)).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trainable


@each_family
def test_every_adapter_counts(family):
    model, inputs, _ = build(family)
    with torch.no_grad():
        base = forward(model, inputs)
        add_adapter(model, "t", AdapterConfig(bottleneck=4, init="mam"))
        for site, layer in model.adapter_ops.task("t").layer_at.items():
            weight = layer.bottlenecks[0].up.weight
            weight.normal_()
            assert not same(forward(model, inputs), base), site
            weight.zero_()


class Block(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(D), nn.MultiheadAttention(D, 2), nn.RMSNorm(D)
        self.drop, self.bare = nn.Dropout(), nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(D, 3 * D), nn.GELU(), nn.Linear(3 * D, D))
        self.mixed = nn.ModuleList([nn.Linear(D, 3 * D), nn.Linear(3 * D, D), nn.Linear(D, 3 * D)])


def plain():
    model = nn.Module()
    model.blocks = nn.ModuleList(Block(D) for D in (8, 8, 12))
    return model


def test_patterns():
    sites = find_sites(
        plain(), {"attention": "blocks.*.attn", "ffn": SitePattern("blocks.*.drop", entry="blocks.*.norm2")}
    )
    assert [tuple(site) for site in sites[-2:]] == [
        ("blocks.2.attention", 2, "attention", "blocks.2.attn", None, None, 12),
        ("blocks.2.ffn", 2, "ffn", "blocks.2.drop", "blocks.2.norm2", None, 12),
    ]
    assert len(sites) == 6
    wrapped = nn.ModuleDict({"image": plain(), "text": plain()})
    assert [s.hidden_size for s in find_sites(wrapped, {"ffn": "blocks.*.mlp"})] == [8, 8, 12] * 2
    assert find_norms(plain())[:2] == ["blocks.0.norm1", "blocks.0.norm2"] and find_heads(plain(), sites) == []


def test_patterns_mean_the_same_as_a_family():
    model, _, _ = build("t5")
    patterns = {
        "attention": SitePattern("block.*.layer.0.dropout", "block.*.layer.0.layer_norm"),
        "ffn": SitePattern("encoder.block.*.layer.1.dropout", "encoder.block.*.layer.1.layer_norm"),
    }
    sites = find_sites(model, patterns)
    assert [s for s in sites if s.name.startswith("encoder")] == find_sites(model)[:4] and len(sites) == 6


@pytest.mark.parametrize(
    "patterns, message",
    [
        (None, "known: bert.*sites="),
        ({}, "'attention', 'ffn' or both"),
        ({"attn": "blocks.*.attn"}, "'attention', 'ffn' or both"),
        ({"ffn": "blocks.0.mlp"}, "one '\\*'"),
        ({"ffn": "blocks.*.mlp.*"}, "one '\\*'"),
        ({"ffn": "blocks.*.ffn"}, r"'blocks\.\*\.ffn'; it has: .*blocks\.0"),
        ({"ffn": SitePattern("blocks.*.mlp", norm="blocks.*.norm3")}, r"'blocks\.0\.norm3'; it has: .*blocks\.0\.norm"),
        ({"ffn": "blocks.*.drop"}, r"hidden size at 'blocks\.0\.drop': give the .* nn.Linear"),
        ({"ffn": "blocks.*.mixed"}, r"hidden size at 'blocks\.0\.mixed'"),
    ],
)
def test_errors(patterns, message):
    with pytest.raises(ValueError, match=message):
        find_sites(plain(), patterns)


PRE_NORM = {"attention": SitePattern("dropout1", "norm1"), "ffn": SitePattern("dropout2", "norm2")}
POST_NORM = {"attention": SitePattern("dropout1", None, "norm1"), "ffn": SitePattern("dropout2", "linear1", "norm2")}


@pytest.mark.parametrize("config", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_adapters_in_any_module(norm_first, config):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)  # in train mode: eval has a path of its own
    x = torch.randn(5, 2, 16)
    table = PRE_NORM if norm_first else POST_NORM
    patterns = {n: SitePattern._make(p and f"layers.*.{p}" for p in paths) for n, paths in table.items()}
    base = model(x)
    add_adapter(model, "t", config, sites=patterns)
    with torch.no_grad():
        for layer in model.adapter_ops.task("t").layer_at.values():
            layer.bottlenecks[0].up.weight.normal_()
    assert not torch.equal(model(x), base)
    add_adapter(model, "u", config, sites=patterns)
    with pytest.raises(ValueError, match="elsewhere"):
        add_adapter(model, "v", config, sites={"ffn": "layers.*.linear2"})
    for name in ("t", "u"):
        delete_adapter(model, name)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("config", ["pfeiffer", "parallel"])
def test_config_that_needs_an_entry(config):
    model = plain()
    with pytest.raises(ValueError, match=r"'blocks\.0\.ffn' has no entry"):
        add_adapter(model, "t", config, sites={"ffn": "blocks.*.mlp"})
    assert not hasattr(model, "adapter_ops")


def test_shared_parameters_of_a_head_stay_shared():
    model, _, _ = build("bert")
    model.classifier = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model.classifier[1].weight = model.classifier[0].weight
    add_adapter(model, "t")
    copy = model.adapter_ops.task("t").copy_at["classifier"]
    assert copy[1].weight is copy[0].weight and copy[1].weight.requires_grad
    assert copy[0].weight is not model.classifier[0].weight


def test_a_place_that_is_never_called():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match="is never called"):
        add_adapter(layers, "t", sites={"attention": "layers.*.self_attn.out_proj"})


def test_a_tied_head_is_no_tasks_own():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"'lm_head' shares a parameter with .*wte"):
        add_adapter(model, "t", modules=["lm_head"])
