"""Places in models: every family of transformers on a tiny random model, and patterns on anything else."""

import re

import pytest
import torch
import transformers as hf
from torch import nn

from adapter_ops import load_adapter, save_adapter
from adapter_ops.models.config import AdapterConfig
from adapter_ops.models.families import FAMILIES, Place, find_heads, find_norms, find_sites
from adapter_ops.models.tasks import add_adapter, delete_adapter, set_active_adapter

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
TEXT = SIZES | dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODERNBERT = TEXT | dict(cls_token_id=1, sep_token_id=2)
DECODER = TEXT | dict(num_key_value_heads=1)
IMAGE = dict(image_size=8, patch_size=4)
TWO = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=50)
TWO |= dict(encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TWO |= dict(decoder_start_token_id=2, forced_eos_token_id=None)
T5 = dict(d_model=32, d_ff=48, d_kv=12, num_layers=2, num_heads=2, vocab_size=50)
WHISPER = TWO | dict(num_mel_bins=8, max_source_positions=6)
DEBERTA = TEXT | dict(relative_attention=True, norm_rel_ebd="layer_norm", pos_att_type="p2c|c2p")
DEBERTA |= dict(conv_kernel_size=3, conv_act="gelu")
CLIP = dict(text_config=TEXT, vision_config=SIZES | IMAGE | dict(hidden_size=24), projection_dim=20)
DISTILBERT = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=50)

ids = torch.arange(3, 17).view(2, 7)
pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
IDS, BOTH = dict(input_ids=ids), dict(input_ids=ids, decoder_input_ids=ids + 5)
SOUND = dict(input_features=torch.linspace(-1, 1, 2 * 8 * 12).view(2, 8, 12))

# model_type: (model, fields of its config, inputs, heads)
MODELS = {
    "bert": (hf.BertForSequenceClassification, TEXT, IDS, ["classifier"]),
    "roberta": (hf.RobertaForTokenClassification, TEXT, IDS, ["classifier"]),
    "xlm-roberta": (hf.XLMRobertaForQuestionAnswering, TEXT, IDS, ["qa_outputs"]),
    "camembert": (hf.CamembertForSequenceClassification, TEXT, IDS, ["classifier"]),
    "electra": (hf.ElectraForSequenceClassification, TEXT | dict(embedding_size=16), IDS, ["classifier"]),
    "deberta-v2": (hf.DebertaV2ForTokenClassification, DEBERTA, IDS, ["classifier"]),
    "distilbert": (hf.DistilBertForSequenceClassification, DISTILBERT, IDS, ["pre_classifier", "classifier"]),
    "modernbert": (hf.ModernBertForSequenceClassification, MODERNBERT, IDS, ["head", "classifier"]),
    "gpt2": (hf.GPT2ForSequenceClassification, TEXT, IDS, ["score"]),
    "llama": (hf.LlamaForCausalLM, DECODER, IDS, ["lm_head"]),
    "mistral": (hf.MistralForCausalLM, DECODER, IDS, ["lm_head"]),
    "qwen2": (hf.Qwen2ForSequenceClassification, DECODER, IDS, ["score"]),
    "qwen3": (hf.Qwen3ForCausalLM, DECODER | dict(head_dim=12), IDS, ["lm_head"]),
    "gemma": (hf.GemmaForCausalLM, DECODER | dict(head_dim=12), IDS, []),
    "t5": (hf.T5ForConditionalGeneration, T5, BOTH, []),
    "bart": (hf.BartForConditionalGeneration, TWO, BOTH, []),
    "whisper": (hf.WhisperForConditionalGeneration, WHISPER, SOUND | dict(decoder_input_ids=ids), []),
    "vit": (hf.ViTForImageClassification, SIZES | IMAGE, dict(pixel_values=pixels), ["classifier"]),
    "clip": (hf.CLIPModel, CLIP, IDS | dict(pixel_values=pixels), []),
}
TOWERS = {"t5": 2, "bart": 2, "whisper": 2, "clip": 2}
each_family = pytest.mark.parametrize("family", MODELS)


pytestmark = pytest.mark.usefixtures("aten")


def make(cls, fields):
    config = cls.config_class(**fields)
    if "tie_word_embeddings" in fields:
        config.tie_word_embeddings = fields["tie_word_embeddings"]  # T5's constructor says True whatever it is given
    return cls(config).eval()


