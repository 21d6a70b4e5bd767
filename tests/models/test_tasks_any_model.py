"""A task in models that no table expects: a known family inside of something else, and heads of any name."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from helpers_tasks import STRONG, TOKENS, bert, logits
from torch import nn

from adapter_ops import add_adapter, list_adapters, load_adapter, save_adapter, using_adapter
from adapter_ops.models.families import SitePattern
from adapter_ops.models.sites import find_heads, find_sites

pytestmark = pytest.mark.usefixtures("aten")


class Wrapper(nn.Module):
    """A base, a projection in front, two heads in a list, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.front = nn.Linear(8, 32)
        self.encoder = bert(hf.BertModel)
        self.heads = nn.ModuleList([nn.Linear(32, 3), nn.Linear(32, 2)])
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x):
        pooled = self.encoder(inputs_embeds=self.front(x))[0][:, 0]
        return torch.cat([head(pooled) for head in self.heads], 1) / self.temperature


class AroundAHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = bert()

    def forward(self, x):
        return self.model(x).logits


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.fc = bert(hf.BertModel), bert(hf.BertModel), nn.Linear(64, 2)

    def forward(self, x):
        return self.fc(torch.cat([tower(x)[0][:, 0] for tower in (self.left, self.right)], 1))


class Sentences(nn.Sequential):
    """As sentence_transformers has it: the children are called, counted and saved one by one."""

    def __init__(self):
        super().__init__()
        self.add_module("0", AutoModel())
        self.add_module("1", Pooling())
        self.add_module("2", nn.Linear(32, 4))

    def save(self):
        return [type(child).__name__ for child in self]


class AutoModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.auto_model = bert(hf.BertModel)

    def forward(self, x):
        return self.auto_model(x)[0]


class Pooling(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """As timm has it."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Linear(6, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.fc_norm, self.head = nn.LayerNorm(8), nn.Identity(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc_norm(self.norm(self.blocks(self.patch_embed(x)))))


VIT = {
    "attention": SitePattern("blocks.*.attn", "blocks.*.norm1"),
    "ffn": SitePattern("blocks.*.mlp", "blocks.*.norm2"),
}
MODELS = {
    "wrapper": (Wrapper, torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), None),
    "around a head": (AroundAHead, TOKENS, None),
    "two towers": (TwoTowers, TOKENS, None),
    "sentences": (Sentences, TOKENS, None),
    "vit": (Vit, torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)), VIT),
}
HEADS = {
    "wrapper": ("front", "heads.0", "heads.1"),
    "around a head": ("model.classifier",),
    "two towers": ("fc",),
    "sentences": ("2",),
    "vit": ("head",),
}


def make(name):
    kind, x, patterns = MODELS[name]
    torch.manual_seed(3)
    return kind().eval(), x, patterns


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def descend(model, x):
    """One step on what trains, all of which must get a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model(x).square().sum(), trained)
    with torch.no_grad():
        for p, g in zip(trained, gradients):
            assert g.any()
            p -= 0.1 * g / g.norm()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*parameters outside the base")
def test_add_train_save_and_load_in_any_model(name, tmp_path):
    model, x, patterns = make(name)
    base, state, children = outputs(model, x), copy.deepcopy(model.state_dict()), list(model.named_children())
    add_adapter(model, "t", STRONG, sites=patterns)
    assert list_adapters(model)["t"].modules == HEADS[name]
    descend(model, x)
    expected = outputs(model, x)
    found = model.state_dict()
    assert not torch.equal(expected, base) and all(torch.equal(found[k], t) for k, t in state.items())
    save_adapter(model, tmp_path, "t")
    fresh, _, _ = make(name)
    load_adapter(fresh, tmp_path)
    assert torch.equal(outputs(fresh, x), expected)
    with using_adapter(fresh, None):
        assert torch.equal(outputs(fresh, x), base)
    if name == "sentences":
        assert list(model.named_children()) == children and model.save() == ["AutoModel", "Pooling", "Linear"]
        assert len(model) == 3 and model[-1] is model._modules["2"]


def test_a_frozen_parameter_outside_the_base_is_named():
    model = Wrapper()
    with pytest.warns(UserWarning, match="1 parameters outside the base .*stay frozen: temperature"):
        add_adapter(model, "t", STRONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapter(Wrapper(), "t", STRONG, modules=["heads.1"])  # who says which modules means it
        add_adapter(bert(), "t", STRONG)


def test_a_decoder_behind_the_adapted_layers_is_no_head():
    model = nn.Module()
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1)
    model.score = nn.Linear(8, 2)
    patterns = {"ffn": "encoder.layers.*.linear2"}
    assert find_heads(model, find_sites(model, patterns)) == ["score"]
    with pytest.warns(UserWarning, match=r"stay frozen: decoder\.layers\.0"):
        add_adapter(model, "t", STRONG, sites=patterns)


def test_a_task_moves_between_a_wrapper_and_a_plain_model(tmp_path):
    model, x, _ = make("around a head")
    add_adapter(model, "t", STRONG)
    descend(model, x)
    save_adapter(model, tmp_path / "a", "t")
    plain = bert()
    plain.load_state_dict({k.removeprefix("model."): t for k, t in make("around a head")[0].state_dict().items()})
    load_adapter(plain, tmp_path / "a")
    assert torch.equal(logits(plain), outputs(model, x))
    save_adapter(plain, tmp_path / "b", "t")
    back, _, _ = make("around a head")
    load_adapter(back, tmp_path / "b")
    assert torch.equal(outputs(back, x), outputs(model, x))


def test_places_are_saved(tmp_path):
    model, x, patterns = make("vit")
    add_adapter(model, "t", "parallel", sites=patterns)
    save_adapter(model, tmp_path, "t")
    fresh, _, _ = make("vit")
    load_adapter(fresh, tmp_path)  # which says where
    assert fresh.adapter_ops.sites == model.adapter_ops.sites
    assert torch.equal(outputs(fresh, x), outputs(model, x))
