"""Which task a call runs belongs to the call: threads, async tasks, generators, calls inside calls, failed calls."""

import asyncio
import contextvars
import copy
import itertools
import pickle
import threading

import pytest
import torch
import transformers as hf
from helpers_context import PRESETS, TASKS, nothing_left, outputs_of, two_tasks, with_tasks
from helpers_families import forward
from helpers_tasks import STRONG, TOKENS, bert, logits
from torch import nn

from adapter_ops import (
    active_adapter,
    add_adapter,
    delete_adapter,
    list_adapters,
    set_active_adapter,
    skip_layers,
    using_adapter,
)
from adapter_ops.models.families import SitePattern

pytestmark = pytest.mark.usefixtures("aten")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["bert", "llama", "vit", "gpt2"])
def test_eight_threads_that_switch_between_three_tasks(family, preset):
    """And the bare base between them."""
    names = ("a", "b", "c", None)
    model, inputs = with_tasks(names[:3], family, preset)
    key = next(iter(inputs))
    batches = [torch.randint(3, 49, (2, 6)) if key == "input_ids" else torch.randn(2, 3, 8, 8) for _ in range(8)]
    expected = {}
    with torch.no_grad():
        for name in names:
            set_active_adapter(model, name)
            expected[name] = [forward(model, {key: batch})[0] for batch in batches]
    set_active_adapter(model, "b")
    assert all(not torch.equal(expected[a][0], expected[b][0]) for a, b in itertools.combinations(names, 2))
    wrong = []

    def serve(i):
        for turn in range(12):
            name = names[(i + turn) % 4]
            try:
                with torch.no_grad(), using_adapter(model, name):
                    found = forward(model, {key: batches[i]})[0]
                if not torch.allclose(found, expected[name][i], atol=1e-5):
                    wrong.append((i, turn, name))
            except Exception as error:
                wrong.append((i, turn, name, repr(error)))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and active_adapter(model) == "b" and nothing_left(model)


def test_a_call_in_progress_ends_with_the_task_it_began_with():
    model, inputs = two_tasks("bert", "houlsby")
    outputs = outputs_of(model, inputs)
    middle = model.bert.encoder.layer[1]
    entered, switched = threading.Event(), threading.Event()

    def wait(module, args):
        entered.set()
        assert switched.wait(10)

    for before, after in (("a", "b"), ("a", None), (None, "b")):
        set_active_adapter(model, before)
        entered.clear(), switched.clear()
        handle, found = middle.register_forward_pre_hook(wait), []
        thread = threading.Thread(target=lambda found=found: found.append(forward(model, inputs)[0].detach()))
        thread.start()
        assert entered.wait(10)
        set_active_adapter(model, after)
        switched.set()
        thread.join()
        handle.remove()
        assert torch.equal(found[0], outputs[before]) and active_adapter(model) == after


class Routed(nn.Module):
    """A model whose forward itself chooses the task."""

    def __init__(self, how):
        super().__init__()
        self.encoder = bert(hf.BertModel)
        self.how = how

    def forward(self, tokens, name):
        if self.how == "default":
            set_active_adapter(self, name)
            return self.encoder(tokens)[0]
        with using_adapter(self, name):
            return self.encoder(tokens)[0]


@pytest.mark.parametrize("how", ["default", "context"])
def test_a_forward_that_chooses_its_task(how):
    model = Routed(how)
    for name in ("a", "b"):
        add_adapter(model, name, STRONG, modules=())
    with torch.no_grad():
        outputs = {}
        for name in TASKS:
            set_active_adapter(model, name)
            outputs[name] = model.encoder(TOKENS)[0]
        assert not torch.equal(outputs["a"], outputs["b"])
        for name in ("a", "b", None, "a"):
            assert torch.equal(model(TOKENS, name), outputs[name])
    assert active_adapter(model) == ("a" if how == "default" else None)
    assert nothing_left(model)


def test_contexts_nest_and_leave_the_default():
    model, _ = two_tasks("bert", "houlsby")
    set_active_adapter(model, "a")
    with using_adapter(model, "b"):
        assert active_adapter(model) == "b"
        with using_adapter(model, None), using_adapter(model, "a"):
            assert active_adapter(model) == "a"
        set_active_adapter(model, None)
        assert active_adapter(model) == "b"
        seen = []
        thread = threading.Thread(target=lambda: seen.append(active_adapter(model)))
        thread.start()
        thread.join()
        assert seen == [None]  # a new thread starts with the default
        contextvars.copy_context().run(lambda: seen.append(active_adapter(model)))
        assert seen == [None, "b"]
    assert active_adapter(model) is None and nothing_left(model)
    with pytest.raises(ValueError, match="no adapter 'c'; it has: a, b"), using_adapter(model, "c"):
        raise AssertionError("an unknown name is refused before the block runs")
    with pytest.raises(KeyError), using_adapter(model, "a"):
        raise KeyError
    assert active_adapter(model) is None and nothing_left(model)


