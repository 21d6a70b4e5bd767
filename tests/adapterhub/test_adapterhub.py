"""Folders of AdapterHub, against the package `adapters` itself.

That package needs transformers 4, so most of this runs in an environment of its own, and skips elsewhere.
"""

import copy
import importlib.util
import json
import os

import pytest
import torch
from helpers import relative_error
from torch import nn

from adapter_ops import ops
from adapter_ops.config import PRESETS, AdapterConfig
from adapter_ops.inject import adapters_of, add_adapter, set_active_adapter
from adapter_ops.integrations import adapterhub
from adapter_ops.integrations.adapterhub import load_adapterhub, read_config, save_adapterhub, write_config

transformers = pytest.importorskip("transformers")
needs_hub = pytest.mark.skipif(importlib.util.find_spec("adapters") is None, reason="needs the package adapters")

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=60)
IDS = torch.arange(24).view(4, 6)
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


@pytest.fixture(autouse=True)
def no_small_calls(monkeypatch):
    monkeypatch.setattr(ops, "SMALL", 0)  # else small calls would take plain PyTorch


def hub_config(key):
    import adapters

    return getattr(adapters, key.split()[0] + "Config")(**CONFIGS[key])


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


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
    config = adapters.tasks[name].config
    sites = [slot.site for slot in adapters.all_slots() if name in slot.adapters]
    names = {
        f"adapter_ops.slots.{place.replace('.', '/')}.adapters.{name}.{ours}": key
        for key, (place, ours) in adapterhub._keys(model, config, sites, name).items()
        if "adapter_norm_before" not in key
    }
    return {names.get(key, key): value for key, value in results.items()}


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


@needs_hub
@pytest.mark.parametrize("key", [key for key in CONFIGS if key != "SeqBn ln_after"])
def test_reads_what_adapterhub_writes(key, tmp_path):
    base = bert()
    hub = hub_model(base, key)
    hub.save_adapter(str(tmp_path / "a"), "a")
    expected = hub_run(hub)
    assert load_adapterhub(base, tmp_path / "a") == "a"
    assert_same(ours_as_hub(base, "a", run(base)), expected)
    if "ln_before" in key:
        return  # AdapterHub cannot write these as safetensors
    hub.save_adapter(str(tmp_path / "safe"), "a", use_safetensors=True)
    assert os.listdir(tmp_path / "safe") != os.listdir(tmp_path / "a")
    load_adapterhub(base, tmp_path / "safe", "other")
    assert_same(ours_as_hub(base, "other", run(base)), {k.replace(".a.", ".other."): v for k, v in expected.items()})
    set_active_adapter(base, None)
    assert_same({"y": base(IDS).last_hidden_state}, {"y": bert()(IDS).last_hidden_state}, 0)


@needs_hub
@pytest.mark.parametrize("key", [key for key in CONFIGS if key != "SeqBn ln_after"])
def test_adapterhub_reads_what_we_write(key, tmp_path):
    import adapters

    base = bert()
    add_adapter(base, "a", read_config(hub_config(key).to_dict()), modules=())
    randomise(base.eval(), "adapter_ops")
    save_adapterhub(base, tmp_path / "a", "a")
    hub = bert()
    adapters.init(hub)
    loading_info = {}
    hub.load_adapter(str(tmp_path / "a"), set_active=True, loading_info=loading_info)
    assert not loading_info["missing_keys"] and not loading_info["unexpected_keys"]
    assert_same(ours_as_hub(base, "a", run(base)), hub_run(hub.eval()))


@needs_hub
@pytest.mark.parametrize("preset, key", [("pfeiffer", "SeqBn"), ("parallel", "ParBn"), ("adapter_plus", "AdapterPlus")])
def test_presets_mean_adapterhubs_configs(preset, key):
    config = hub_config(key).to_dict()
    assert read_config(config) == PRESETS[preset]
    written = write_config(PRESETS[preset], 768)
    assert {k: v for k, v in config.items() if k in written} | {"leave_out": []} == written


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


@needs_hub
@pytest.mark.parametrize("key", ["DoubleSeqBn", "SeqBn", "ParBn", "AdapterPlus"])
@pytest.mark.parametrize("family", sorted((adapterhub._INSIDE | adapterhub._BESIDE) - {"bert"}))
def test_families(family, key, tmp_path):
    base, inputs = tiny(family)
    hub = hub_model(base, key)
    hub.save_adapter(str(tmp_path / "a"), "a")
    load_adapterhub(base, tmp_path / "a")
    assert_same(ours_as_hub(base, "a", run(base, inputs)), hub_run(hub, inputs))


# From here on nothing needs the package.


