"""Models inside wrappers, wrappers that torch and others put around them, and models whose parameters are elsewhere."""

import pytest
import torch
import torch.distributed as dist
from helpers_models import CONFIG, SITES, bert, run, strengthen, tiny
from torch import nn

from adapter_ops import (
    AdapterConfig,
    active_adapter,
    adapter_summary,
    add_adapter,
    delete_adapter,
    list_adapters,
    load_adapter,
    load_task_state_dict,
    save_adapter,
    set_active_adapter,
    skip_layers,
    task_state_dict,
    train_adapter,
    using_adapter,
)
from adapter_ops.models.files import WEIGHTS_FILE

pytestmark = pytest.mark.usefixtures("aten")

OUTPUTS = {"attention": "layers.*.mix", "ffn": "layers.*.down"}
X = torch.linspace(-2, 2, 2 * 3 * 8).view(2, 3, 8)


class Peft(nn.Module):
    """As a model of the package peft looks from outside."""

    def __init__(self, model):
        super().__init__()
        self.peft_config, self.base_model = {}, nn.ModuleDict({"model": model})

    def get_base_model(self):
        return self.base_model["model"]

    def forward(self, *args, **kwargs):
        return self.get_base_model()(*args, **kwargs)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def data_parallel(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


WRAPPERS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "compiled by layer": lambda model: [layer.compile(backend="eager") for layer in model.layers] and model,
    "DDP": data_parallel,
    "DP": nn.DataParallel,
    "peft": Peft,
    "DDP of compiled": lambda model: data_parallel(compiled(model)),
    "compiled of DDP": lambda model: compiled(data_parallel(model)),
    "DDP of peft": lambda model: data_parallel(Peft(model)),
}
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())


@each_wrapper
@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:DistributedDataParallel does not synchronise", "ignore:.*does not run on a GPU")
def test_every_function_takes_a_wrapped_model(wrap, tmp_path, capsys):
    """Through a wrapper each does what it does to the model itself, and files and keys are the same."""
    torch._dynamo.reset()
    plain, wrapped = tiny(), wrap(tiny())
    base = run(plain, X)
    torch.testing.assert_close(run(wrapped, X), base)
    for model in (plain, wrapped):
        torch.manual_seed(1)
        add_adapter(model, "a", CONFIG, sites=SITES)
        add_adapter(model, "b", CONFIG)
        train_adapter(model, "a")
        strengthen(model)
        assert active_adapter(model) == "a" and list(list_adapters(model)) == ["a", "b"]
        with pytest.raises(ValueError, match="already has an adapter 'a'"):
            add_adapter(model, "a", CONFIG)
    assert list_adapters(plain) == list_adapters(wrapped)
    assert adapter_summary(plain) == adapter_summary(wrapped)

    def same():
        torch.testing.assert_close(run(wrapped, X), run(plain, X))
        return run(plain, X)

    trained = same()
    assert not torch.allclose(trained, base)
    with using_adapter(plain, None), using_adapter(wrapped, None):
        assert torch.equal(same(), base)
    with skip_layers(plain, [1]), skip_layers(wrapped, [1]):
        assert not torch.allclose(same(), trained)
    for model in (plain, wrapped):
        set_active_adapter(model, "b")
    same()
    state = task_state_dict(wrapped, "a")
    assert state.keys() == task_state_dict(plain, "a").keys()
    for model in (plain, wrapped):
        load_task_state_dict(model, "b", state)
    assert torch.equal(same(), trained)
    save_adapter(wrapped, tmp_path / "wrapped", "a")
    save_adapter(plain, tmp_path / "plain", "a")
    contents = [(tmp_path / folder / WEIGHTS_FILE).read_bytes() for folder in ("wrapped", "plain")]
    assert contents[0] == contents[1]
    for model in (plain, wrapped):
        delete_adapter(model, "a")
        delete_adapter(model, "b")
        assert list_adapters(model) == {}
        with pytest.raises(ValueError, match="no adapter"):
            active_adapter(model) or set_active_adapter(model, "a")
    assert torch.equal(same(), base)
    load_adapter(wrapped, tmp_path / "plain")
    load_adapter(plain, tmp_path / "wrapped")
    assert torch.equal(same(), trained)


