"""A batch of several tasks: every row has what its task gives it alone, in any family, with any config."""

import dataclasses

import helpers_vision
import pytest
import torch
from helpers_context import PRESETS
from helpers_families import each_family, forward
from helpers_mixed import add_tasks, alone, close, model_of
from helpers_models import SITES, tiny
from helpers_tasks import bert
from torch import nn

from adapter_ops import AdapterConfig, SitePattern, add_adapter, skip_layers, using_adapter, using_adapters
from adapter_ops.models import mixed
from adapter_ops.models.config import PRESETS as CONFIGS

pytestmark = pytest.mark.usefixtures("aten")
FROZEN = dataclasses.replace(CONFIGS["houlsby"], layer_norms="frozen")
VIT = {
    "attention": SitePattern("blocks.*.attn", entry="blocks.*.norm1"),
    "ffn": SitePattern("blocks.*.mlp", entry="blocks.*.norm2"),
}


def check(model, inputs, names):
    """Every row is what it is alone, and the rows' tasks make a difference."""
    expected = alone(model, names, inputs)
    with torch.no_grad():
        with using_adapters(model, names):
            found = forward(model, inputs)[0]
        base = forward(model, inputs)[0]
    if found.shape[1] == len(names) == found.shape[0] and "pixel_values" in inputs and "input_ids" in inputs:
        found, base, expected = found.diagonal(), base.diagonal(), expected[:, 0]  # images against texts
    close(found, expected)
    for i, name in enumerate(names):
        assert torch.allclose(found[i], base[i], rtol=1e-4, atol=2e-5) == (name is None), name


@each_family
def test_all_presets_and_the_base_in_one_batch(family):
    shares = family == "deberta-v2"  # all rows share its LayerNorm of the relative positions
    model, inputs = model_of(family, [FROZEN if shares and name == "houlsby" else name for name in PRESETS])
    names = list(model.adapter_ops.names)
    check(model, inputs, [*names[:1], None, *names[1:]])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_three_tasks_of_one_preset(family, preset):
    """At each site they are one call of the op, and each LayerNorm is normalised once."""
    model, inputs = model_of(family, [preset] * 3)
    names = ["t2", None, "t0", "t1"]
    check(model, inputs, names)
    batch = batch_of(model, names)
    assert all(len(groups) == 1 for groups in batch.layer_at.values())
    assert all(group.stack is not None for group in batch.copy_at.values())


def batch_of(model, names):
    with using_adapters(model, names):
        return model.adapter_ops.selection.task()


