"""Tasks where models are not what a table expects: wrappers, heads of any name, odd dtypes, offloaded layers."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import transformers as hf
from helpers_tasks import STRONG, TOKENS, bert, logits, step
from torch import nn

from adapter_ops import (
    AdapterConfig,
    add_adapter,
    list_adapters,
    load_adapter,
    load_task_state_dict,
    save_adapter,
    set_active_adapter,
    task_state_dict,
    train_adapter,
    using_adapter,
)
from adapter_ops.models.families import SitePattern
from adapter_ops.models.sites import find_heads, find_sites

pytestmark = pytest.mark.usefixtures("aten")


# A known family inside of something else, and heads of any name


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


# What trains after a load, which modules are taken, and onto which base


def test_a_loaded_task_trains_and_nothing_else(tmp_path):
    model = bert()
    add_adapter(model, "t", STRONG)
    save_adapter(model, tmp_path, "t")
    fresh = bert()
    load_adapter(fresh, tmp_path, "u")
    trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {f"adapter_ops.tasks.u.{n}" for n, _ in fresh.adapter_ops.task("u").named_parameters()}


def distilbert():
    torch.manual_seed(0)
    config = hf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=50)
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


def test_places_are_saved(tmp_path):
    model, x, patterns = make("vit")
    add_adapter(model, "t", "parallel", sites=patterns)
    save_adapter(model, tmp_path, "t")
    fresh, _, _ = make("vit")
    load_adapter(fresh, tmp_path)  # which says where
    assert fresh.adapter_ops.sites == model.adapter_ops.sites
    assert torch.equal(outputs(fresh, x), outputs(model, x))


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


# Odd dtypes and devices, and models that a task must not be half added to


def untouched(model, trained):
    hooks = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    return not hasattr(model, "adapter_ops") and not hooks and [p.requires_grad for p in model.parameters()] == trained


def test_a_quantised_head_is_refused_before_anything_changed():
    model = bert()
    model.classifier.weight = nn.Parameter(torch.zeros(5, 32, dtype=torch.int8), requires_grad=False)
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"'classifier\.weight' has dtype torch\.int8.*leave it out with modules="):
        add_adapter(model, "t")
    assert untouched(model, trained)
    add_adapter(model, "t", modules=())


def test_a_head_that_cannot_be_copied_is_refused_before_anything_changed():
    model = bert()
    model.classifier.lock = threading.Lock()
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="'classifier' cannot be copied for a task"):
        add_adapter(model, "t")
    assert untouched(model, trained)


def test_an_adapter_takes_a_dtype_that_trains():
    model = bert(hf.BertModel).to(torch.bfloat16)
    for layer in model.encoder.layer:
        for dense in (layer.attention.output.dense, layer.output.dense):
            dense.weight = nn.Parameter(dense.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    add_adapter(model, "t")
    assert {p.dtype for p in model.adapter_ops.parameters()} == {torch.bfloat16}


def test_an_offloaded_layer_is_refused_before_anything_changed():
    model = bert()
    model.bert.encoder.layer[1].to("meta")
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"'bert\.encoder\.layer\.1' is on the meta device.*load the layer first"):
        add_adapter(model, "t", AdapterConfig(layer_norms="frozen"))
    assert untouched(model, trained)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_accelerate_offloads_a_model_with_adapters(offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = bert()
    add_adapter(model, "t", STRONG)
    expected = logits(model)
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.adapter_ops.parameters())
    assert torch.equal(logits(model), expected)


def test_layers_that_are_not_there():
    model = bert()
    with pytest.raises(ValueError, match=r"leave_out names layers \[7\], the model has 0 to 2"):
        add_adapter(model, "t", AdapterConfig(leave_out=(1, 7)))
    with pytest.raises(ValueError, match=r"names layers \[9\], the model has 0 to 2"):
        add_adapter(model, "t", AdapterConfig(bottleneck={"9": 2, "default": 4}))
    assert not hasattr(model, "adapter_ops")


def test_the_fast_path_of_a_transformer_encoder_does_not_pass_a_task_by():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16)).eval()
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    patterns = {
        n: SitePattern(f"layers.*.dropout{i}", None, f"layers.*.norm{i}") for n, i in (("attention", 1), ("ffn", 2))
    }
    add_adapter(model, "t", AdapterConfig(bottleneck=4, init_std=0.3), sites=patterns, modules=())
    with torch.no_grad():
        for p in model.adapter_ops.parameters():
            p += torch.randn_like(p) * 0.3
    kept = ~padding
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)[kept]
        model.enable_nested_tensor = False
        for layer in model.layers:  # which takes its fast path in eval only
            layer.training = True
            layer.self_attn.dropout = layer.dropout.p = layer.dropout1.p = layer.dropout2.p = 0.0
        torch.testing.assert_close(found, model(x, src_key_padding_mask=padding)[kept])


def test_hooks_of_users_on_a_head_run_once_and_see_the_tasks_output():
    model = bert()
    seen = []
    model.classifier.register_forward_hook(lambda module, args, output: seen.append(output))
    add_adapter(model, "t", STRONG)
    step(model)
    seen.clear()
    assert torch.equal(logits(model), seen[0]) and len(seen) == 1


def test_a_norm_inside_a_head_is_the_heads():
    """Of two tasks one has its own head, and the other its own copy of the norm inside the base's head."""
    model = bert()
    model.classifier = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5))
    add_adapter(model, "norm", STRONG, modules=())
    add_adapter(model, "head", STRONG)
    with torch.no_grad():
        model.adapter_ops.task("head").copy_at["classifier"][0].weight.fill_(3.0)
        model.adapter_ops.task("norm").copy_at["classifier.0"].weight.fill_(5.0)
        for name, factor in (("head", 3.0), ("norm", 5.0)):
            with using_adapter(model, name):
                seen = []
                handle = model.classifier.register_forward_hook(lambda m, a, y, seen=seen: seen.append((a[0], y)))
                model(TOKENS)
                handle.remove()
            task = model.adapter_ops.task(name)
            linear = task.copy_at["classifier"][1] if name == "head" else model.classifier[1]
            x, y = seen[0]
            torch.testing.assert_close(y, linear(factor * nn.functional.layer_norm(x, [32])))


def test_a_deep_model_pickles():
    model = bert(num_hidden_layers=24, hidden_size=8, num_attention_heads=1, intermediate_size=8)
    add_adapter(model, "t", "parallel")
    expected, others = logits(model), (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    with torch.no_grad():
        for p in model.adapter_ops.parameters():
            p += 1
    assert not torch.equal(logits(model), expected)
    for other in others:
        assert torch.equal(logits(other), expected)
