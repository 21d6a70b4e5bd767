"""AdapterHub's folders, without its package: what is read and written, and what crashes and other processes leave."""

import json

import pytest
import torch
from hub_helpers import IDS, SIZES, assert_rejected, assert_same, bert, gpt2, randomise, rewrite, run, tiny
from safetensors.torch import save_file

from adapter_ops import load_adapter, save_adapter
from adapter_ops.integrations.adapterhub import load_adapterhub, save_adapterhub
from adapter_ops.models.config import AdapterConfig
from adapter_ops.models.tasks import active_adapter, add_adapter, list_adapters

transformers = pytest.importorskip("transformers")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())["config"]


@pytest.mark.parametrize("change, match", [(dict(model_type="roberta"), "'roberta'"), (dict(hidden_size=64), "64")])
def test_other_models(change, match, folder):
    rewrite(folder, **change)
    assert_rejected(folder, match)


def test_models_without_values_or_config(folder):
    with torch.device("meta"):
        model = bert()
    with pytest.raises(ValueError, match="meta device"):
        load_adapterhub(model, folder)
    with pytest.raises(ValueError, match="for model_type 'bert', the model has None"):
        load_adapterhub(torch.nn.Sequential(bert()), folder)
    add_adapter(model, "b", "pfeiffer", modules=())
    with pytest.raises(ValueError, match="12 of the adapter's tensors are on the meta device"):
        save_adapterhub(model, folder, "b")


def test_other_sizes_and_names(folder):
    rewrite(folder, reduction_factor=8)
    assert_rejected(folder, r"shape \(2, 32\), expected \(4, 32\)")
    rewrite(folder, reduction_factor=16, scaling="learned")
    assert_rejected(folder, r"lacks 3 of 15 keys.*adapters\.a\.scaling")
    rewrite(folder, scaling=1.0, leave_out=[1])
    assert_rejected(folder, r"4 keys that do not belong.*layer\.1\.")
    rewrite(folder, leave_out=[], name="b")
    assert_rejected(folder, r"lacks 12 of 12 keys.*adapters\.b\.")
    rewrite(folder, name="a")
    assert_rejected(folder, "a/b", name="a/b")


def test_the_loaded_adapter_trains_and_nothing_else(folder):
    model = bert()
    add_adapter(model, "other", "pfeiffer", modules=())
    assert load_adapterhub(model, folder) == "a"
    assert active_adapter(model) == "a"
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 12 and all(".a." in name for name in trained)
    assert not any(parameter.grad_fn for parameter in model.parameters())


def test_wrapped_models(folder, tmp_path):
    """A compiled model is loaded into and saved from as the model inside is."""
    plain, compiled = bert(), torch.compile(bert())
    for model in (plain, compiled):
        load_adapterhub(model, folder)
    assert plain.state_dict().keys() == compiled._orig_mod.state_dict().keys()
    save_adapterhub(compiled, tmp_path / "again", "a")
    for file in folder.iterdir():
        assert file.suffix == ".json" or same_tensors(torch.load(file), torch.load(tmp_path / "again" / file.name))


def same_tensors(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


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
    torch.save({f"bert.{k}": t for k, t in old.items()}, weights, _use_new_zipfile_serialization=False)
    rewrite(folder, non_linearity="gelu", stochastic_depth=0.1)
    with pytest.warns(UserWarning, match="stochastic_depth=0.1"):
        model = bert()
        load_adapterhub(model, folder, "new")
    assert list_adapters(model)["new"].config.activation == "gelu"
    rewrite(folder, version=None, stochastic_depth=0.0)
    load_adapterhub(model, folder, "old")
    assert list_adapters(model)["old"].config.activation == "gelu_tanh"
    rewrite(folder, non_linearity="gelu_orig")
    load_adapterhub(model, folder, "orig")
    assert list_adapters(model)["orig"].config.activation == "gelu"


def test_what_is_part_of_the_base_stays_out(folder, tmp_path):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    load_adapterhub(model, folder)
    save_adapterhub(model, tmp_path / "again", "a")
    assert all(key.startswith("bert.encoder.layer.") for key in torch.load(tmp_path / "again" / "pytorch_adapter.bin"))
    one, two = bert(), bert()
    load_adapterhub(one, folder)
    load_adapterhub(two, tmp_path / "again")
    assert_same(run(two), run(one), 0)
    model = bert()
    add_adapter(model, "task", "pfeiffer", modules="pooler")
    with pytest.warns(UserWarning, match="no room for .*part of the base.*pooler"):
        save_adapterhub(model, tmp_path / "task", "task")
    assert {path.name for path in (tmp_path / "task").iterdir()} == {"adapter_config.json", "pytorch_adapter.bin"}


def test_unknown_families_and_places(folder):
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("camembert", **SIZES))
    add_adapter(model, "a", "pfeiffer", modules=())
    with pytest.raises(ValueError, match="'camembert'; known: bart, bert"):
        save_adapterhub(model, folder, "a")
    model = bert()
    add_adapter(model, "b", AdapterConfig(layer_norms="frozen"), sites={"ffn": "layer.*.output.dense"})
    with pytest.raises(ValueError, match="sites of its own"):
        save_adapterhub(model, folder, "b")
    with pytest.raises(ValueError, match="ffn' has no entry"):
        load_adapterhub(model, folder)
    model, _ = tiny("t5")
    add_adapter(model, "a", AdapterConfig(layer_norms="frozen", leave_out=(1,)), modules=())
    with pytest.raises(ValueError, match=r"leave_out=\(1,\)"):
        save_adapterhub(model, folder, "a")