CONFIG = AdapterConfig(bottleneck=4, init_std=0.3)
OTHERS = {
    "bottleneck": dict(bottleneck=7),
    "bottleneck by layer": dict(bottleneck={"default": 2, "1": 9}),
    "scale": dict(scale=0.5),
    "scale learned": dict(scale="learned"),
    "scale by channel": dict(scale="channel"),
    "activation": dict(activation="sigmoid"),
    "depth": dict(depth=3),
    "dropout": dict(dropout=0.5),
    "leave_out": dict(leave_out=(1,)),
    "placement": dict(placement=("ffn",)),
    "norm layer before": dict(norm="layer"),
    "norm layer after": dict(norm="layer", norm_position="after"),
    "norm batch before": dict(norm="batch"),
    "norm batch after": dict(norm="batch", norm_position="after"),
    "frozen norms": dict(layer_norms="frozen"),
    "ln_before": dict(ln_before=True),
    "input": dict(ln_before=True, residual="input"),
    "no ln_after": dict(ln_before=True, ln_after=False),
    "no ln_after, input": dict(ln_before=True, ln_after=False, residual="input"),
    "parallel": dict(placement="parallel"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_configs_that_differ_in_one_field(family, name):
    """Beside two tasks of the default, so that stacks and single tasks come together."""
    other = dataclasses.replace(CONFIG, **OTHERS[name])
    model, inputs = model_of(family, [CONFIG, other, CONFIG, other])
    shake_buffers(model)
    check(model, inputs, ["t1", "t0", None, "t2", "t3"])
    check(model, inputs, ["t1", "t3", "t1", None, "t1"])
    check(model, inputs, ["t1", "t3", "t3", "t1", "t1"])


def test_bottlenecks_of_different_sizes_with_an_activation_that_is_not_zero_at_zero():
    sizes = [AdapterConfig(bottleneck=size, activation="sigmoid", init_std=0.3) for size in (3, 7, 1)]
    model, inputs = model_of("bert", sizes)
    check(model, inputs, ["t0", "t1", "t2", None])
    assert all(len(groups) == 1 for groups in batch_of(model, ["t0", "t1", "t2"]).layer_at.values())


def shake_buffers(model):
    for name, t in model.adapter_ops.named_buffers():
        if "running" in name:
            t.add_(torch.rand_like(t))


def test_parameters_of_different_dtypes():
    model, inputs = model_of("bert", [CONFIG] * 2)
    for layer in model.adapter_ops.task("t1").layer_at.values():
        layer.double()
    check(model, inputs, ["t1", None, "t0"])


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_sixteen_bits(family, how):
    """Rows have the dtype and, to a rounding, the values that they have alone; a LayerNorm has them to the bit."""
    model, inputs = model_of(family, ["houlsby"] * 3)
    model = model.bfloat16() if how == "bf16" else model
    names = ["t2", None, "t0", "t1"]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        expected = alone(model, names, inputs)
        with torch.no_grad(), using_adapters(model, names):
            found = forward(model, inputs)[0]
            copies = model.adapter_ops.selection.task().copy_at
            path, grouped = next((path, group) for path, group in copies.items() if "norm" in path.lower())
        x = torch.randn(4, 3, 32, dtype=torch.bfloat16)
        own = [model.adapter_ops.task(n).copy_at[path] if n else model.get_submodule(path) for n in names]
        normed = torch.cat([module(x[i : i + 1]) for i, module in enumerate(own)])
        assert torch.equal(grouped(x), normed)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.float().abs().max().item())


@pytest.mark.filterwarnings("ignore:2 parameters outside the base:UserWarning")
def test_a_vit_of_timm():
    torch.manual_seed(0)
    model = helpers_vision.timm().create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=24, num_heads=2, depth=2, num_classes=3
    )
    for i, preset in enumerate(PRESETS):
        add_adapter(model.eval(), f"t{i}", preset, sites=VIT)
        with torch.no_grad():
            for p in model.adapter_ops.task(f"t{i}").parameters():
                p.add_(torch.randn_like(p) * 0.2)
    x, names, found = torch.randn(5, 3, 32, 32), ["t3", "t0", None, "t1", "t2"], []
    with torch.no_grad():
        for i, name in enumerate(names):
            with using_adapter(model, name):
                found.append(model(x[i : i + 1]))
        with using_adapters(model, names):
            close(model(x), torch.cat(found))


