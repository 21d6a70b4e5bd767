"""Odd dtypes and devices, and models that a task must not be half added to."""

import copy
import pickle
import threading

import pytest
import torch
import transformers as hf
from helpers_tasks import STRONG, bert, logits
from torch import nn

from adapter_ops import AdapterConfig, add_adapter
from adapter_ops.models.families import SitePattern

pytestmark = pytest.mark.usefixtures("aten")


def untouched(model, trained):
    hooks = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    return not hasattr(model, "adapter_ops") and not hooks and [p.requires_grad for p in model.parameters()] == trained


def test_a_quantised_head_is_refused_before_anything_changed():
    model = bert()
    model.classifier.weight = nn.Parameter(torch.zeros(5, 32, dtype=torch.int8), requires_grad=False)
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"'classifier\.weight' has dtype torch\.int8.*leave it out with modules="):
        add_adapter(model, "t")
    assert untouched(model, trained)
    add_adapter(model, "t", modules=())


def test_a_head_that_cannot_be_copied_is_refused_before_anything_changed():
    model = bert()
    model.classifier.lock = threading.Lock()
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="'classifier' cannot be copied for a task"):
        add_adapter(model, "t")
    assert untouched(model, trained)


def test_an_adapter_takes_a_dtype_that_trains():
    model = bert(hf.BertModel).to(torch.bfloat16)
    for layer in model.encoder.layer:
        for dense in (layer.attention.output.dense, layer.output.dense):
            dense.weight = nn.Parameter(dense.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    add_adapter(model, "t")
    assert {p.dtype for p in model.adapter_ops.parameters()} == {torch.bfloat16}


def test_an_offloaded_layer_is_refused_before_anything_changed():
    model = bert()
    model.bert.encoder.layer[1].to("meta")
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"'bert\.encoder\.layer\.1' is on the meta device.*load the layer first"):
        add_adapter(model, "t", AdapterConfig(layer_norms="frozen"))
    assert untouched(model, trained)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_accelerate_offloads_a_model_with_adapters(offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = bert()
    add_adapter(model, "t", STRONG)
    expected = logits(model)
    if offload == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.adapter_ops.parameters())
    assert torch.equal(logits(model), expected)


def test_layers_that_are_not_there():
    model = bert()
    with pytest.raises(ValueError, match=r"leave_out names layers \[7\], the model has 0 to 2"):
        add_adapter(model, "t", AdapterConfig(leave_out=(1, 7)))
    with pytest.raises(ValueError, match=r"names layers \[9\], the model has 0 to 2"):
        add_adapter(model, "t", AdapterConfig(bottleneck={"9": 2, "default": 4}))
    assert not hasattr(model, "adapter_ops")


def test_the_fast_path_of_a_transformer_encoder_does_not_pass_a_task_by():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16)).eval()
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    patterns = {
        n: SitePattern(f"layers.*.dropout{i}", None, f"layers.*.norm{i}") for n, i in (("attention", 1), ("ffn", 2))
    }
    add_adapter(model, "t", AdapterConfig(bottleneck=4, init_std=0.3), sites=patterns, modules=())
    with torch.no_grad():
        for p in model.adapter_ops.parameters():
            p += torch.randn_like(p) * 0.3
    kept = ~padding
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)[kept]
        model.enable_nested_tensor = False
        for layer in model.layers:  # which takes its fast path in eval only
            layer.training = True
            layer.self_attn.dropout = layer.dropout.p = layer.dropout1.p = layer.dropout2.p = 0.0
        torch.testing.assert_close(found, model(x, src_key_padding_mask=padding)[kept])


def test_a_deep_model_pickles():
    model = bert(num_hidden_layers=24, hidden_size=8, num_attention_heads=1, intermediate_size=8)
    add_adapter(model, "t", "parallel")
    expected, others = logits(model), (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    with torch.no_grad():
        for p in model.adapter_ops.parameters():
            p += 1
    assert not torch.equal(logits(model), expected)
    for other in others:
        assert torch.equal(logits(other), expected)
