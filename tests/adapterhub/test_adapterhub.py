"""Folders of AdapterHub, against the package `adapters` itself.

That package needs transformers 4, so this runs in an environment of its own, and skips elsewhere.
"""

import os

import pytest
from hub_helpers import (
    CONFIGS,
    IDS,
    assert_same,
    bert,
    hub_config,
    hub_model,
    hub_run,
    needs_hub,
    ours_as_hub,
    randomise,
    run,
    tiny,
)

from adapter_ops.integrations.adapterhub import files, load_adapterhub, read_config, save_adapterhub, write_config
from adapter_ops.models.config import PRESETS
from adapter_ops.models.tasks import add_adapter, set_active_adapter

pytestmark = needs_hub


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


@pytest.mark.parametrize("preset, key", [("pfeiffer", "SeqBn"), ("parallel", "ParBn"), ("adapter_plus", "AdapterPlus")])
def test_presets_mean_adapterhubs_configs(preset, key):
    config = hub_config(key).to_dict()
    assert read_config(config) == PRESETS[preset]
    written = write_config(PRESETS[preset], 768)
    assert {k: v for k, v in config.items() if k in written} | {"leave_out": []} == written


@pytest.mark.parametrize("key", ["DoubleSeqBn", "SeqBn", "ParBn", "AdapterPlus"])
@pytest.mark.parametrize("family", sorted((files._INSIDE | files._BESIDE) - {"bert"}))
def test_families(family, key, tmp_path):
    base, inputs = tiny(family)
    hub = hub_model(base, key)
    hub.save_adapter(str(tmp_path / "a"), "a")
    load_adapterhub(base, tmp_path / "a")
    assert_same(ours_as_hub(base, "a", run(base, inputs)), hub_run(hub, inputs))


def test_a_name_that_adapterhub_does_not_allow(tmp_path):
    """A "." is allowed in our names alone."""
    import adapters

    base, hub = bert(), bert()
    add_adapter(base, "a.1", "pfeiffer", modules=())
    randomise(base.eval(), "adapter_ops")
    save_adapterhub(base, tmp_path / "a", "a.1")
    adapters.init(hub)
    assert hub.load_adapter(str(tmp_path / "a"), set_active=True) == "a_1"
    assert_same({"y": hub.eval()(IDS).last_hidden_state}, {"y": base(IDS).last_hidden_state})
    assert load_adapterhub(base, tmp_path / "a") == "a_1"
