"""Models of which accelerate has moved parameters to other memory or to a disk."""

import pytest
import torch
import transformers as hf
from accelerate import cpu_offload, disk_offload, dispatch_model
from helpers_models import CONFIG, TEXT, bert, run, strengthen

from adapter_ops import (
    AdapterConfig,
    BottleneckAdapter,
    add_adapter,
    delete_adapter,
    load_adapter,
    save_adapter,
    set_active_adapter,
    task_state_dict,
    using_adapter,
)

pytestmark = pytest.mark.usefixtures("aten")

CPU = torch.device("cpu")
CONFIGS = {
    "houlsby": CONFIG,
    "learned scale and norms inside": AdapterConfig(4, scale="learned", norm="layer", depth=2),
    "parallel": AdapterConfig(4, placement="parallel", layer_norms="frozen"),
    "adapter_plus": AdapterConfig(
        4, placement=("ffn",), ln_before=True, ln_after=False, residual="input", scale="channel"
    ),
}


def to_cpu(model, folder):
    return cpu_offload(model, execution_device=CPU)


def to_disk(model, folder):
    disk_offload(model, folder, execution_device=CPU)
    return model


def preloaded(model, folder):
    disk_offload(model, folder, execution_device=CPU, preload_module_classes=["BottleneckAdapter"])
    return model


def on_two_devices(model, folder):
    """A layer and the head on a disk, the rest in memory, as `device_map` does."""
    where = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk"}
    where |= {"bert.pooler": "cpu", "classifier": "disk", "dropout": "cpu"}
    if "adapter_ops" in model._modules:
        where["adapter_ops"] = "disk"
    return dispatch_model(model, where, main_device="cpu", offload_dir=folder)


each_way = pytest.mark.parametrize("offload", [to_cpu, to_disk, preloaded, on_two_devices])


@each_way
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_model_with_adapters_is_offloaded(offload, config, tmp_path):
    """The adapters' parameters are brought in where they are read, and go out again."""
    model, plain = bert(), bert()
    base = run(plain)
    for m in (model, plain):
        torch.manual_seed(3)
        add_adapter(m, "t", config)
        strengthen(m)
    offload(model, tmp_path)
    up = next(m for m in model.adapter_ops.modules() if isinstance(m, BottleneckAdapter)).up.weight
    assert up.is_meta
    for _ in range(2):
        assert torch.equal(run(model), run(plain)) and not torch.allclose(run(plain), base)
        with using_adapter(model, None):
            assert torch.equal(run(model), base)
    assert all(p.is_meta for p in model.adapter_ops.parameters())
    delete_adapter(model, "t")
    assert torch.equal(run(model), base)


@each_way
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_an_adapter_in_a_model_that_is_offloaded_already(offload, config, tmp_path):
    """It gets the values of what it copies, and stays on the device where the layer runs."""
    model, plain = offload(bert(), tmp_path / "off"), bert()
    base = run(model)
    for m in (model, plain):
        torch.manual_seed(3)
        add_adapter(m, "t", config)
        strengthen(m)
    assert {p.device for p in model.adapter_ops.parameters()} == {CPU}
    trained = run(plain)
    assert torch.equal(run(model), trained) and not torch.allclose(trained, base)
    save_adapter(model, tmp_path / "saved", "t")
    delete_adapter(model, "t")
    assert torch.equal(run(model), base)
    load_adapter(model, tmp_path / "saved")
    assert torch.equal(run(model), trained)
    set_active_adapter(model, None)
    add_adapter(model, "more", config)
    set_active_adapter(model, "t")
    assert torch.equal(run(model), trained)
    assert not any("_hf_hook" in m.__dict__ for m in model.adapter_ops.modules())


def test_from_pretrained_with_a_layer_on_a_disk(tmp_path):
    plain = bert()
    plain.save_pretrained(tmp_path / "base")
    where = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk"}
    where |= {"bert.pooler": "cpu", "classifier": "cpu"}
    model = hf.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", device_map=where, offload_folder=tmp_path / "off"
    )
    for m in (model, plain):
        torch.manual_seed(3)
        add_adapter(m, "t", CONFIG)
        strengthen(m)
    assert torch.equal(run(model), run(plain))


def test_a_layer_that_no_hook_brings_in_is_refused():
    """Parameters on the meta device, in a model that has others: before anything has changed."""
    for path, config, expected in (
        ("bert.encoder.layer.1", AdapterConfig(4, layer_norms="frozen"), "has no device: load the layer first"),
        ("bert.encoder.layer.1.output.LayerNorm", CONFIG, "layer_norms='frozen'"),
        ("classifier", CONFIG, "a head with modules="),
    ):
        model = bert()
        model.get_submodule(path).to("meta")
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        with pytest.raises(ValueError, match=expected):
            add_adapter(model, "t", config)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
        assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


def test_an_offloaded_task_is_not_saved_without_its_values(tmp_path):
    model = bert()
    add_adapter(model, "t", CONFIG)
    to_cpu(model, None)
    with pytest.raises(ValueError, match="meta"):
        save_adapter(model, tmp_path / "saved", "t")
    assert not (tmp_path / "saved").exists()
    assert all(t.is_meta for t in task_state_dict(model, "t").values())


def test_float8_weights():
    """The adapter takes the dtype of the nearest parameter that can be trained, not that of an fp8 weight."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=1)
    model = hf.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    add_adapter(model, "t", CONFIG)
    assert {p.dtype for p in model.adapter_ops.task("t").parameters()} == {torch.bfloat16}


def test_a_quantised_head_is_refused():
    model = bert()
    model.classifier.weight = torch.nn.Parameter(torch.zeros(2, 16, dtype=torch.int8), requires_grad=False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"'classifier.weight' has dtype torch.int8, which cannot be trained"):
        add_adapter(model, "t", CONFIG)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert "adapter_ops" not in model._modules