@pytest.fixture
def folder(tmp_path):
    """A folder with a random "pfeiffer" adapter "a" for bert()."""
    model = bert()
    add_adapter(model, "a", "pfeiffer", modules=())
    randomise(model, "adapter_ops")
    save_adapterhub(model, tmp_path / "a", "a")
    return tmp_path / "a"


def assert_rejected(folder, match, error=ValueError, **kwargs):
    """The folder is rejected, by a bare model and by one that trains another adapter; neither is changed."""
    bare, busy = bert(), bert()
    busy.embeddings.requires_grad_(False)
    add_adapter(busy, "other", AdapterConfig(bottleneck=4), modules=())
    for model in (bare, busy):
        state = {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()}
        active = getattr(getattr(model, "adapter_ops", None), "active", None)
        with pytest.raises(error, match=match):
            load_adapterhub(model, folder, **kwargs)
        assert {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()} == state
        assert getattr(getattr(model, "adapter_ops", None), "active", None) == active
        assert hasattr(model, "adapter_ops") == (model is busy)
        assert not any(m._forward_hooks for m in bare.modules())


UNSUPPORTED = dict(
    phm_layer=True, inv_adapter="nice", invertible_adapter={"block_type": "nice"}, use_gating=True, cross_adapter=True,
    architecture="lora", non_linearity="mish", init_weights="zeros", scaling="rowwise", residual_before_ln=False,
    original_ln_after=False, ln_after=True, unheard_of=3,
)  # fmt: skip


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_unsupported_fields(field, folder):
    rewrite(folder, **{field: UNSUPPORTED[field]})
    named = "residual_before_ln=True" if field == "original_ln_after" else f"{field}={UNSUPPORTED[field]!r}"
    assert_rejected(folder, named.replace("{", "\\{"))


@pytest.mark.parametrize(
    "field, value", [("mh_adapter", True), ("output_adapter", False), ("original_ln_after", False)]
)
def test_unsupported_in_parallel(field, value, folder):
    rewrite(folder, is_parallel=True, **{field: value})
    assert_rejected(folder, f"{field}={value}")


@pytest.mark.parametrize("change, match", [(dict(model_type="roberta"), "'roberta'"), (dict(hidden_size=64), "64")])
def test_other_models(change, match, folder):
    rewrite(folder, **change)
    assert_rejected(folder, match)


def test_other_sizes_and_names(folder):
    rewrite(folder, reduction_factor=8)
    assert_rejected(folder, r"shape \(2, 32\), expected \(4, 32\)")
    rewrite(folder, reduction_factor=16, scaling="learned")
    assert_rejected(folder, r"lack 3 of 15 keys.*adapters\.a\.scaling")
    rewrite(folder, scaling=1.0, leave_out=[1])
    assert_rejected(folder, r"4 keys that do not belong.*layer\.1\.")
    rewrite(folder, leave_out=[], name="b")
    assert_rejected(folder, r"lack 12 of 12 keys.*adapters\.b\.")
    rewrite(folder, name="a")
    assert_rejected(folder, "a/b", name="a/b")


