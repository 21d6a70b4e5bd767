"""Where each model family of Hugging Face transformers takes its adapters: one table, and no import of that package.

A sublayer (attention or feed-forward) turns its input r into h, and the model goes on with h + r. Post-norm families
normalise that sum, pre-norm families normalise r on its way in. In parallel families both sublayers take the input r of
their layer, and the model goes on with the sum of both outputs and r. Any other model says where by patterns of module
names.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class SitePattern(NamedTuple):
    """One sublayer, by module paths below its layer (in FAMILIES) or by patterns (in `find_sites`)."""

    output: str  # the module whose output is h, or a tuple that starts with h; called once in each pass of its layer
    entry: str | None = None  # the module whose first argument is r; only "parallel" and pre-norm ln_before need it
    norm: str | None = None  # the normalisation of h + r; None in pre-norm families


@dataclass(frozen=True)
class Stack:
    """A list of equal layers, `layers` being the end of its path in the model."""

    layers: str
    attention: SitePattern
    ffn: SitePattern
    when: tuple[str, Any] | None = None  # a field of the config and its value, if the stack is for such models alone


# h is taken after its dropout where that is a module of its own, else (marked "before dropout") where it is projected.
_BERT = Stack(
    "encoder.layer",
    SitePattern("attention.output.dropout", "attention.self", "attention.output.LayerNorm"),
    SitePattern("output.dropout", "intermediate", "output.LayerNorm"),
)
_DISTILBERT = Stack(
    "transformer.layer",
    SitePattern("attention.out_lin", "attention", "sa_layer_norm"),
    SitePattern("ffn.dropout", "ffn.lin1", "output_layer_norm"),  # not "ffn", which may go over the sequence in chunks
)
_MODERNBERT = Stack("layers", SitePattern("attn", "attn_norm"), SitePattern("mlp", "mlp_norm"))
_GPT2 = Stack("h", SitePattern("attn.resid_dropout", "ln_1"), SitePattern("mlp.dropout", "ln_2"))
_LLAMA = Stack(
    "layers",
    SitePattern("self_attn.o_proj", "input_layernorm"),
    SitePattern("mlp.down_proj", "post_attention_layernorm"),
)
_T5 = (
    Stack(
        "encoder.block",
        SitePattern("layer.0.dropout", "layer.0.layer_norm"),
        SitePattern("layer.1.dropout", "layer.1.layer_norm"),
    ),
    Stack(  # layer.1 is the attention to the encoder
        "decoder.block",
        SitePattern("layer.0.dropout", "layer.0.layer_norm"),
        SitePattern("layer.2.dropout", "layer.2.layer_norm"),
    ),
)
_BART = Stack(  # before dropout
    "layers",
    SitePattern("self_attn.out_proj", "self_attn", "self_attn_layer_norm"),
    SitePattern("fc2", "fc1", "final_layer_norm"),
)
_WHISPER = Stack(  # before dropout
    "layers", SitePattern("self_attn.out_proj", "self_attn_layer_norm"), SitePattern("fc2", "final_layer_norm")
)
_VIT = Stack(  # before dropout: one dropout module serves both sublayers
    "layers", SitePattern("attention.o_proj", "layernorm_before"), SitePattern("mlp.fc2", "layernorm_after")
)
_CLIP = Stack("encoder.layers", SitePattern("self_attn.out_proj", "layer_norm1"), SitePattern("mlp.fc2", "layer_norm2"))
# The layer of a group runs several times in a forward, with the same weights each time, and so do a task's adapters: as
# in AdapterHub, the shared layer has one at each site. Its number is that of its group, which has to have no other.
_ALBERT = Stack(
    "encoder.albert_layer_groups",
    SitePattern(
        "albert_layers.0.attention.output_dropout", "albert_layers.0.attention", "albert_layers.0.attention.LayerNorm"
    ),
    SitePattern("albert_layers.0.ffn_output", "albert_layers.0.ffn", "albert_layers.0.full_layer_layer_norm"),
    when=("inner_group_num", 1),
)
_MPNET = Stack("encoder.layer", SitePattern("attention.dropout", "attention.attn", "attention.LayerNorm"), _BERT.ffn)
# Before dropout. A language adapter follows h + r of the feed-forward, and the model's config says whether LayerNorms
# are in front of the sublayers or behind. There is no entry, so that adapters that read r or h + r are refused.
_XMOD = Stack("encoder.layer", SitePattern("attention.output.dense"), SitePattern("output.dense"))
# Before dropout, and before the layer's learned scale, a parameter and no module. The model adds the scaled h to r, so
# adapters that read r or h + r are refused here too.
_BEIT = Stack("layers", SitePattern("attention.o_proj"), SitePattern("mlp.fc2"))
_DINOV2 = Stack("encoder.layer", SitePattern("layer_scale1", "norm1"), SitePattern("layer_scale2", "norm2"))
# Parallel, with one LayerNorm. AdapterHub's feed-forward adapters that read r have the attention's output added to it.
_GPTJ = Stack("h", SitePattern("attn.resid_dropout", "ln_1"), SitePattern("mlp.dropout", "ln_1"))
_GPT_NEOX = Stack(  # parallel, or pre-norm with use_parallel_residual=False: the same modules in another order
    "layers",
    SitePattern("post_attention_dropout", "input_layernorm"),
    SitePattern("post_mlp_dropout", "post_attention_layernorm"),
)
_PHI3 = Stack(
    "layers",
    SitePattern("resid_attn_dropout", "input_layernorm"),
    SitePattern("resid_mlp_dropout", "post_attention_layernorm"),
)
_MOE = Stack(
    "layers", SitePattern("self_attn.o_proj", "input_layernorm"), SitePattern("mlp", "post_attention_layernorm")
)
_GEMMA2 = Stack(  # the sublayer ends with a normalisation of its own, whose output is h
    "layers",
    SitePattern("post_attention_layernorm", "input_layernorm"),
    SitePattern("post_feedforward_layernorm", "pre_feedforward_layernorm"),
)
_OLMO2 = Stack(  # the same, and nothing normalises r
    "layers", SitePattern("post_attention_layernorm", "self_attn"), SitePattern("post_feedforward_layernorm", "mlp")
)
_WAV2VEC2 = Stack(
    "encoder.layers",
    SitePattern("dropout", "attention", "layer_norm"),
    SitePattern("feed_forward.output_dropout", "feed_forward", "final_layer_norm"),
    when=("do_stable_layer_norm", False),
)
_WAV2VEC2_STABLE = Stack(
    "encoder.layers",
    SitePattern("dropout", "layer_norm"),
    SitePattern("feed_forward.output_dropout", "final_layer_norm"),
    when=("do_stable_layer_norm", True),
)
_OPT = replace(_WHISPER, when=("do_layer_norm_before", True))
_OPT_350M = replace(_BART, when=("do_layer_norm_before", False))

# config.model_type -> its stacks of layers
FAMILIES: dict[str, tuple[Stack, ...]] = {
    "bert": (_BERT,),
    "roberta": (_BERT,),
    "xlm-roberta": (_BERT,),
    "camembert": (_BERT,),
    "electra": (_BERT,),
    "deberta": (_BERT,),
    "deberta-v2": (_BERT,),
    "bert-generation": (_BERT,),
    "xmod": (_XMOD,),
    "mpnet": (_MPNET,),
    "albert": (_ALBERT,),
    "distilbert": (_DISTILBERT,),
    "modernbert": (_MODERNBERT,),
    "modernbert-decoder": (_MODERNBERT,),
    "gpt2": (_GPT2,),
    "gptj": (_GPTJ,),
    "gpt_neox": (_GPT_NEOX,),
    "opt": (_OPT, _OPT_350M),
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "qwen2": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "smollm3": (_LLAMA,),
    "gemma": (_LLAMA,),
    "gemma2": (_GEMMA2,),
    "gemma3": (_CLIP, _GEMMA2),  # the images' layers and the text's
    "gemma3_text": (_GEMMA2,),
    "olmo2": (_OLMO2,),
    "phi3": (_PHI3,),
    "mixtral": (_MOE,),
    "qwen2_moe": (_MOE,),
    "qwen3_moe": (_MOE,),
    "t5": _T5,
    "mt5": _T5,
    "bart": (_BART,),
    "plbart": (_BART,),
    "mbart": (_WHISPER,),
    "whisper": (_WHISPER,),
    "wav2vec2": (_WAV2VEC2, _WAV2VEC2_STABLE),
    "vit": (_VIT,),
    "beit": (_BEIT,),
    "dinov2": (_DINOV2,),
    "clip": (_CLIP,),
    "clip_text_model": (_CLIP,),
    "clip_vision_model": (_CLIP,),
    "siglip": (_CLIP,),
    "siglip_text_model": (_CLIP,),
    "siglip_vision_model": (_CLIP,),
}