def test_what_is_no_module():
    for function in (add_adapter, set_active_adapter, train_adapter):
        with pytest.raises(TypeError, match=r"expected the model, a torch\.nn\.Module, not function"):
            function(compiled(compiled(tiny())), "a")


def test_peft_itself(tmp_path):
    """An adapter beside LoRA: the paths are those of the model inside."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
    base = run(model)
    add_adapter(model, "t", CONFIG)
    strengthen(model)
    trained = run(model)
    assert not torch.allclose(trained, base)
    save_adapter(model, tmp_path, "t")
    delete_adapter(model, "t")
    assert torch.equal(run(model), base)
    load_adapter(model, tmp_path)
    assert torch.equal(run(model), trained)


@pytest.mark.usefixtures("group")
def test_train_adapter_through_data_parallel_warns():
    """The wrapper knows the parameters that trained when it was made. Chosen before that, a task trains in silence."""
    model = bert()
    add_adapter(model, "a", CONFIG)
    add_adapter(model, "b", CONFIG)
    train_adapter(model, "a")
    for wrapped in (data_parallel(model), compiled(data_parallel(model)), data_parallel(compiled(model))):
        with pytest.warns(UserWarning, match="wrap the model again before you train 'b'"):
            train_adapter(wrapped, "b")
        with pytest.warns(UserWarning, match="wrap the model again"):
            add_adapter(wrapped, "c", CONFIG)
        delete_adapter(wrapped, "c")


def test_fsdp1_is_refused():
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"use torch.distributed.fsdp.fully_shard"):
        add_adapter(FullyShardedDataParallel(), "t")


def each_compiled(pick):
    def wrap(model):
        for part in pick(model):
            part.compile(backend="eager")
        return model

    return wrap


COMPILED = {
    "whole": compiled,
    "in place": each_compiled(lambda m: [m]),
    "layers": each_compiled(lambda m: m.layers),
    "outputs": each_compiled(lambda m: [part for layer in m.layers for part in (layer.mix, layer.down)]),
    "norms and head": each_compiled(lambda m: [m.norm, m.head, *(p for la in m.layers for p in (la.norm1, la.norm2))]),
}
FROZEN = AdapterConfig(4, layer_norms="frozen")


@pytest.mark.parametrize("wrap", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize(
    ("config", "sites"),
    [
        (CONFIG, SITES),
        (FROZEN, OUTPUTS),  # hooks and nothing else
        (AdapterConfig(4, placement="parallel", layer_norms="frozen"), SITES),
        (AdapterConfig(4, ln_before=True, residual="input", layer_norms="frozen", scale="channel"), SITES),
    ],
    ids=["houlsby", "outputs alone", "parallel", "adapter_plus"],
)
def test_compiled_before_the_first_adapter(wrap, config, sites):
    """What was compiled for the bare base is not run for a task, nor the other way round. The base is frozen, so that
    no guard on what requires a gradient notices by chance."""
    torch._dynamo.reset()
    model = tiny().requires_grad_(False)
    wrapped = wrap(model)

    def check():
        with torch.compiler.set_stance("force_eager"):
            expected = run(model, X)
        torch.testing.assert_close(run(wrapped, X), expected)
        return expected

    base = check()
    for _ in range(2):
        add_adapter(model, "a", config, sites=sites, modules=())
        strengthen(model)
        a = check()
        assert not torch.allclose(a, base)
        add_adapter(model, "b", config, modules=())
        strengthen(model, seed=2)
        assert not torch.allclose(check(), a)
        with using_adapter(model, "a"):
            assert torch.equal(check(), a)
        set_active_adapter(model, None)
        assert torch.equal(check(), base)
        delete_adapter(model, "a")
        delete_adapter(model, "b")
        assert torch.equal(check(), base)
