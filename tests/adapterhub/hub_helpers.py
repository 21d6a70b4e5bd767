"""What the tests of AdapterHub share: models, random adapters, and outputs and gradients under AdapterHub's names."""

import copy
import importlib.util
import json
import sys

import pytest
import torch
from helpers import relative_error
from torch import nn

from adapter_ops.integrations.adapterhub import files, load_adapterhub
from adapter_ops.models.adapters import adapters_of
from adapter_ops.models.config import AdapterConfig
from adapter_ops.models.tasks import active_adapter, add_adapter, list_adapters

transformers = pytest.importorskip("transformers")
HAS_HUB = "adapters" in sys.modules or importlib.util.find_spec("adapters") is not None
needs_hub = pytest.mark.skipif(not HAS_HUB, reason="needs the package adapters")

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=60)
IDS = torch.arange(24).view(4, 6)
HEAD_FILES = {"head_config.json", "pytorch_model_head.bin"}
CONFIGS = {
    "DoubleSeqBn": {},
    "SeqBn": {},
    "ParBn": {},
    "AdapterPlus": dict(stochastic_depth=0.0),  # which asks for torchvision
    "SeqBn ln_before": dict(ln_before=True, scaling="learned"),
    "ParBn ln_before": dict(ln_before=True, scaling="channel"),
    "DoubleSeqBn ln_after": dict(ln_after=True, adapter_residual_before_ln=True, non_linearity="gelu_new"),
    "DoubleSeqBn sizes": dict(reduction_factor={"0": 3, "default": 0.7}, leave_out=[1], residual_before_ln=False),
    "SeqBn ln_after": dict(ln_after=True),
    "SeqBn dropout": dict(dropout=0.3),
    "ParBn dropout": dict(dropout=0.3),
    "SeqBn post_add": dict(original_ln_after=False, residual_before_ln="post_add", scaling=2.0),
}


def hub_config(key):
    import adapters

    return getattr(adapters, key.split()[0] + "Config")(**CONFIGS[key])


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, n_positions=8, vocab_size=60)
    return transformers.GPT2Model(config).eval()


def tiny(family):
    sizes = dict(SIZES)
    if family == "electra":
        sizes["embedding_size"] = 32
    if family == "distilbert":
        sizes = dict(dim=32, n_layers=3, n_heads=2, hidden_dim=48, vocab_size=60)
    if family == "gpt2":
        sizes = dict(n_embd=32, n_layer=3, n_head=2, vocab_size=60)
    if family == "t5":
        sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=60)
    if family in ("bart", "whisper"):
        sizes = dict(d_model=32, vocab_size=60, pad_token_id=0, num_mel_bins=8, max_source_positions=12)
        for tower in ("encoder", "decoder"):
            sizes |= {f"{tower}_layers": 2, f"{tower}_attention_heads": 2, f"{tower}_ffn_dim": 48}
    if family in ("llama", "mistral"):
        sizes["num_key_value_heads"] = 2
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **sizes)).eval()
    inputs = {"inputs_embeds": torch.randn(4, 6, 32)}
    if family in ("t5", "bart"):
        inputs["decoder_inputs_embeds"] = torch.randn(4, 6, 32)
    if family == "whisper":
        inputs = {"input_features": torch.randn(4, 8, 24), "decoder_input_ids": IDS}
    return model, inputs


def randomise(module, part):
    """Random values in every parameter with `part` in its name."""
    for name, parameter in module.named_parameters():
        if part in name:
            nn.init.normal_(parameter, std=0.3)


def hub_model(base, *keys, active=None):
    """base with an adapter of AdapterHub for each key, named "a", "b" …, random, trainable and active."""
    import adapters

    model = copy.deepcopy(base)
    adapters.init(model)
    names = "abcdefgh"[: len(keys)]
    for name, key in zip(names, keys):
        model.add_adapter(name, config=hub_config(key))
    model.set_active_adapters(active or "a")
    randomise(model, "adapters.")
    return model.eval()


def run(model, inputs=None):
    """The output, and the gradients of the input embeddings and of what trains, by name."""
    inputs = inputs or {"inputs_embeds": bert().embeddings.word_embeddings(IDS)}
    inputs = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    torch.manual_seed(1)
    y = model(**inputs).last_hidden_state
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    named |= {n: t for n, t in inputs.items() if t.requires_grad}
    found = torch.autograd.grad((y * torch.randn(y.shape)).sum(), list(named.values()), allow_unused=True)
    return {"y": y.detach(), **dict(zip(named, found))}


def assert_same(found, expected, limit=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None or not found[name].any(), name
        else:
            assert relative_error(found[name], value) <= limit, name


def ours_as_hub(model, name, results):
    """Results of a model with an adapter of ours, under AdapterHub's names."""
    adapters = adapters_of(model)
    task = adapters.task(name)
    names = {}
    for key, (site, ours) in files._keys(adapters.model, task.config, adapters.sites, name).items():
        if "adapter_norm_before" not in key:
            names[task.layer_at[site].get_parameter(ours)] = key
    own = {n: names[p] for n, p in model.named_parameters() if p in names}
    return {own.get(n, n): value for n, value in results.items()}


def hub_run(model, inputs=None):
    """`run` for AdapterHub's model: only the adapters train."""
    for name, parameter in model.named_parameters():
        # The gradient of a key's bias is zero but for rounding: softmax does not see it.
        parameter.requires_grad_(".adapters." in name or ("fusion" in name and ".key.bias" not in name))
    # A norm inside stands under two names there, of which named_parameters gives the first.
    return {n.replace("adapter_norm_before", "adapter_down.0"): g for n, g in run(model, inputs).items()}


def rewrite(folder, **changes):
    """Changes fields of a folder's config; None takes away one at the top."""
    file = folder / "adapter_config.json"
    info = json.loads(file.read_text())
    for key, value in changes.items():
        if key in info and value is None:
            del info[key]
        else:
            (info if key in info else info["config"])[key] = value
    file.write_text(json.dumps(info))


def state_of(model):
    """All that a failed load could change."""
    parameters = {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in model.modules()]
    return parameters, hooks, list_adapters(model).keys(), active_adapter(model)


def assert_rejected(folder, match, error=ValueError, **kwargs):
    """The folder is rejected, by a bare model and by one that trains another adapter; neither is changed."""
    bare, busy = bert(), bert()
    busy.embeddings.requires_grad_(False)
    add_adapter(busy, "other", AdapterConfig(bottleneck=4), modules=())
    for model in (bare, busy):
        before = state_of(model)
        with pytest.raises(error, match=match):
            load_adapterhub(model, folder, **kwargs)
        assert state_of(model) == before


def classifier(labels=2, kind="BertForSequenceClassification", **changes):
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**SIZES, num_labels=labels, **changes)).eval()


def logits(model):
    return model.eval()(input_ids=IDS).logits.detach()


def change_head(folder, **changes):
    file = folder / "head_config.json"
    info = json.loads(file.read_text())
    for key, value in changes.items():
        into = info["config"] if isinstance(info.get("config"), dict) and key not in info else info
        into.pop(key, None)
        if value is not None:
            into[key] = value
    file.write_text(json.dumps(info))


def change_head_weights(folder, **changes):
    file = folder / "pytorch_model_head.bin"
    tensors = torch.load(file)
    for key, t in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if t is not None:
            tensors[key.replace("__", ".")] = t
    torch.save(tensors, file)
