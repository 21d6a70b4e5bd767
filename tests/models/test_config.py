"""AdapterConfig: any value of any field is a config that works, or a ValueError that names the field."""

import dataclasses
import itertools

import numpy as np
import pytest
from helpers_models import bert

from adapter_ops import AdapterConfig, add_adapter, save_adapter
from adapter_ops.models import disk
from adapter_ops.models.config import PRESETS

VALUES = [None, True, False, 0, -1, 1, 4.5, 1e308, "", "x", "learned", "parallel", [], [1], [["attention"]]]
VALUES += [["attention", "ffn"], {}, {"default": 4}, {"default": None}, {"1": 2}, {"default": 4, "1": "x"}, 10**30]
VALUES += [10**400, 5e-324, "../../etc", "\u0000", [None], {"default": {"default": 1}}, float("inf"), float("nan")]
VALUES += [{"default": 4, "x": 2}, np.float32(2), np.int64(3), np.float32("nan")]


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(AdapterConfig)])
def test_any_value_is_a_config_or_a_value_error_that_names_the_field(field):
    for value in VALUES:
        try:
            config = AdapterConfig(**{field: value})
        except ValueError as error:
            assert field in str(error)
            continue
        assert AdapterConfig.from_json(config.to_json()) == config
        try:
            assert 1 <= config.size(0, 768) <= 1 << 20
        except ValueError as error:
            assert "reduction_factor" in str(error)


def test_numbers_of_numpy_become_pythons():
    config = AdapterConfig(scale=np.float32(2), bottleneck=np.int64(4), dropout=np.float64(0.5))
    assert [type(v) for v in (config.scale, config.bottleneck, config.dropout)] == [float, int, float]


@pytest.mark.parametrize("text", ["[]", "1", "null", '"a"', "{", '{"depth": 1000000}', '{"bottleneck": 1e400}'])
def test_texts_that_are_no_config(text):
    with pytest.raises(ValueError):
        AdapterConfig.from_json(text)


def test_what_an_adapter_reads_and_adds_to():
    kinds = [("ffn",), "parallel"], [False, True], ["output", "input"], [False, True], [False, True]
    for placement, ln_before, residual, ln_after, has_norm in itertools.product(*kinds):
        fields = dict(placement=placement, ln_before=ln_before, residual=residual, ln_after=ln_after)
        if not ln_after and not ln_before:
            continue
        if placement == "parallel" and ln_before:
            with pytest.raises(ValueError, match=r"placement=.parallel. with ln_before=True, ln_after=.*: .*beside"):
                AdapterConfig(**fields)
            continue
        if placement == "parallel":
            expected = "input", "output"
        elif not ln_before:
            expected = "output", "output"
        elif has_norm:
            expected = "norm", "norm" if residual == "input" else "sum"
        else:  # the model adds r itself: twice with both flags, as in AdapterHub
            expected = "sum", "sum" if residual == "input" and ln_after else "output"
        assert AdapterConfig(**fields).wiring(has_norm) == expected
    assert PRESETS["pfeiffer"].wiring(True).reads == "norm"
    with pytest.raises(ValueError, match="ln_after=False"):
        AdapterConfig(placement="parallel", ln_after=False)


CONFIGS = [
    AdapterConfig(bottleneck={"default": 4, 1: 8}, leave_out=(0,), norm="layer", scale="channel"),
    AdapterConfig(reduction_factor=3.5, placement="parallel", activation="relu", dropout=0.1, layer_norms="frozen"),
]


@pytest.mark.parametrize("config", [*CONFIGS, *PRESETS.values()])
def test_saved_and_read_again(config, tmp_path):
    config.save_pretrained(tmp_path / "a/b")
    assert AdapterConfig.from_pretrained(str(tmp_path / "a/b")) == config
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["adapter_ops_config.json"]
    CONFIGS[0].save_pretrained(tmp_path / "a/b")
    assert AdapterConfig.from_pretrained(tmp_path / "a/b") == CONFIGS[0]


def test_the_config_of_a_saved_task(tmp_path):
    model = bert()
    add_adapter(model, "t", CONFIGS[0])
    save_adapter(model, tmp_path, "t")
    assert AdapterConfig.from_pretrained(tmp_path) == CONFIGS[0]


@pytest.mark.parametrize(
    "name, text, error, message",
    [
        ("other.json", "{}", FileNotFoundError, r"has no adapter_ops.safetensors or adapter_ops_config.json"),
        ("adapter_ops_config.json", "{", ValueError, r"adapter_ops_config.json is no valid JSON"),
        ("adapter_ops_config.json", '{"bottleneck": 0}', ValueError, r"t: bottleneck is 0, expected whole numbers"),
        ("adapter_ops_config.json", '{"size": 8}', ValueError, r"t: unknown fields \['size'\]; known: "),
        ("adapter_config.json", '{"peft_type": "LORA"}', ValueError, r"belongs to a PEFT adapter"),
        ("adapter_ops.safetensors", "", ValueError, r"is cut off or no safetensors file"),
    ],
)
def test_folders_without_a_config(tmp_path, name, text, error, message):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / name).write_text(text)
    with pytest.raises(error, match=message):
        AdapterConfig.from_pretrained(tmp_path / "t")


def test_a_failed_save_of_a_config_leaves_the_old_one(tmp_path, monkeypatch):
    CONFIGS[0].save_pretrained(tmp_path)
    monkeypatch.setattr(disk.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        CONFIGS[1].save_pretrained(tmp_path)
    assert AdapterConfig.from_pretrained(tmp_path) == CONFIGS[0] and len(list(tmp_path.iterdir())) == 1
