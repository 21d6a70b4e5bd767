"""Which task a call runs belongs to the call: threads, async tasks, generators, calls inside calls, failed calls."""

import _thread
import asyncio
import contextvars
import copy
import itertools
import pickle
import threading
import time

import pytest
import torch
import transformers as hf
from helpers_families import build, forward
from helpers_tasks import STRONG, TOKENS, bert, logits, step
from torch import nn

from adapter_ops import (
    AdapterConfig,
    active_adapter,
    add_adapter,
    delete_adapter,
    list_adapters,
    load_adapter,
    save_adapter,
    set_active_adapter,
    skip_layers,
    train_adapter,
    using_adapter,
)
from adapter_ops.models import hooks
from adapter_ops.models.context import _NOTHING
from adapter_ops.models.families import SitePattern

pytestmark = pytest.mark.usefixtures("aten")

PRESETS = ["houlsby", "pfeiffer", "parallel", "adapter_plus"]
TASKS = ("a", "b", None)


def two_tasks(family, preset):
    """A model of a family with two tasks of a preset whose parameters are random."""
    model, inputs, _ = build(family)
    for name in ("a", "b"):
        add_adapter(model, name, preset)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.2)
    return model, inputs


def nothing_left(model):
    """Whether no choice is open here and no tensor hangs on what the library has put on the model."""
    things = [*model.adapter_ops.machinery, *model.adapter_ops.tasks.values()]
    held = [v for thing in things for v in vars(thing).values() if isinstance(v, torch.Tensor)]
    open_here = any(choice.live for choice in _NOTHING.current.choices.values())
    kept = [r for r in hooks._FRAMES.loose.values() if r() is not None]
    return not held and not kept and hooks._FRAMES.inputs is None and not open_here


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["bert", "llama", "vit", "gpt2"])
def test_eight_threads_that_switch_between_three_tasks(family, preset):
    model, inputs = two_tasks(family, preset)
    key = next(iter(inputs))
    batches = [torch.randint(3, 49, (2, 6)) if key == "input_ids" else torch.randn(2, 3, 8, 8) for _ in range(8)]
    expected = {}
    with torch.no_grad():
        for name in TASKS:
            set_active_adapter(model, name)
            expected[name] = [forward(model, {key: batch})[0] for batch in batches]
    set_active_adapter(model, "b")
    assert not torch.equal(expected["a"][0], expected["b"][0])
    wrong = []

    def serve(i):
        for turn in range(9):
            name = TASKS[(i + turn) % 3]
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


@pytest.mark.parametrize("preset", PRESETS)
def test_threads_that_train_do_not_meet(preset):
    """Forward and backward in two threads at once: each task's gradients are what they are alone."""
    model, inputs = two_tasks("bert", preset)
    model.requires_grad_(False)
    tasks = {name: model.adapter_ops.task(name).requires_grad_(True) for name in ("a", "b")}

    def gradients(name):
        with using_adapter(model, name):
            loss = forward(model, inputs)[0].square().sum()
            return torch.autograd.grad(loss, list(tasks[name].parameters()))

    expected, found = {name: gradients(name) for name in tasks}, {}
    threads = [
        threading.Thread(target=lambda n=name, i=i: found.__setitem__((n, i), gradients(n)))
        for i in range(3)
        for name in tasks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for (name, _), gradient in found.items():
        for f, e in zip(gradient, expected[name]):
            torch.testing.assert_close(f, e)


def test_a_call_in_progress_ends_with_the_task_it_began_with():
    model, inputs = two_tasks("bert", "houlsby")
    outputs = {}
    for name in TASKS:
        set_active_adapter(model, name)
        with torch.no_grad():
            outputs[name] = forward(model, inputs)[0]
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
    outputs = {}
    for name in TASKS:
        set_active_adapter(model, name)
        with torch.no_grad():
            outputs[name] = forward(model, inputs)[0]

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


@pytest.mark.skipif(not hasattr(torch.autograd.graph, "contextvars"), reason="needs PyTorch 2.12")
def test_backward_in_a_thread_of_autograds(monkeypatch):
    """On a GPU backward, and so a checkpointed layer, runs in another thread than the caller's. PyTorch hands it the
    caller's context, which stands here for a context of the thread's own."""
    model, _ = two_tasks("bert", "houlsby")
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: seen.append(active_adapter(model)))

    def backward(context):
        monkeypatch.setattr(torch.autograd.graph.contextvars, "copy_context", lambda: context)
        y.sum().backward(retain_graph=True)

    with using_adapter(model, "a"):
        context = contextvars.copy_context()
        thread = threading.Thread(target=backward, args=(context,))
        thread.start()
        thread.join()
    assert seen == ["a"] and active_adapter(model) == "b"


def test_backward_in_a_thread_that_has_no_context_is_refused_within_a_block(monkeypatch):
    """PyTorch before 2.12 hands no context to autograd's threads, which Python did not start."""
    model, _ = two_tasks("bert", "houlsby")
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: seen.append(active_adapter(model)))
    monkeypatch.setattr(torch._C, "_is_key_in_tls", lambda key: False)

    def backward(done):
        try:
            y.sum().backward(retain_graph=True)
        except RuntimeError as error:
            seen.append(error)
        done.set()

    def elsewhere():
        done = threading.Event()
        _thread.start_new_thread(backward, (done,))
        assert done.wait(60)
        return seen.pop()

    assert elsewhere() == "b"  # the default, since no block is open
    with using_adapter(model, "a"):
        assert "train with set_active_adapter or train_adapter" in str(elsewhere())
        thread = threading.Thread(target=backward, args=(threading.Event(),))  # one of the user's
        thread.start()
        thread.join()
        assert seen.pop() == "b"
        y.sum().backward(retain_graph=True)
        assert seen.pop() == "a"
    assert elsewhere() == "b"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_in_a_context(reentrant):
    model, inputs = two_tasks("bert", "parallel")
    trained = list(model.adapter_ops.task("a").requires_grad_(True).parameters())
    with using_adapter(model, "a"):
        expected = torch.autograd.grad(forward(model, inputs)[0].square().sum(), trained)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        forward(model, inputs)[0].square().sum().backward()
    for p, e in zip(trained, expected):
        torch.testing.assert_close(p.grad, e)


# torch.compile


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


def test_loading_takes_no_longer_beside_two_hundred_tasks(tmp_path):
    """CPU time of the fastest of twelve loads; the models take turns, since other processes slow some loads down."""
    models = {}
    for count in (1, 200):
        torch.manual_seed(0)
        model = models[count] = hf.BertModel(hf.BertConfig(vocab_size=99)).eval()
        add_adapter(model, "t", AdapterConfig(bottleneck=64))
        save_adapter(model, tmp_path, "t")
        for i in range(1, count):
            load_adapter(model, tmp_path, f"t{i}")
    seconds = {count: [] for count in models}
    for _ in range(12):
        for count, model in models.items():
            start = time.process_time()
            load_adapter(model, tmp_path, "again")
            seconds[count].append(time.process_time() - start)
            delete_adapter(model, "again")
    assert min(seconds[200]) <= 1.5 * min(seconds[1]), seconds
