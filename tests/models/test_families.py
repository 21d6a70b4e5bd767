"""Families of transformers: presets, files, other classes, generation with a cache, and layers computed by hand."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers_families import (
    ALBERT,
    BERT_GENERATION,
    CLIP,
    DECODER,
    GEMMA3,
    IMAGE,
    MODELS,
    OPT,
    SIGLIP,
    SIZES,
    T5,
    TEXT,
    TWO,
    WAV2VEC2,
    WHISPER,
    build,
    each_family,
    forward,
    make,
    same,
)

from adapter_ops import load_adapter, save_adapter, using_adapter
from adapter_ops.models.config import AdapterConfig
from adapter_ops.models.families import SitePattern
from adapter_ops.models.sites import find_heads, find_sites
from adapter_ops.models.tasks import add_adapter

pytestmark = [
    pytest.mark.usefixtures("aten"),
    pytest.mark.filterwarnings("ignore:.*outside the base belong to no head"),  # the bias of a tied head
]


@each_family
@pytest.mark.parametrize("preset", ["pfeiffer", "parallel", "adapter_plus"])
def test_presets_run(family, preset):
    model, inputs, _ = build(family)
    base = [t.detach() for t in forward(model, inputs)]
    if family.startswith(("xmod", "beit")):
        with pytest.raises(ValueError, match="has no entry"):
            add_adapter(model, "t", preset)
        return
    add_adapter(model, "t", preset)
    with torch.no_grad():
        for layer in model.adapter_ops.task("t").layer_at.values():
            layer.bottlenecks[0].up.weight.normal_()
    output = forward(model, inputs)
    assert all(t.isfinite().all() for t in output) and not same(output, base)
    sum(t.square().sum() for t in output).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".adapters." in n)


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
        (hf.SiglipTextModel, TEXT, 2, []),
        (hf.SiglipVisionModel, SIZES | IMAGE, 2, []),
        (hf.SiglipForImageClassification, SIGLIP, 2, ["classifier"]),
        (hf.AlbertForMaskedLM, ALBERT | dict(tie_word_embeddings=False), 1, ["predictions"]),
        (hf.BertGenerationDecoder, BERT_GENERATION | dict(tie_word_embeddings=False), 2, ["lm_head"]),
        (hf.MBartForCausalLM, TWO | dict(tie_word_embeddings=False), 2, ["lm_head"]),
        (hf.OPTForSequenceClassification, OPT, 2, ["score"]),
        (hf.Gemma3ForConditionalGeneration, GEMMA3 | dict(tie_word_embeddings=False), 4, ["lm_head"]),
        (hf.Wav2Vec2ForSequenceClassification, WAV2VEC2, 2, ["projector", "classifier"]),
    ],
)
def test_sites_and_heads_of_other_classes(cls, fields, layers, heads):
    model = make(cls, fields)
    assert len(find_sites(model)) == 2 * layers and find_heads(model) == heads


def test_a_config_that_the_places_do_not_cover():
    model = make(hf.AlbertModel, ALBERT | dict(inner_group_num=2))
    with pytest.raises(ValueError, match="'albert' with inner_group_num=2, only with inner_group_num=1; give sites="):
        find_sites(model)
    patterns = {
        "ffn": SitePattern("albert_layers.*.ffn_output", "albert_layers.*.ffn", "albert_layers.*.full_layer_layer_norm")
    }
    assert [site.layer for site in find_sites(model, patterns)] == [0, 1]


GENERATORS = [name for name, (cls, *_) in MODELS.items() if cls.can_generate() and name != "whisper"]


@pytest.mark.parametrize("family", GENERATORS)
def test_generation_with_a_cache_and_without(family):
    model, inputs, _ = build(family)
    add_adapter(model, "t", AdapterConfig(bottleneck=4, init_std=0.3))
    options = dict(
        max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    if model.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 2
    if family == "gemma3":
        options["suppress_tokens"] = [49]  # it stands for a part of an image

    def logits(use_cache):
        return torch.stack(model.generate(inputs["input_ids"], **images, use_cache=use_cache, **options).logits, 1)

    images = {key: t for key, t in inputs.items() if key == "pixel_values"}
    cached = logits(True)
    torch.testing.assert_close(cached, logits(False))
    with using_adapter(model, None):
        assert not torch.allclose(logits(True), cached, rtol=1e-5, atol=1e-5)


def bert(layer, x, call, A, B):
    out = layer.attention.output
    x = out.LayerNorm(x + A(out.dense(call(layer.attention.self, x))))
    return layer.output.LayerNorm(x + B(layer.output.dense(layer.intermediate(x))))


def mpnet(layer, x, call, A, B):
    x = layer.attention.LayerNorm(x + A(call(layer.attention.attn, x)))
    return layer.output.LayerNorm(x + B(layer.output.dense(layer.intermediate(x))))


def xmod(layer, x, call, A, B):
    norm1, norm2 = layer.attention.output.LayerNorm, layer.output.LayerNorm
    x = x + A(layer.attention.output.dense(call(layer.attention.self, norm1(x) if layer.pre_norm else x)))
    x = x if layer.pre_norm else norm1(x)
    x = x + B(layer.output.dense(layer.intermediate(norm2(x) if layer.pre_norm else x)))
    x = layer.output.lang_adapter(torch.ones(2, dtype=torch.long), x)  # "b" is the second language
    return x if layer.pre_norm else norm2(x)


def albert(group, x, call, A, B):
    (layer,) = group.albert_layers
    attention = layer.attention
    q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    h = attention.dense(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    x = attention.LayerNorm(x + A(h))
    return layer.full_layer_layer_norm(x + B(layer.ffn_output(layer.activation(layer.ffn(x)))))


def t5(layer, x, call, A, B):
    attention, *crossing, ffn = layer.layer
    x = x + A(call(attention.SelfAttention, attention.layer_norm(x)))
    for cross in crossing:
        x = x + call(cross.EncDecAttention, cross.layer_norm(x))
    return x + B(ffn.DenseReluDense(ffn.layer_norm(x)))


def bart(layer, x, call, A, B):
    """Of BART's kin, with the LayerNorms in front (mBART, OPT) or behind (PLBart, OPT-350m)."""
    before = getattr(layer, "do_layer_norm_before", type(layer).__name__.startswith("MBart"))

    def sublayer(x, norm, f):
        return x + f(norm(x)) if before else norm(x + f(x))

    x = sublayer(x, layer.self_attn_layer_norm, lambda y: A(call(layer.self_attn, y)))
    if hasattr(layer, "encoder_attn"):
        x = sublayer(x, layer.encoder_attn_layer_norm, lambda y: call(layer.encoder_attn, y))
    return sublayer(x, layer.final_layer_norm, lambda y: B(layer.fc2(layer.activation_fn(layer.fc1(y)))))


