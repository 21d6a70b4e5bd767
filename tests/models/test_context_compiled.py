"""Tasks of a model that torch.compile has compiled: one compilation for all, and each call's own task."""

import itertools
import threading

import pytest
import torch
from helpers_context import TASKS, two_tasks
from helpers_families import forward
from helpers_tasks import STRONG, TOKENS, bert, logits, step

from adapter_ops import add_adapter, list_adapters, set_active_adapter, skip_layers, train_adapter, using_adapter

pytestmark = pytest.mark.usefixtures("aten")


def dozen():
    model = bert(num_hidden_layers=2)
    for i in range(12):
        add_adapter(model, f"t{i}", STRONG)
        step(model)
    return model


def test_twelve_tasks_of_a_compiled_model_share_one_compilation():
    """The default, a context and the bare base are one compilation each, whichever of the twelve tasks runs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model, counter = dozen().requires_grad_(False), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def check(name):
        with torch.no_grad():
            torch.testing.assert_close(compiled(TOKENS).logits, model(TOKENS).logits)

    counts = []
    set_active_adapter(model, None)
    check(None)
    counts.append(counter.frame_count)
    seen = []
    for name in list_adapters(model):
        set_active_adapter(model, name)
        check(name)
        seen.append(logits(model))
    counts.append(counter.frame_count)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    for name in list_adapters(model):
        with using_adapter(model, name):
            check(name)
    counts.append(counter.frame_count)
    assert counts == [1, 2, 3]


def test_training_twelve_tasks_compiles_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model, counter = dozen(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for name in list_adapters(model):
        train_adapter(model, name)
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(compiled(TOKENS).logits.square().sum(), parameters)
        expected = torch.autograd.grad(model(TOKENS).logits.square().sum(), parameters)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e)
    assert counter.frame_count == 1


def test_threads_of_a_compiled_model():
    torch.compiler.reset()
    model = dozen()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = {}
    for name in list_adapters(model):
        set_active_adapter(model, name)
        expected[name] = logits(model)
    set_active_adapter(model, None)
    with using_adapter(model, "t0"), torch.no_grad():
        compiled(TOKENS)
    wrong = []

    def serve(i):
        for turn in range(6):
            name = f"t{(i + turn) % 12}"
            with torch.no_grad(), using_adapter(model, name):
                if not torch.allclose(compiled(TOKENS).logits, expected[name], atol=1e-5):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("family, preset", [("bert", "pfeiffer"), ("bert", "parallel"), ("gpt2", "adapter_plus")])
def test_a_compiled_model_keeps_what_eager_computes(family, preset):
    torch.compiler.reset()
    model, inputs = two_tasks(family, preset)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in TASKS:
        with using_adapter(model, name), torch.no_grad():
            torch.testing.assert_close(forward(compiled, inputs), forward(model, inputs))
    with skip_layers(model, [0]), torch.no_grad():
        torch.testing.assert_close(forward(compiled, inputs), forward(model, inputs))