def build(family):
    cls, fields, inputs, heads = MODELS[family]
    return make(cls, fields), inputs, heads


def forward(model, inputs):
    """Every float tensor of the output."""
    output = model(**inputs).to_tuple()
    return [t for t in output if isinstance(t, torch.Tensor) and t.is_floating_point()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_every_family_is_tested():
    assert set(FAMILIES) - {"clip_text_model", "clip_vision_model"} == set(MODELS)


@each_family
def test_sites_stand_around_the_skip_connection(family):
    """h and r at every place: called once a forward, of the stated size, and the model goes on with h + r."""
    model, inputs, _ = build(family)
    sites = find_sites(model)
    assert len(sites) == len({site.name for site in sites}) == 2 * 2 * TOWERS.get(family, 1)
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
    tensors = [t for t in [*came.values(), *went.values()] if isinstance(t, torch.Tensor)]
    for site in sites:
        assert calls.count(site.output) == 1
        r, layer = came[site.entry], site.name.removesuffix("." + site.place)
        total = went[site.output] + r
        assert total.shape[-1] == site.hidden_size
        assert any(torch.equal(t, total) for t in tensors), site.name
        if site.norm is not None:
            assert torch.equal(came[site.norm], total)
        if site.place == "attention":  # the first sublayer; the last is ffn
            assert torch.equal(r, came[layer])
        else:
            assert torch.equal(went[layer], total if site.norm is None else went[site.norm])


@each_family
def test_bare_base_has_the_same_sites_and_no_head(family):
    model, _, heads = build(family)
    bare = hf.AutoModel.from_config(model.config)
    prefix = "" if family in ("t5", "clip") else model.base_model_prefix + "."
    assert [prefix + site.name for site in find_sites(bare)] == [site.name for site in find_sites(model)]
    assert find_heads(bare) == [] and find_heads(model) == heads


@each_family
def test_base_comes_back_to_the_bit(family):
    """Without an active adapter, with one whose up-projection is zero, and after deletion."""
    model, inputs, _ = build(family)
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


@each_family
@pytest.mark.parametrize("preset", ["pfeiffer", "parallel", "adapter_plus"])
def test_presets_run(family, preset):
    model, inputs, _ = build(family)
    base = [t.detach() for t in forward(model, inputs)]
    add_adapter(model, "t", preset)
    with torch.no_grad():
        for layer in model.adapter_ops.task("t").layer_at.values():
            layer.bottlenecks[0].up.weight.normal_()
    output = forward(model, inputs)
    assert all(t.isfinite().all() for t in output) and not same(output, base)
    sum(t.square().sum() for t in output).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".adapters." in n)


@pytest.mark.parametrize(
    "cls, fields, layers, heads",
    [
        (hf.BertForMaskedLM, TEXT, 2, ["cls.predictions.transform"]),  # its decoder is tied to the embeddings
        (hf.BertForMaskedLM, TEXT | dict(tie_word_embeddings=False), 2, ["cls"]),
        (hf.GPT2LMHeadModel, TEXT, 2, []),
        (hf.LlamaForCausalLM, DECODER | dict(tie_word_embeddings=True), 2, []),
        (hf.T5ForConditionalGeneration, T5 | dict(tie_word_embeddings=False), 4, ["lm_head"]),
        (hf.T5ForQuestionAnswering, T5, 4, ["qa_outputs"]),
        (hf.T5ForTokenClassification, T5, 2, ["classifier"]),
        (hf.T5EncoderModel, T5, 2, []),
        (hf.BartForSequenceClassification, TWO, 4, ["classification_head"]),
        (hf.WhisperForAudioClassification, WHISPER, 2, ["projector", "classifier"]),
        (hf.CLIPTextModel, TEXT, 2, []),
        (hf.CLIPVisionModel, SIZES | IMAGE, 2, []),
        (hf.CLIPForImageClassification, CLIP, 2, ["classifier"]),
    ],
)
def test_sites_and_heads_of_other_classes(cls, fields, layers, heads):
    model = make(cls, fields)
    assert len(find_sites(model)) == 2 * layers and find_heads(model) == heads


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
    sites = find_sites(plain(), {"attention": "blocks.*.attn", "ffn": Place("blocks.*.drop", entry="blocks.*.norm2")})
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
    places = {
        "attention": Place("block.*.layer.0.dropout", "block.*.layer.0.layer_norm"),
        "ffn": Place("encoder.block.*.layer.1.dropout", "encoder.block.*.layer.1.layer_norm"),
    }
    sites = find_sites(model, places)
    assert [s for s in sites if s.name.startswith("encoder")] == find_sites(model)[:4] and len(sites) == 6