def gptj(layer, x, call, A, B):
    y = layer.ln_1(x)
    return x + A(call(layer.attn, y)) + B(layer.mlp(y))


def gpt_neox(layer, x, call, A, B):
    after = x + A(call(layer.attention, layer.input_layernorm(x)))
    if layer.use_parallel_residual:
        return after + B(layer.mlp(layer.post_attention_layernorm(x)))
    return after + B(layer.mlp(layer.post_attention_layernorm(after)))


def llama(layer, x, call, A, B):
    x = x + A(call(layer.self_attn, layer.input_layernorm(x)))
    return x + B(layer.mlp(layer.post_attention_layernorm(x)))


def modernbert(layer, x, call, A, B):
    x = x + A(call(layer.attn, layer.attn_norm(x)))
    return x + B(layer.mlp(layer.mlp_norm(x)))


def clip(layer, x, call, A, B):
    x = x + A(call(layer.self_attn, layer.layer_norm1(x)))
    return x + B(layer.mlp(layer.layer_norm2(x)))


def gemma2(layer, x, call, A, B):
    x = x + A(layer.post_attention_layernorm(call(layer.self_attn, layer.input_layernorm(x))))
    return x + B(layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x))))


def gemma3(layer, x, call, A, B):
    return (clip if hasattr(layer, "layer_norm1") else gemma2)(layer, x, call, A, B)


