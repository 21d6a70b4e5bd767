"""AdapterConfig: any value of any field is a config that works, or a ValueError that names the field."""

import dataclasses
import itertools

import numpy as np
import pytest

from adapter_ops import AdapterConfig
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


def test_what_an_adapter_reads():
    for placement, ln_before, has_norm in itertools.product([("ffn",), "parallel"], [False, True], [False, True]):
        if placement == "parallel" and ln_before:
            with pytest.raises(ValueError, match=r"placement=.parallel. with ln_before=True, ln_after=True: .*beside"):
                AdapterConfig(placement=placement, ln_before=ln_before)
            continue
        reads = AdapterConfig(placement=placement, ln_before=ln_before).reads(has_norm)
        kind = "input" if placement == "parallel" else ("norm" if has_norm else "sum") if ln_before else "output"
        assert reads == kind
    assert PRESETS["pfeiffer"].reads(True) == "norm"
    with pytest.raises(ValueError, match="ln_after=False"):
        AdapterConfig(placement="parallel", ln_after=False)
