"""AdapterHub's fields and ours: what has no counterpart is refused by name, and the rest survives both ways."""

import json

import pytest
from hub_helpers import assert_rejected, rewrite

from adapter_ops.integrations.adapterhub import read_config, write_config
from adapter_ops.models.config import AdapterConfig

UNSUPPORTED = dict(
    phm_layer=True, inv_adapter="nice", invertible_adapter={"block_type": "nice"}, use_gating=True, cross_adapter=True,
    architecture="lora", non_linearity="mish", init_weights="zeros", scaling="rowwise", residual_before_ln=False,
    original_ln_after=False, unheard_of=3, output_adapter=False,
)  # fmt: skip
OF_NO_SUCH_TYPE = {
    "mh_adapter": [1],
    "output_adapter": ["yes"],
    "original_ln_before": [None],
    "ln_before": [0],
    "is_parallel": [[]],
    "residual_before_ln": [1, None, ["post_add"]],
    "non_linearity": [None, 3],
    "init_weights": [["bert"]],
    "scaling": [True, None, [1.0], float("nan"), float("inf"), 10**400],
    "dropout": ["0.1", 1.0, -0.1, float("nan")],
    "leave_out": [1, ["1"], [True]],
    "reduction_factor": [None, 0, -2, 1e-9, 5e-324, True, "16", float("inf"), {"default": None}, {"first": 2}],
    "stochastic_depth": ["0.1"],
}
SEQUENTIAL = dict(mh_adapter=False, output_adapter=True, reduction_factor=16, non_linearity="relu")


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


@pytest.mark.parametrize("field", ["is_parallel", "ln_before", "original_ln_before"])
def test_unsupported_with_ln_after(field):
    """With original_ln_before=True the outputs were others than AdapterHub's, by as much as the outputs are large."""
    fields = {**SEQUENTIAL, "ln_after": True, "adapter_residual_before_ln": True}
    assert read_config(fields).norm_position == "after"
    with pytest.raises(ValueError, match=f"{field}=True is not supported with ln_after=True: run this adapter with"):
        read_config({**fields, field: True})
    with pytest.raises(ValueError, match="ln_after=True is supported only with adapter_residual_before_ln=True"):
        read_config({**SEQUENTIAL, "ln_after": True})


@pytest.mark.parametrize("field", OF_NO_SUCH_TYPE)
def test_values_of_no_such_type(field):
    for value in OF_NO_SUCH_TYPE[field]:
        with pytest.raises(ValueError, match=rf"AdapterHub's .*{field}(=.*)? (is|has) ") as caught:
            read_config({**SEQUENTIAL, field: value})
        assert len(str(caught.value)) < 300


def test_missing_fields():
    for field in SEQUENTIAL:
        with pytest.raises(ValueError, match=f"{field}=None is missing"):
            read_config({key: value for key, value in SEQUENTIAL.items() if key != field})


@pytest.mark.parametrize(
    "field, value", [("layer_norms", "train"), ("depth", 2), ("norm", "batch"), ("norm_position", "after")]
)
@pytest.mark.parametrize("wiring", [{}, dict(ln_before=True), dict(placement="parallel")])
def test_what_adapterhub_cannot_express(field, value, wiring):
    fields = {"layer_norms": "frozen", field: value, **wiring}
    if field == "norm_position":
        fields["norm"] = "layer"
    config = AdapterConfig(**fields)
    if field == "norm_position" and not wiring:
        assert write_config(config, 32)["adapter_residual_before_ln"]
        return
    with pytest.raises(ValueError, match=f"{field}=.*adapter_ops.save_adapter, or train one with {field}="):
        write_config(config, 32)


def test_a_residual_counted_twice():
    config = AdapterConfig(layer_norms="frozen", ln_before=True, residual="input")
    with pytest.raises(ValueError, match=r"residual='input' with .* ln_after=True.*residual='output'"):
        write_config(config, 32)


@pytest.mark.parametrize("bottleneck", [1, 7, 8, 100, 768, 1000, {"0": 7, "default": 12}])
@pytest.mark.parametrize("hidden_size", [768, 100, 33])
def test_sizes_survive(bottleneck, hidden_size):
    config = AdapterConfig(bottleneck=bottleneck, layer_norms="frozen")
    back = read_config(json.loads(json.dumps(write_config(config, hidden_size))))
    for layer in range(2):
        assert back.size(layer, hidden_size) == config.size(layer, hidden_size)
    assert read_config(write_config(back, hidden_size)) == back