def test_pre_norm_models_get_the_residual_that_adapterhub_runs(tmp_path):
    """AdapterHub's "post_add" fails in them, and False means the same there. In post-norm models it does not."""
    config = AdapterConfig(ln_before=True, ln_after=False, layer_norms="frozen")
    for make, expected in ((gpt2, False), (bert, "post_add")):
        model = make()
        add_adapter(model, "a", config, modules=())
        randomise(model, "adapter_ops")
        save_adapterhub(model.eval(), tmp_path / make.__name__, "a")
        assert config_of(tmp_path / make.__name__)["residual_before_ln"] == expected
        assert list_adapters(model)["a"].config == config
        again = make()
        load_adapterhub(again, tmp_path / make.__name__)
        assert torch.equal(again.eval()(IDS)[0], model(IDS)[0])


# Folders of other libraries.


def our_folder(path):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    add_adapter(model, "task", "pfeiffer")
    save_adapter(model, path, "task")
    return "adapter_ops.load_adapter"


def our_first_folder(path):
    """As commit de23127 wrote it: under AdapterHub's names."""
    header = json.dumps({"format": 1, "name": "task", "base": {}, "modules": ["classifier"], "config": {}})
    path.mkdir()
    (path / "adapter_config.json").write_text(header)
    tensors = {"modules.classifier.weight": torch.ones(2, 32)}
    save_file(tensors, path / "adapter.safetensors", metadata={"adapter_config": header})
    return "save the task again"


def peft_folder(path):
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "bert"}))
    save_file({"base_model.model.lora_A.weight": torch.ones(2, 32)}, path / "adapter_model.safetensors")
    return "peft.PeftModel.from_pretrained"


def renamed_peft_folder(path):
    """Told by what it says and not by the names of its files."""
    instead = peft_folder(path)
    (path / "adapter_model.safetensors").rename(path / "adapter.safetensors")
    return instead


OTHERS = [our_folder, our_first_folder, peft_folder, renamed_peft_folder]


@pytest.mark.parametrize("make", OTHERS)
def test_other_libraries_folders_are_kept(make, tmp_path):
    """de23127 replaced our own folder, in which was a trained head."""
    make(tmp_path / "task")
    before = {path.name: path.read_bytes() for path in (tmp_path / "task").iterdir()}
    model = bert()
    add_adapter(model, "a", "pfeiffer", modules=())
    with pytest.raises(FileExistsError, match=r"holds (a task of adapter_ops|an adapter of the package peft).*: save"):
        save_adapterhub(model, tmp_path / "task", "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "task").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


@pytest.mark.parametrize("make", OTHERS)
def test_other_libraries_folders_are_not_loaded(make, tmp_path):
    assert_rejected(tmp_path / "task", make(tmp_path / "task"))


def test_what_else_is_kept(folder, tmp_path):
    model = bert()
    load_adapterhub(model, folder)
    (folder / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"also notes\.txt: save to"):
        save_adapterhub(model, folder, "a")
    (folder / "notes.txt").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(
        FileExistsError, match=r"adapter_config.json, pytorch_adapter.bin, but no adapter of AdapterHub"
    ):
        save_adapterhub(model, folder, "a")
    with pytest.raises(ValueError, match="no adapter 'b'"):
        save_adapterhub(model, folder.parent / "b", "b")
    (tmp_path / "empty").mkdir()
    save_adapterhub(model, tmp_path / "empty", "a")
    load_adapterhub(bert(), tmp_path / "empty")


def test_a_task_of_ours_beside_adapterhubs_files(folder):
    """save_adapter leaves other files alone, so a folder may hold both; each function reads its own."""
    model = bert()
    load_adapterhub(model, folder)
    save_adapter(model, folder, "a")
    one, two = bert(), bert()
    load_adapterhub(one, folder)
    load_adapter(two, folder)
    assert_same(run(one), run(two), 0)
    with pytest.raises(FileExistsError, match="holds a task of adapter_ops: save to"):
        save_adapterhub(model, folder, "a")
