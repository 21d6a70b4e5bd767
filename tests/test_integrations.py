"""Places in models: every family of transformers on a tiny random model, and patterns on anything else."""

import re

import pytest
import torch
import transformers as hf
from torch import nn

from adapter_ops.config import AdapterConfig
from adapter_ops.inject import add_adapter, delete_adapter, set_active_adapter
from adapter_ops.integrations.transformers import FAMILIES, Place, find_heads, find_norms, find_sites

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
SIGLIP = dict(text_config=TEXT | dict(projection_size=24), vision_config=CLIP["vision_config"])
DISTILBERT = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=50)
ALBERT = TEXT | dict(embedding_size=16)
BERT_GENERATION = TEXT | dict(is_decoder=True)
XMOD = TEXT | dict(languages=("a", "b"), default_language="b", adapter_reduction_factor=4)
OPT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=32, vocab_size=50
)
GPTJ = TEXT | dict(n_embd=32, n_layer=2, n_head=2, n_inner=48, rotary_dim=8)
MOE = DECODER | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
BEIT = SIZES | IMAGE | dict(layer_scale_init_value=0.5)
DINOV2 = SIZES | IMAGE | dict(mlp_ratio=2, layerscale_value=0.5)
GEMMA2 = DECODER | dict(head_dim=12)
GEMMA3 = dict(
    text_config=GEMMA2, vision_config=SIZES | IMAGE | dict(hidden_size=24, vision_use_head=False), mm_tokens_per_image=4
)
GEMMA3 |= dict(image_token_id=49, tie_word_embeddings=True)
WAV2VEC2 = SIZES | dict(
    conv_dim=(8, 8), conv_kernel=(4, 2), conv_stride=(4, 2), feat_extract_norm="layer", vocab_size=50
)
WAV2VEC2 |= dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)

ids = torch.arange(3, 17).view(2, 7)
pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
IDS, BOTH = dict(input_ids=ids), dict(input_ids=ids, decoder_input_ids=ids + 5)
SOUND = dict(input_features=torch.linspace(-1, 1, 2 * 8 * 12).view(2, 8, 12))
WAVE = dict(input_values=torch.linspace(-1, 1, 2 * 60).view(2, 60).sin())
SEEN = dict(input_ids=ids.clone().index_fill_(1, torch.arange(1, 5), 49), pixel_values=pixels)