def test_two_models_do_not_share_a_choice():
    one, two = bert(), bert()
    for model in (one, two):
        add_adapter(model, "a", STRONG)
        add_adapter(model, "b", STRONG)
    with using_adapter(one, "a"):
        copies = [copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
        assert [active_adapter(m) for m in (one, two, *copies)] == ["a", "b", "b", "b"]
        with using_adapter(copies[0], None), using_adapter(two, "a"):
            assert [active_adapter(m) for m in (one, two, *copies)] == ["a", "a", None, "b"]


def test_async_tasks():
    model, inputs = two_tasks("bert", "pfeiffer")
    outputs = outputs_of(model, inputs)

    async def request(name):
        with using_adapter(model, name):
            for _ in range(3):
                await asyncio.sleep(0)
                assert torch.equal(forward(model, inputs)[0], outputs[name])
                assert active_adapter(model) == name
        return True

    async def serve():
        return await asyncio.gather(*(request(name) for name in TASKS * 4))

    with torch.no_grad():
        assert all(asyncio.run(serve())) and nothing_left(model)


def test_generators_that_end_in_any_order():
    model, _ = two_tasks("bert", "houlsby")
    set_active_adapter(model, None)

    def stream(name):
        with using_adapter(model, name):
            while True:
                yield active_adapter(model)

    first, second = stream("a"), stream("b")
    assert next(first) == "a" and next(second) == "b"
    first.close()
    assert active_adapter(model) == "b"  # of the generator that is still inside its block
    second.close()
    assert active_adapter(model) is None and nothing_left(model)
    third = stream("a")
    next(third)
    contextvars.copy_context().run(third.close)  # as a collector or an event loop may
    assert active_adapter(model) is None


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_forward_that_raises_midway_leaves_nothing(family, preset):
    model, inputs = two_tasks(family, preset)
    with torch.no_grad():
        expected = forward(model, inputs)[0]
    for slot in model.adapter_ops.slots.values():
        module = model.get_submodule(slot.site.output)
        handle = module.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("midway")))
        with pytest.raises(KeyError, match="midway"):
            forward(model, inputs)
        handle.remove()
        assert nothing_left(model)
        copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(forward(model, inputs)[0], expected)


class Twice(nn.Module):
    """A pre-norm layer that calls itself between its sublayer's entry and its sublayer's output."""

    def __init__(self):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x, depth=1):
        inner = self.norm(x)
        if depth:
            inner = inner + self(2 * x, depth - 1)
        return x + self.lin(inner)


@pytest.mark.parametrize("config", ["parallel", "pfeiffer"])
def test_a_layer_that_calls_itself(config):
    """The inner call's input does not become the outer one's."""
    model = nn.Module()
    model.layers = nn.ModuleList([Twice()])
    add_adapter(model, "t", config, sites={"ffn": SitePattern("layers.*.lin", "layers.*.norm")}, modules=())
    layer, adapter = model.layers[0], model.adapter_ops.task("t").layer_at["layers.0.ffn"]
    with torch.no_grad():
        adapter.bottlenecks[0].up.weight.normal_()
    x = torch.randn(3, 8)

    def by_hand(x, depth=1):
        inner = nn.functional.layer_norm(x, [8])
        if depth:
            inner = inner + by_hand(2 * x, depth - 1)
        h = nn.functional.linear(inner, layer.lin.weight, layer.lin.bias)
        return x + (adapter(x, h) if config == "parallel" else adapter(h + x, h))

    torch.testing.assert_close(layer(x), by_hand(x))


def test_a_sublayer_that_is_called_outside_its_layer():
    model, _ = two_tasks("gpt2", "parallel")
    block = model.transformer.h[0]
    block.ln_2(torch.randn(2, 3, 32))
    with pytest.raises(RuntimeError, match=r"reads the sublayer's input, but .*ln_2' was not called"):
        block.mlp(torch.randn(2, 3, 32))
    assert nothing_left(model)


def test_skipped_layers_are_this_threads_own():
    model = bert()
    add_adapter(model, "t", STRONG)
    whole = logits(model)
    with skip_layers(model, [0, 1]):
        some, seen = logits(model), []
        thread = threading.Thread(target=lambda: seen.append(logits(model)))
        thread.start()
        thread.join()
        assert torch.equal(seen[0], whole) and not torch.equal(some, whole)
    assert torch.equal(logits(model), whole) and nothing_left(model)
    with pytest.raises(ValueError, match=r"no layers \[7\]; it has 0 to 2"), skip_layers(model, [1, 7]):
        raise AssertionError


def test_a_task_that_is_deleted_while_it_is_in_use():
    model, inputs = two_tasks("bert", "houlsby")
    with torch.no_grad(), using_adapter(model, "a"):
        expected = forward(model, inputs)[0]
        delete_adapter(model, "a")
        assert torch.equal(forward(model, inputs)[0], expected)
    assert list(list_adapters(model)) == ["b"]