@pytest.mark.parametrize(
    "places, message",
    [
        (None, "known: bert.*places="),
        ({}, "'attention', 'ffn' or both"),
        ({"attn": "blocks.*.attn"}, "'attention', 'ffn' or both"),
        ({"ffn": "blocks.0.mlp"}, "one '\\*'"),
        ({"ffn": "blocks.*.mlp.*"}, "one '\\*'"),
        ({"ffn": "blocks.*.ffn"}, r"'blocks\.\*\.ffn'; it has: .*blocks\.0"),
        ({"ffn": Place("blocks.*.mlp", norm="blocks.*.norm3")}, r"'blocks\.0\.norm3'; it has: .*blocks\.0\.norm"),
        ({"ffn": "blocks.*.drop"}, r"hidden size at 'blocks\.0\.drop': give the .* nn.Linear"),
        ({"ffn": "blocks.*.mixed"}, r"hidden size at 'blocks\.0\.mixed'"),
    ],
)
def test_errors(places, message):
    with pytest.raises(ValueError, match=message):
        find_sites(plain(), places)


PRE_NORM = {"attention": Place("dropout1", "norm1"), "ffn": Place("dropout2", "norm2")}
POST_NORM = {"attention": Place("dropout1", None, "norm1"), "ffn": Place("dropout2", "linear1", "norm2")}


@pytest.mark.parametrize("config", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_adapters_in_any_module(norm_first, config):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)  # in train mode: eval has a path of its own
    x = torch.randn(5, 2, 16)
    table = PRE_NORM if norm_first else POST_NORM
    places = {n: Place._make(p and f"layers.*.{p}" for p in place) for n, place in table.items()}
    base = model(x)
    add_adapter(model, "t", config, places=places)
    with torch.no_grad():
        for layer in model.adapter_ops.task("t").layer_at.values():
            layer.bottlenecks[0].up.weight.normal_()
    assert not torch.equal(model(x), base)
    add_adapter(model, "u", config, places=places)
    with pytest.raises(ValueError, match="elsewhere"):
        add_adapter(model, "v", config, places={"ffn": "layers.*.linear2"})
    for name in ("t", "u"):
        delete_adapter(model, name)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("config", ["pfeiffer", "parallel"])
def test_config_that_needs_an_entry(config):
    model = plain()
    with pytest.raises(ValueError, match=r"'blocks\.0\.ffn' has no entry"):
        add_adapter(model, "t", config, places={"ffn": "blocks.*.mlp"})
    assert not hasattr(model, "adapter_ops")


def test_shared_parameters_of_a_head_stay_shared():
    model, _, _ = build("bert")
    model.classifier = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model.classifier[1].weight = model.classifier[0].weight
    add_adapter(model, "t")
    copy = model.adapter_ops.task("t").copy_at["classifier"]
    assert copy[1].weight is copy[0].weight and copy[1].weight.requires_grad
    assert copy[0].weight is not model.classifier[0].weight


@each_family
def test_reload_into_a_fresh_base(family, tmp_path):
    model, inputs, _ = build(family)
    base = {k: t.clone() for k, t in model.state_dict().items()}
    add_adapter(model, "t", AdapterConfig(bottleneck=4, init_std=0.2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
        save_adapter(model, tmp_path, "t")
        fresh, _, _ = build(family)
        fresh.load_state_dict(base)
        load_adapter(fresh, tmp_path)
        assert same(forward(fresh, inputs), forward(model, inputs))


def test_a_place_that_is_never_called():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match="is never called"):
        add_adapter(layers, "t", places={"attention": "layers.*.self_attn.out_proj"})


def test_a_tied_head_is_no_tasks_own():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"'lm_head' shares a parameter with .*wte"):
        add_adapter(model, "t", modules=["lm_head"])