def test_files_that_cannot_be_read(folder, tmp_path):
    from safetensors.torch import save_file

    weights, safe, config = (folder / n for n in ("pytorch_adapter.bin", "adapter.safetensors", "adapter_config.json"))
    tensors, good = torch.load(weights), weights.read_bytes()
    for bad in (good[: len(good) // 2], good[:-50], b"", b"x"):
        weights.write_bytes(bad)
        assert_rejected(folder, "pytorch_adapter.bin cannot be read")
    torch.save({"key": tmp_path}, weights)  # a pickle of more than tensors
    assert_rejected(folder, "pytorch_adapter.bin cannot be read")
    torch.save([1], weights)
    assert_rejected(folder, "pytorch_adapter.bin cannot be read")
    torch.save(dict.fromkeys(tensors), weights)
    assert_rejected(folder, r"shape \(\)")
    save_file(tensors, safe)
    load_adapterhub(bert(), folder)  # safetensors comes first
    safe.write_bytes(safe.read_bytes()[:-20])
    assert_rejected(folder, "adapter.safetensors cannot be read")
    safe.unlink(), weights.unlink()
    assert_rejected(folder, "pytorch_adapter.bin", FileNotFoundError)
    config.write_text(config.read_text()[:-20])
    assert_rejected(folder, "adapter_config.json is no adapter's config")
    config.write_text('{"config": "pfeiffer", "name": "a"}')
    assert_rejected(folder, "adapter_config.json is no adapter's config")
    config.unlink()
    assert_rejected(folder, "adapter_config.json", FileNotFoundError)


def test_a_taken_name(folder):
    model = bert()
    load_adapterhub(model, folder)
    before = run(model)
    with pytest.raises(ValueError, match="already has an adapter 'a'"):
        load_adapterhub(model, folder)
    assert_same(run(model), before, 0)


def test_first_releases(folder):
    """No version: "gelu" is tanh GELU; and modules had other names."""
    weights = folder / "pytorch_adapter.bin"
    old = {k.replace(".adapters.", ".layer_text_task_adapters."): t for k, t in torch.load(weights).items()}
    torch.save({f"bert.{k}": t for k, t in old.items()}, weights)
    rewrite(folder, non_linearity="gelu", stochastic_depth=0.1)
    with pytest.warns(UserWarning, match="stochastic_depth=0.1"):
        model = bert()
        load_adapterhub(model, folder, "new")
    assert adapters_of(model).tasks["new"].config.activation == "gelu"
    rewrite(folder, version=None, stochastic_depth=0.0)
    load_adapterhub(model, folder, "old")
    assert adapters_of(model).tasks["old"].config.activation == "gelu_tanh"
    rewrite(folder, non_linearity="gelu_orig")
    load_adapterhub(model, folder, "orig")
    assert adapters_of(model).tasks["orig"].config.activation == "gelu"


def test_heads_stay_out(folder, tmp_path):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    load_adapterhub(model, folder)
    save_adapterhub(model, tmp_path / "again", "a")
    assert all(key.startswith("bert.encoder.layer.") for key in torch.load(tmp_path / "again" / "pytorch_adapter.bin"))
    one, two = bert(), bert()
    load_adapterhub(one, folder)
    load_adapterhub(two, tmp_path / "again")
    assert_same(run(two), run(one), 0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    add_adapter(model, "task", "pfeiffer")
    with pytest.warns(UserWarning, match="classifier.weight"):
        save_adapterhub(model, tmp_path / "task", "task")


def test_saving_is_all_or_nothing(folder, monkeypatch):
    model = bert()
    load_adapterhub(model, folder)
    before = (folder / "pytorch_adapter.bin").read_bytes()
    torch.manual_seed(5)
    randomise(model, "adapter_ops")
    real, failed = os.replace, []

    def full(*args):
        raise OSError("disk full")

    def full_once(source, target):
        if target == folder and not failed:
            failed.append(source)
            full()
        real(source, target)

    for module, name, fail in ((torch, "save", full), (os, "replace", full_once)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(OSError, match="disk full"):
                save_adapterhub(model, folder, "a")
        assert [path.name for path in folder.parent.iterdir()] == ["a"]
        assert (folder / "pytorch_adapter.bin").read_bytes() == before
    save_adapterhub(model, folder, "a")
    assert (folder / "pytorch_adapter.bin").read_bytes() != before
    assert [path.name for path in folder.parent.iterdir()] == ["a"]
    (folder / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="also holds notes"):
        save_adapterhub(model, folder, "a")
    with pytest.raises(ValueError, match="no adapter 'b'"):
        save_adapterhub(model, folder.parent / "b", "b")


@pytest.mark.parametrize(
    "field, value",
    [("layer_norms", "train"), ("depth", 2), ("norm", "batch"), ("ln_after", False), ("norm_position", "after")],
)
def test_what_adapterhub_cannot_express(field, value):
    fields = {"layer_norms": "frozen", field: value}
    if field == "norm_position":
        fields |= dict(norm="layer", placement="parallel")
    with pytest.raises(ValueError, match=f"{field}="):
        write_config(AdapterConfig(**fields), 32)


@pytest.mark.parametrize("bottleneck", [1, 7, 8, 100, 768, 1000, {"0": 7, "default": 12}])
@pytest.mark.parametrize("hidden_size", [768, 100, 33])
def test_sizes_survive(bottleneck, hidden_size):
    config = AdapterConfig(bottleneck=bottleneck, layer_norms="frozen")
    back = read_config(json.loads(json.dumps(write_config(config, hidden_size))))
    for layer in range(2):
        assert back.size(layer, hidden_size) == config.size(layer, hidden_size)
    assert read_config(write_config(back, hidden_size)) == back


def test_unknown_families_and_places(folder):
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("camembert", **SIZES))
    add_adapter(model, "a", "pfeiffer", modules=())
    with pytest.raises(ValueError, match="'camembert'; known: bart, bert"):
        save_adapterhub(model, folder, "a")
    model = bert()
    add_adapter(model, "b", AdapterConfig(layer_norms="frozen"), places={"ffn": "layer.*.output.dense"})
    with pytest.raises(ValueError, match="places of its own"):
        save_adapterhub(model, folder, "b")
    with pytest.raises(ValueError, match="ffn' has no entry"):
        load_adapterhub(model, folder)
    model, _ = tiny("t5")
    add_adapter(model, "a", AdapterConfig(layer_norms="frozen", leave_out=(1,)), modules=())
    with pytest.raises(ValueError, match=r"leave_out=\(1,\)"):
        save_adapterhub(model, folder, "a")
