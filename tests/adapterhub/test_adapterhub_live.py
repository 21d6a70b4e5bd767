"""AdapterHub's live modules made fast, against the package `adapters` itself: same outputs, same gradients."""

import copy
import sys

import pytest
import torch
from hub_helpers import (
    CONFIGS,
    IDS,
    assert_same,
    bert,
    hub_model,
    hub_run,
    needs_hub,
    randomise,
)
from torch import nn

from adapter_ops.integrations.adapterhub import accelerate, live


def assert_accelerated(model):
    """accelerate() changes no output and no gradient; returns its report."""
    expected = hub_run(model)
    report = accelerate(model)
    assert_same(hub_run(model), expected)
    return report


@needs_hub
@pytest.mark.parametrize("key", [key for key in CONFIGS if key != "SeqBn ln_after"])
def test_accelerate_single(key, monkeypatch):
    model = hub_model(bert(), key)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    report = assert_accelerated(model)
    assert len(report) == {"DoubleSeqBn": 6, "DoubleSeqBn sizes": 4, "DoubleSeqBn ln_after": 6}.get(key, 3)
    assert all(swap.swapped == ("ln_after" not in key) for swap in report)
    assert accelerate(model) == report
    assert_same(dict(model.state_dict()), before, 0)
    calls = []
    fused = live.bottleneck_adapter
    monkeypatch.setattr(live, "bottleneck_adapter", lambda *a, **k: calls.append(1) or fused(*a, **k))
    model(IDS)
    assert len(calls) == sum(swap.swapped for swap in report)


def compositions():
    from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack

    return {
        "Stack": Stack("a", "b", "c"),
        "Parallel": Parallel("a", "b", "c"),
        "BatchSplit": BatchSplit("a", "b", batch_sizes=[3, 1]),
        "Average": Average("a", "b", weights=[0.3, 0.7]),
        "Split": Split("a", "b", splits=[2, 4]),
        "Fuse": Fuse("a", "b", "c"),
        "Stack of Fuse": Stack("a", Fuse("b", "c")),
        "Stack of Parallel": Stack("a", Parallel("b", "c")),
        "Parallel of Stack": Parallel(Stack("a", "b"), "c"),
        "Fuse of Stack": Fuse(Stack("a", "b"), "c"),
    }


NAMES = ["Stack", "Parallel", "BatchSplit", "Average", "Split", "Fuse"]
NAMES += ["Stack of Fuse", "Stack of Parallel", "Parallel of Stack", "Fuse of Stack"]


def composed(composition, *keys):
    setup = compositions()[composition]
    model = hub_model(bert(), *keys)
    if "Fuse" in composition:
        model.add_adapter_fusion((setup[1] if composition == "Stack of Fuse" else setup).name.split(","))
    model.set_active_adapters(setup)
    randomise(model, "fusion")
    return model.eval()


@needs_hub
@pytest.mark.parametrize("keys", [("SeqBn", "SeqBn ln_before", "SeqBn"), ("DoubleSeqBn",) * 3, ("ParBn",) * 3])
@pytest.mark.parametrize("composition", NAMES)
def test_accelerate_compositions(composition, keys):
    if keys[0] == "ParBn" and "Parallel" in composition:
        pytest.skip("AdapterHub itself fails on parallel adapters under Parallel")
    report = assert_accelerated(composed(composition, *keys))
    assert all(swap.swapped for swap in report)
    if "Fuse" in composition and keys[0] != "ParBn":
        assert all("AdapterFusion" in swap.reason for swap in report)


@needs_hub
@pytest.mark.parametrize("composition", NAMES)
def test_accelerate_beside_an_adapter_it_leaves(composition):
    report = assert_accelerated(composed(composition, "SeqBn ln_after", "SeqBn", "SeqBn"))
    assert sorted({(swap.path[-1], swap.swapped) for swap in report}) == [("a", False), ("b", True), ("c", True)]


@needs_hub
def test_fusion_added_later():
    from adapters.composition import Fuse

    model = hub_model(bert(), "SeqBn", "SeqBn")
    fast = copy.deepcopy(model)
    accelerate(fast)
    for m in (model, fast):
        torch.manual_seed(0)
        m.add_adapter_fusion(["a", "b"])
        m.set_active_adapters(Fuse("a", "b"))
        m.eval()
    assert_same(hub_run(fast), hub_run(model))


class RowDrop(nn.Module):
    def forward(self, x):
        return x * (torch.rand(x.shape[0], 1, 1) > 0.5) * 2 if self.training else x


@needs_hub
@pytest.mark.parametrize("key", ["SeqBn dropout", "ParBn dropout"])
@pytest.mark.parametrize("drop_path", [False, True])
def test_accelerate_in_training(key, drop_path):
    model = hub_model(bert(), key)
    if drop_path:  # what stochastic_depth puts there, for which AdapterHub needs torchvision
        for layer in model.encoder.layer:
            layer.output.adapters["a"].DropPath = RowDrop()
    report = assert_accelerated(model.train())
    assert all(swap.swapped for swap in report)


@needs_hub
def test_swapped_models_copy():
    model = hub_model(bert(), "SeqBn")
    accelerate(model)
    layer = copy.deepcopy(model).encoder.layer[0].output
    assert layer.adapters["a"].layer is layer


@needs_hub
@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(phm_layer=True, reduction_factor=8), "PHMLayer"),
        (dict(use_gating=True), "use_gating"),
        (dict(non_linearity="mish"), "mish"),
        (dict(ln_after=True), "ln_after"),
    ],
)
def test_accelerate_leaves(changes, reason):
    import adapters

    model = bert()
    adapters.init(model)
    model.add_adapter("a", config=adapters.SeqBnConfig(**changes), set_active=True)
    randomise(model, "adapters.")
    report = assert_accelerated(model.eval())
    assert [swap.path for swap in report] == [f"encoder.layer.{i}.output.adapters.a" for i in range(3)]
    assert not any(swap.swapped for swap in report) and all(reason in swap.reason for swap in report)


@needs_hub
def test_accelerate_asked_for_gating_scores():
    model = hub_model(bert(), "SeqBn")
    accelerate(model)
    out = model.encoder.layer[0].output.adapters["a"](torch.ones(1, 2, 32), torch.ones(1, 2, 32), output_gating=True)
    assert all(isinstance(t, torch.Tensor) for t in out)


def test_accelerate_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "adapters.methods.bottleneck", None)
    with pytest.raises(ImportError, match="pip install adapters"):
        accelerate(bert())