# model_type, and what its config says if it is there several times: (model, fields of its config, inputs, heads)
MODELS = {
    "bert": (hf.BertForSequenceClassification, TEXT, IDS, ["classifier"]),
    "roberta": (hf.RobertaForTokenClassification, TEXT, IDS, ["classifier"]),
    "xlm-roberta": (hf.XLMRobertaForQuestionAnswering, TEXT, IDS, ["qa_outputs"]),
    "camembert": (hf.CamembertForSequenceClassification, TEXT, IDS, ["classifier"]),
    "electra": (hf.ElectraForSequenceClassification, TEXT | dict(embedding_size=16), IDS, ["classifier"]),
    "deberta-v2": (hf.DebertaV2ForTokenClassification, DEBERTA, IDS, ["classifier"]),
    "deberta": (hf.DebertaForSequenceClassification, DEBERTA, IDS, ["pooler", "classifier"]),
    "bert-generation": (hf.BertGenerationDecoder, BERT_GENERATION, IDS, []),
    "xmod": (hf.XmodForCausalLM, XMOD | dict(is_decoder=True), IDS, ["lm_head.dense", "lm_head.layer_norm"]),
    "xmod pre-norm": (hf.XmodForSequenceClassification, XMOD | dict(pre_norm=True), IDS, ["classifier"]),
    "mpnet": (hf.MPNetForSequenceClassification, TEXT, IDS, ["classifier"]),
    "albert": (hf.AlbertForSequenceClassification, ALBERT, IDS, ["classifier"]),
    "albert groups": (hf.AlbertForQuestionAnswering, ALBERT | dict(num_hidden_groups=2), IDS, ["qa_outputs"]),
    "distilbert": (hf.DistilBertForSequenceClassification, DISTILBERT, IDS, ["pre_classifier", "classifier"]),
    "modernbert": (hf.ModernBertForSequenceClassification, MODERNBERT, IDS, ["head", "classifier"]),
    "modernbert-decoder": (hf.ModernBertDecoderForCausalLM, MODERNBERT, IDS, ["lm_head"]),
    "gptj": (hf.GPTJForCausalLM, GPTJ, IDS, ["lm_head"]),
    "gpt_neox": (hf.GPTNeoXForCausalLM, TEXT, IDS, ["lm_head"]),
    "gpt_neox pre-norm": (hf.GPTNeoXForCausalLM, TEXT | dict(use_parallel_residual=False), IDS, ["lm_head"]),
    "opt": (hf.OPTForCausalLM, OPT, IDS, []),
    "opt post-norm": (hf.OPTForCausalLM, OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=16), IDS, []),
    "gpt2": (hf.GPT2ForSequenceClassification, TEXT, IDS, ["score"]),
    "llama": (hf.LlamaForCausalLM, DECODER, IDS, ["lm_head"]),
    "mistral": (hf.MistralForCausalLM, DECODER, IDS, ["lm_head"]),
    "qwen2": (hf.Qwen2ForSequenceClassification, DECODER, IDS, ["score"]),
    "qwen3": (hf.Qwen3ForCausalLM, DECODER | dict(head_dim=12), IDS, ["lm_head"]),
    "gemma": (hf.GemmaForCausalLM, DECODER | dict(head_dim=12), IDS, []),
    "gemma2": (hf.Gemma2ForCausalLM, GEMMA2, IDS, []),
    "gemma3": (hf.Gemma3ForConditionalGeneration, GEMMA3, SEEN, []),
    "gemma3_text": (hf.Gemma3ForCausalLM, GEMMA2, IDS, []),
    "smollm3": (hf.SmolLM3ForCausalLM, DECODER, IDS, []),
    "olmo2": (hf.Olmo2ForCausalLM, DECODER, IDS, ["lm_head"]),
    "phi3": (hf.Phi3ForCausalLM, DECODER, IDS, ["lm_head"]),
    "mixtral": (hf.MixtralForCausalLM, DECODER | dict(num_local_experts=4), IDS, ["lm_head"]),
    "qwen2_moe": (hf.Qwen2MoeForCausalLM, MOE | dict(shared_expert_intermediate_size=24), IDS, ["lm_head"]),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, MOE | dict(head_dim=12, mlp_only_layers=[0]), IDS, ["lm_head"]),
    "t5": (hf.T5ForConditionalGeneration, T5, BOTH, []),
    "mt5": (hf.MT5ForConditionalGeneration, T5, BOTH, []),
    "bart": (hf.BartForConditionalGeneration, TWO, BOTH, []),
    "mbart": (hf.MBartForConditionalGeneration, TWO, BOTH, []),
    "plbart": (hf.PLBartForConditionalGeneration, TWO, BOTH, []),
    "whisper": (hf.WhisperForConditionalGeneration, WHISPER, SOUND | dict(decoder_input_ids=ids), []),
    "vit": (hf.ViTForImageClassification, SIZES | IMAGE, dict(pixel_values=pixels), ["classifier"]),
    "wav2vec2": (hf.Wav2Vec2ForCTC, WAV2VEC2, WAVE, ["lm_head"]),
    "wav2vec2 pre-norm": (hf.Wav2Vec2ForCTC, WAV2VEC2 | dict(do_stable_layer_norm=True), WAVE, ["lm_head"]),
    "beit": (hf.BeitForImageClassification, BEIT, dict(pixel_values=pixels), ["classifier"]),
    "dinov2": (hf.Dinov2ForImageClassification, DINOV2, dict(pixel_values=pixels), ["classifier"]),
    "clip": (hf.CLIPModel, CLIP, IDS | dict(pixel_values=pixels), []),
    "siglip": (hf.SiglipModel, SIGLIP, IDS | dict(pixel_values=pixels), []),
}
TOWERS = dict.fromkeys(("t5", "mt5", "bart", "mbart", "plbart", "whisper", "clip", "siglip", "gemma3"), 2)
TOWERS_ALONE = {f"{name}_{kind}_model" for name in ("clip", "siglip") for kind in ("text", "vision")}
PARALLEL = ("gptj", "gpt_neox")
PASSES = {"albert": 2}  # of the layer that is shared
each_family = pytest.mark.parametrize("family", MODELS)


pytestmark = [
    pytest.mark.usefixtures("aten", "one_thread"),
    pytest.mark.filterwarnings("ignore:.*outside the base belong to no head"),  # the bias of a tied head
]


@pytest.fixture(scope="module")
def one_thread():
    """Threads that share so little work wait for one another most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(cls, fields):
    config = cls.config_class(**fields)
    if "tie_word_embeddings" in fields:
        config.tie_word_embeddings = fields["tie_word_embeddings"]  # T5's constructor says True whatever it is given
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):  # zero at first, so that images would count for nothing
            nn.init.normal_(parameter)
    return model


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
    assert set(FAMILIES) - TOWERS_ALONE == {name.split()[0] for name in MODELS}


@each_family
def test_sites_stand_around_the_skip_connection(family):
    """h and r at every place: called once a forward, of the stated size, and the model goes on with h + r.

    Where there is no entry to tell r, `test_layers_by_hand` in tests/test_families.py has to do.
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
        layer = site.name.removesuffix("." + site.place)
        added = [s for s in sites if s.name.startswith(layer + ".")] if family in PARALLEL else [site]
        total, r = sum(went[s.output] for s in added) + came[site.entry], came[site.entry]
        assert any(torch.equal(t, total.flatten(0, -2)) for t in tensors), site.name
        if site.norm is not None:
            assert torch.equal(came[site.norm].view_as(total), total)
        if site.place == "attention" or family in PARALLEL:  # the first sublayer; the last is ffn
            assert torch.equal(r, came[layer])
        if site.place == "ffn":
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


def test_a_place_that_is_never_called():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match="is never called"):
        add_adapter(layers, "t", places={"attention": "layers.*.self_attn.out_proj"})


def test_a_tied_head_is_no_tasks_own():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"'lm_head' shares a parameter with .*wte"):
        add_adapter(model, "t", modules=["lm_head"])