def olmo2(layer, x, call, A, B):
    x = x + A(layer.post_attention_layernorm(call(layer.self_attn, x)))
    return x + B(layer.post_feedforward_layernorm(layer.mlp(x)))


def wav2vec2(layer, x, call, A, B):
    if "Stable" in type(layer).__name__:
        x = x + A(call(layer.attention, layer.layer_norm(x)))
        return x + B(layer.feed_forward(layer.final_layer_norm(x)))
    x = layer.layer_norm(x + A(call(layer.attention, x)))
    return layer.final_layer_norm(x + B(layer.feed_forward(x)))


def beit(layer, x, call, A, B):
    x = x + layer.lambda_1 * A(call(layer.attention, layer.layernorm_before(x)))
    return x + layer.lambda_2 * B(layer.mlp(layer.layernorm_after(x)))


def dinov2(layer, x, call, A, B):
    x = x + A(layer.layer_scale1(call(layer.attention, layer.norm1(x))))
    return x + B(layer.layer_scale2(layer.mlp(layer.norm2(x))))


# What a layer computes with an adapter after each of its sublayers, before the skip connection (Houlsby et al., 2019,
# figure 2). A and B are the adapters, and `call` runs a module on another tensor with the other arguments that it had.
LAYERS = {
    "deberta": bert,
    "bert-generation": bert,
    "xmod": xmod,
    "mpnet": mpnet,
    "albert": albert,
    "modernbert-decoder": modernbert,
    "gptj": gptj,
    "gpt_neox": gpt_neox,
    "opt": bart,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3_text": gemma2,
    "smollm3": llama,
    "olmo2": olmo2,
    "phi3": llama,
    "mixtral": llama,
    "qwen2_moe": llama,
    "qwen3_moe": llama,
    "mt5": t5,
    "mbart": bart,
    "plbart": bart,
    "wav2vec2": wav2vec2,
    "beit": beit,
    "dinov2": dinov2,
    "siglip": clip,
}


def adapter(layer):
    (b,) = layer.bottlenecks
    return lambda h: h + F.linear(F.gelu(F.linear(h, b.down.weight, b.down.bias)), b.up.weight, b.up.bias)


@pytest.mark.parametrize("family", [family for family in MODELS if family.split()[0] in LAYERS])
@torch.no_grad()
def test_layers_by_hand(family):
    model, inputs, _ = build(family)
    add_adapter(model, "t", AdapterConfig(bottleneck=4, init_std=0.3))
    sites = model.adapter_ops.task("t").layer_at
    layers = {model.get_submodule(path) for site in sites for path in [site.rpartition(".")[0]]}
    arguments, outputs = {}, {}

    def keep(module, args, kwargs, output):
        arguments[module] = args, kwargs
        outputs[module] = output

    def call(module, x):
        args, kwargs = arguments[module]
        args, kwargs = ((x, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": x})
        output = module(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    hooks = [m.register_forward_hook(keep, with_kwargs=True) for layer in layers for m in layer.modules()]
    model(**inputs, **({"use_cache": False} if model.can_generate() else {}))
    for hook in hooks:
        hook.remove()
    with using_adapter(model, None):
        for path in dict.fromkeys(site.rpartition(".")[0] for site in sites):
            layer = model.get_submodule(path)
            args, kwargs = arguments[layer]
            x, output = args[0] if args else kwargs["hidden_states"], outputs[layer]
            A, B = adapter(sites[f"{path}.attention"]), adapter(sites[f"{path}.ffn"])
            expected = LAYERS[family.split()[0]](layer, x, call, A, B)
            torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, expected)
            bare = LAYERS[family.split()[0]](layer, x, call, lambda h: h, lambda h: h)
            assert not torch.allclose(bare, expected, rtol=1e-3, atol=1e-3)
