"""A tiny random model of every family of transformers that has sites, and what it is called with."""

import pytest
import torch
import transformers as hf
from torch import nn

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
