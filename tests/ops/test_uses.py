"""What is done with a model that has adapters besides calling it: copies, files, exports, traces, other calls."""

import copy
import inspect
import io

import pytest
import torch
from helpers_models import CONFIG, IDS, bert, run, strengthen
from torch import nn

from adapter_ops import AdapterConfig, add_adapter, delete_adapter, set_active_adapter, train_adapter, using_adapter
from adapter_ops.models.families import SitePattern

pytestmark = pytest.mark.usefixtures("aten", "one_thread")

CONFIGS = {
    "houlsby": CONFIG,
    "parallel": AdapterConfig(4, placement="parallel", layer_norms="frozen"),
    "pfeiffer": AdapterConfig(4, placement=("ffn",), layer_norms="frozen", ln_before=True),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def with_tasks(config=CONFIG):
    model = bert()
    for seed, name in enumerate("ab"):
        add_adapter(model, name, config)
        strengthen(model, seed)
    return model


def every_output(model):
    found = []
    for name in ("a", "b", None):
        with using_adapter(model, name):
            found.append(run(model))
    return found


def equal(found, expected):
    return all(map(torch.equal, found, expected))


def saved_whole(model):
    data = io.BytesIO()
    torch.save(model, data)
    data.seek(0)
    return torch.load(data, weights_only=False)


@each_config
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_whole], ids=["deepcopy", "torch.save"])
def test_a_duplicate_runs_and_changes_by_itself(config, duplicate):
    model = with_tasks(config)
    expected = every_output(model)
    other = duplicate(model)
    assert equal(every_output(other), expected) and torch.equal(run(other), expected[1])
    train_adapter(other, "a")
    strengthen(other)
    assert not torch.equal(every_output(other)[0], expected[0])
    assert equal(every_output(model), expected)
    for name in "ab":
        delete_adapter(other, name)
    assert torch.equal(run(other), expected[2]) and equal(every_output(model), expected)


def test_a_copy_of_the_base_inside_runs_the_default_task():
    """The base by itself, without the model around it and its child `adapter_ops`."""
    model = with_tasks()
    part = copy.deepcopy(model.bert)
    assert torch.equal(run(part), run(model.bert))
    set_active_adapter(model, None)
    assert not torch.equal(run(part), run(model.bert))  # the copy keeps the task with which it was made


class Logits(nn.Module):
    """Export and trace want a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids)[0]


@each_config
def test_export_takes_the_task_that_is_active(config):
    model = with_tasks(config)
    expected = every_output(model)
    for name, output in zip(("a", "b", None), expected):
        with using_adapter(model, name):
            program = torch.export.export(Logits(model), (IDS,), strict=False)
        torch.testing.assert_close(program.module()(IDS), output)
    assert equal(every_output(model), expected)


@each_config
def test_trace_takes_the_task_that_is_active(config):
    model = with_tasks(config)
    expected = every_output(model)
    for name, output in zip(("a", "b", None), expected):
        with using_adapter(model, name), torch.no_grad():
            traced = torch.jit.trace(Logits(model), (IDS,))
        torch.testing.assert_close(traced(IDS), output)


def test_functional_call_takes_the_tasks_parameters():
    """With the model's own state the outputs are its own; with other values under a task's names they are others."""
    model = with_tasks()
    state = model.state_dict()
    expected = every_output(model)
    for name, output in zip(("a", "b", None), expected):
        with using_adapter(model, name), torch.no_grad():
            assert torch.equal(torch.func.functional_call(model, state, (IDS,))[0], output)
    own = {
        n: torch.zeros_like(t) if n.startswith("adapter_ops.tasks.a.copies.classifier") else t for n, t in state.items()
    }
    with using_adapter(model, "a"), torch.no_grad():
        assert not torch.func.functional_call(model, own, (IDS,))[0].any()
    assert equal(every_output(model), expected)


@each_config
def test_the_signature_of_forward_stays(config):
    """transformers' Trainer drops columns that `model.forward` does not name."""
    plain, model = bert(), with_tasks(config)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    for path, module in plain.named_modules():
        assert inspect.signature(model.get_submodule(path).forward) == inspect.signature(module.forward), path


@each_config
def test_every_task_moves_with_the_model(config):
    model = with_tasks(config)
    expected = every_output(model)
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    for found, output in zip(every_output(model), expected):
        torch.testing.assert_close(found.float(), output, rtol=1e-4, atol=1e-4)
    model.half()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert all(t.isfinite().all() for t in every_output(model))


class TwoEncoders(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1) for _ in range(2)
        )

    def forward(self, x, padding):
        return self.second(self.first(x, src_key_padding_mask=padding), src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:.*stay frozen", "ignore:The PyTorch API of nested tensors")
def test_the_fast_path_takes_a_tasks_norms_in_layers_without_adapters():
    """nn.TransformerEncoderLayer in eval reads its norms' weights instead of calling them, unless hooks forbid that."""
    torch.manual_seed(0)
    model = TwoEncoders().eval()
    x, padding = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    pattern = SitePattern("first.layers.*.dropout2", norm="first.layers.*.norm2")
    base = run(model, x, padding)
    add_adapter(model, "t", CONFIG, sites={"ffn": pattern}, modules=())
    task = model.adapter_ops.task("t")
    found = {}
    for factor in (1.0, 3.0):
        with torch.no_grad():
            task.copy_at["second.layers.0.norm1"].weight.fill_(factor)
        found[factor] = run(model, x, padding)
        with torch.enable_grad():
            slow = model(x, padding).detach()  # with a gradient to be had, the layers take the other path
        torch.testing.assert_close(found[factor][~padding], slow[~padding])
    assert not torch.allclose(found[1.0], found[3.0])
    delete_adapter(model, "t")
    assert torch.equal(run(model, x, padding), base)
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())