class OddNorm(nn.LayerNorm):
    """A normalisation whose parameters cannot be those of rows."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class Rms(nn.Module):
    def __init__(self, D, shift):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.rand(D)), shift

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (self.weight + self.shift)


class FirstRMSNorm(Rms):
    pass


class SecondRMSNorm(Rms):
    """The weights of its first element count for all."""

    def forward(self, x):
        return super().forward(x) * self.weight[0]


@pytest.mark.parametrize(
    "norm, by_rows",
    [
        (lambda: nn.LayerNorm(8), True),
        (lambda: nn.LayerNorm(8, bias=False), True),
        (lambda: nn.LayerNorm(8, elementwise_affine=False), True),
        (lambda: nn.RMSNorm(8), True),
        (lambda: nn.RMSNorm(8, eps=0.1), True),
        (lambda: FirstRMSNorm(8, 1.0), True),
        (lambda: SecondRMSNorm(8, 0.0), False),
        (lambda: OddNorm(8), False),
        (lambda: nn.utils.parametrizations.weight_norm(nn.LayerNorm(8), dim=None), False),
    ],
)
def test_normalisations_of_any_kind(norm, by_rows):
    """Those whose rows cannot have weights of their own run once for each task."""
    model = tiny()
    for layer in model.layers:
        layer.norm2 = norm()
    add_named(model, [CONFIG] * 2)
    assert mixed.norm_by_rows(model.adapter_ops.task("t0").copy_at["layers.0.norm2"]) == by_rows
    x, names = torch.randn(4, 3, 8), ["t1", None, "t0", "t1"]
    check_tiny(model, x, names)


def add_named(model, configs):
    for i, config in enumerate(configs):
        add_adapter(model, f"t{i}", config, sites=SITES)
        with torch.no_grad():
            for p in model.adapter_ops.task(f"t{i}").parameters():
                p.add_(torch.randn_like(p) * 0.2)


@torch.no_grad()
def check_tiny(model, x, names):
    found = []
    for i, name in enumerate(names):
        with using_adapter(model, name):
            found.append(model(x[i : i + 1]))
    with using_adapters(model, names):
        close(model(x), torch.cat(found))


@pytest.mark.parametrize("limit", [1 << 24, 0])
@pytest.mark.parametrize("kind", ["linear", "sequence", "tuple", "batch norm"])
def test_heads_of_any_kind(kind, limit, monkeypatch):
    """In one product, where they are nn.Linear and not too large; else each on its own rows."""
    monkeypatch.setattr(mixed, "GATHERED", limit)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 3)

        def forward(self, x, *, scale):
            return self.lin(x * scale), {"x": x, "none": None}

    model = tiny()
    if kind == "sequence":
        model.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    elif kind == "batch norm":
        model.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    elif kind == "tuple":
        model.head = Pair()
        model.forward = lambda x: model.head(model.layers[1](x).mean(1), scale=torch.tensor(2.0))[0]
    add_named(model, [CONFIG] * 3)
    shake_buffers(model)
    check_tiny(model, torch.randn(5, 3, 8), ["t1", None, "t0", "t2", "t1"])


def test_heads_of_different_sizes():
    """Rows are filled up with -inf, so that probabilities and the largest class are the task's own."""
    model = add_tasks(bert(), [CONFIG] * 2)
    task = model.adapter_ops.task("t1")
    task.replace_head("classifier", nn.Linear(32, 3))
    tokens = torch.arange(21).view(3, 7)
    names = ["t1", "t0", None]
    with torch.no_grad():
        expected = []
        for i, name in enumerate(names):
            with using_adapter(model, name):
                expected.append(model(tokens[i : i + 1]).logits)
        with using_adapters(model, names):
            found = model(tokens).logits
            with pytest.raises(ValueError, match=r"heads 'classifier' of different sizes.*without labels="):
                model(tokens, labels=torch.tensor([0, 1, 2]))
        assert found.shape == (3, 5) and (found[0, 3:] == float("-inf")).all()
        close(found[:1, :3], expected[0])
        close(found[1:], torch.cat(expected[1:]))
        with using_adapters(model, ["t1"] * 3):  # equal among the tasks of this batch
            assert model(tokens).logits.shape == (3, 3)


def test_a_head_that_loses_the_rows():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 3)

        def forward(self, x):
            return self.lin(x).sum(0)

    model = tiny()
    model.head = Sum()
    add_named(model, [CONFIG] * 2)
    text = r"own Sum returned a tensor of shape \(3,\) for 1 rows"
    with using_adapters(model, ["t0", "t1"]), pytest.raises(ValueError, match=text):
        model(torch.randn(2, 3, 8))


def test_skipped_layers_and_contexts_inside():
    model, inputs = model_of("bert", ["houlsby", "pfeiffer", "parallel"])
    names = ["t2", "t0", "t1", None]
    with torch.no_grad(), using_adapters(model, names):
        whole = forward(model, inputs)[0]
        with skip_layers(model, [0]):
            some = forward(model, inputs)[0]
        with using_adapter(model, "t1"):
            one = forward(model, inputs)[0]
            with using_adapters(model, names[::-1]):
                back = forward(model, inputs)[0]
        close(forward(model, inputs)[0], whole)
    with skip_layers(model, [0]):
        close(some, alone(model, names, inputs))
    close(one, alone(model, ["t1"] * 4, inputs))
    close(back, alone(model, names[::-1], inputs))
    assert not torch.allclose(some, whole, atol=1e-3)


def test_all_rows_of_the_base_are_the_base_to_the_bit():
    model, inputs = model_of("bert", ["houlsby", "pfeiffer"])
    with torch.no_grad():
        expected = forward(model, inputs)[0]
        with using_adapters(model, [None] * 3):
            assert torch.equal(forward(model, inputs)[0], expected)


def test_numbers_of_tasks_as_a_tensor():
    model, inputs = model_of("bert", ["houlsby"] * 3)
    with torch.no_grad(), using_adapters(model, torch.tensor([2, -1, 0, 1], dtype=torch.int32)):
        found = forward(model, inputs)[0]
    close(found, alone(model, ["t2", None, "t0", "t1"], inputs))
