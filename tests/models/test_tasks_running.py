"""Tasks in models that train, generate, serve threads, and are copied: weight decay groups, generate(), pickle."""

import contextvars
import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
import transformers as hf
from helpers_families import DECODER, T5, TEXT, TWO, make
from helpers_tasks import STRONG, TOKENS, bert, logits, shake
from torch import nn

from adapter_ops import (
    AdapterConfig,
    active_adapter,
    add_adapter,
    delete_adapter,
    list_adapters,
    set_active_adapter,
    skip_layers,
    using_adapter,
)
from adapter_ops.models.context import _NOTHING
from adapter_ops.models.families import SitePattern
from adapter_ops.models.hooks import _FRAMES
from adapter_ops.models.tasks import insert

pytestmark = pytest.mark.usefixtures("aten")

SMALL = AdapterConfig(bottleneck=1, layer_norms="frozen")


# What an adapter reads and what it adds to, by hand

WIRING = [(True, "output"), (True, "input"), (False, "output"), (False, "input")]
wired = pytest.mark.parametrize("ln_after, residual", WIRING)


@wired
def test_an_adapter_behind_the_norm_of_a_post_norm_layer(ln_after, residual):
    model = bert(hf.BertModel)
    config = AdapterConfig(4, placement=("ffn",), init_std=0.3, ln_before=True, ln_after=ln_after, residual=residual)
    add_adapter(model, "t", config)
    shake(model)
    seen = {}
    norm = model.encoder.layer[1].output.LayerNorm
    norm.register_forward_hook(lambda module, args, output: seen.update(total=args[0], output=output))
    logits(model)
    task = model.adapter_ops.task("t")
    own, (bottleneck,) = (
        task.copy_at["encoder.layer.1.output.LayerNorm"],
        task.layer_at["encoder.layer.1.ffn"].bottlenecks,
    )
    with torch.no_grad():
        x = own(seen["total"])
        y = bottleneck(x, x if residual == "input" else seen["total"])
        torch.testing.assert_close(seen["output"], own(y) if ln_after else y)
    assert _FRAMES.loose == {} and _FRAMES.inputs is None


class PreNorm(nn.Module):
    """Calls its norm by keyword, and its sublayer as often as it is told."""

    def __init__(self):
        super().__init__()
        self.norm, self.lin, self.times = Keyword(8), nn.Linear(8, 8), 1

    def forward(self, x):
        inner = self.norm(hidden_states=x)
        for _ in range(self.times):
            inner = self.lin(inner)
        return x + inner


class Keyword(nn.LayerNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states)


def pre_norm(config):
    model = nn.Module()
    model.layers = nn.ModuleList([PreNorm()])
    add_adapter(model, "t", config, sites={"ffn": SitePattern("layers.*.lin", "layers.*.norm")}, modules=())
    (adapter,) = model.adapter_ops.task("t").layer_at.values()
    return model.layers[0], adapter.bottlenecks[0]


@wired
def test_an_adapter_in_a_pre_norm_layer(ln_after, residual):
    config = AdapterConfig(4, init_std=0.3, ln_before=True, ln_after=ln_after, residual=residual, layer_norms="frozen")
    layer, bottleneck = pre_norm(config)
    x = torch.randn(3, 8)
    with torch.no_grad():
        h = nn.functional.linear(layer.norm(hidden_states=x), layer.lin.weight, layer.lin.bias)
        total = h + x
        expected = x + bottleneck(total, total if residual == "input" and ln_after else h)
        torch.testing.assert_close(layer(x), expected)


def test_an_input_is_read_once():
    layer, _ = pre_norm("parallel")
    layer(torch.randn(3, 8))
    layer.times = 2
    with pytest.raises(RuntimeError, match=r"'layers\.0\.norm' was not called before 'layers\.0\.lin'"):
        layer(torch.randn(3, 8))


# What trains


def test_the_norms_of_a_head_are_part_of_the_head():
    model = bert()
    model.classifier = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5))
    add_adapter(model, "t", STRONG)
    assert not any(path.startswith("classifier") for path in list_adapters(model)["t"].norms)
    model(TOKENS).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_base_runs_after_the_active_task_is_deleted():
    model = bert()
    base = logits(model)
    for name in ("a", "b"):
        add_adapter(model, name, STRONG)
    delete_adapter(model, "b")
    assert active_adapter(model) is None and torch.equal(logits(model), base)


def test_trainer_decays_no_copy_of_a_norm():
    for model in (bert(), make(hf.LlamaForCausalLM, DECODER), make(hf.T5ForConditionalGeneration, T5)):
        add_adapter(model, "t", AdapterConfig(bottleneck=4, norm="layer"))
        decayed = set(hf.Trainer.get_decay_parameter_names(None, model))
        task = model.adapter_ops.task("t")
        norms = {id(p) for path in task.norms for p in task.copy_at[path].parameters()}
        norms |= {id(p) for layer in task.layer_at.values() for p in layer.norm.parameters()}
        own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert norms and not [n for n, p in own.items() if id(p) in norms and n in decayed]
        assert {n for n in own if n.endswith((".down.weight", ".up.weight"))} <= decayed


def test_training_another_task_freezes_what_trained_in_part():
    model = bert()
    add_adapter(model, "a", STRONG)
    for name, p in model.adapter_ops.task("a").named_parameters():
        p.requires_grad_("bias" in name)
    add_adapter(model, "b", STRONG)
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}


def test_parameters_keep_their_order_and_the_base_comes_first():
    model = bert()
    base = [n for n, _ in model.named_parameters()]
    for i, name in enumerate(("a", "b")):
        add_adapter(model, name, STRONG)
        found = [n for n, _ in model.named_parameters()]
        assert found[: len(base)] == base and found[-1].startswith(f"adapter_ops.tasks.{name}.")
        assert len(found) == len(base) + (i + 1) * len(list(model.adapter_ops.task(name).parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tasks_follow_the_dtype_of_their_model(dtype):
    model = bert()
    add_adapter(model, "t", AdapterConfig(bottleneck=4, norm="layer", scale="channel"))
    model.to(dtype)
    assert logits(model).dtype == dtype and {p.dtype for p in model.parameters()} == {dtype}
    if dtype == torch.bfloat16:
        model.float()
        with torch.autocast("cpu", dtype):
            model(TOKENS).logits.float().sum().backward()
        assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# generate()

GENERATORS = {
    "gpt2": (hf.GPT2LMHeadModel, TEXT),
    "llama": (hf.LlamaForCausalLM, DECODER),
    "t5": (hf.T5ForConditionalGeneration, T5),
    "bart": (hf.BartForConditionalGeneration, TWO),
}


@pytest.mark.parametrize("preset", ["houlsby", "parallel", "adapter_plus"])
@pytest.mark.parametrize("family", GENERATORS)
def test_generation_with_and_without_a_cache(family, preset):
    torch.manual_seed(1)
    model = make(*GENERATORS[family])
    add_adapter(model, "t", preset)
    shake(model)
    expected = logits(model) if family in ("gpt2", "llama") else None
    set_active_adapter(model, None)
    for beams in (1, 2):
        settings = dict(max_new_tokens=3, do_sample=False, num_beams=beams, pad_token_id=0, eos_token_id=None)
        settings |= dict(decoder_start_token_id=2) if family in ("t5", "bart") else {}
        with using_adapter(model, "t"):
            cached, whole = (model.generate(TOKENS + 3, use_cache=cache, **settings) for cache in (True, False))
        assert torch.equal(cached, whole)
        if expected is not None and beams == 1:
            with using_adapter(model, "t"):
                assert torch.equal(logits(model), expected)
                assert torch.equal(cached[:, 7], model(TOKENS + 3).logits[:, -1].argmax(-1))


# Threads, generators and copies


def test_tasks_may_be_added_while_another_thread_lists_them():
    model, errors, stop = bert(num_hidden_layers=1), [], threading.Event()
    add_adapter(model, "a", SMALL, modules=())
    for i in range(40):
        insert(model, f"x{i}", SMALL, modules=())

    def serve():
        try:
            while not stop.is_set():
                with using_adapter(model, "a"):
                    assert active_adapter(model) == "a"
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=serve) for _ in range(3)]
        for thread in threads:
            thread.start()
        for i in range(40):
            insert(model, f"y{i}", SMALL, modules=())
            delete_adapter(model, f"y{i}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert errors == []


def test_generators_that_are_closed_elsewhere_leave_nothing_behind():
    model = bert(num_hidden_layers=1)
    add_adapter(model, "t", SMALL)
    key, task = model.adapter_ops.selection.key, weakref.ref(model.adapter_ops.task("t"))

    def stream():
        with using_adapter(model, "t"), skip_layers(model, [0]):
            yield

    for _ in range(5):
        generator = stream()
        next(generator)
        contextvars.Context().run(generator.close)
    chain, choice = 0, _NOTHING.current.choices.get(key)
    while choice is not None:
        chain, choice = chain + 1, choice.outer
    assert chain <= 2
    delete_adapter(model, "t")
    gc.collect()
    assert task() is None
    other = bert(num_hidden_layers=1)
    add_adapter(other, "t", SMALL)
    with using_adapter(other, "t"):
        assert key not in _NOTHING.current.choices


def test_an_async_task_has_the_task_until_the_context_ends():
    model = bert(num_hidden_layers=1)
    add_adapter(model, "a", SMALL)
    add_adapter(model, "b", SMALL)
    with using_adapter(model, "a"):
        context = contextvars.copy_context()
        assert context.run(active_adapter, model) == "a"
    assert context.run(active_adapter, model) == "b"


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(32, 3)

    def forward(self, x):
        return self.lin(x[0])


def test_a_model_pickles_whose_head_comes_after_the_adapters():
    """In an nn.Sequential the adapters are a child of the first child."""
    model = nn.Sequential(bert(hf.BertModel), First()).eval()
    base = logits(model)
    add_adapter(model, "t", STRONG)
    shake(model)
    expected = logits(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(logits(other), expected)
        set_active_adapter(other, None)
        assert torch.equal(logits(other), base)
        delete_adapter(other, "t")
        assert not any("forward" in vars(m) for m in other.modules()) and torch.equal(logits(other), base)


def test_adding_and_deleting_grows_nothing():
    model = bert(num_hidden_layers=1)

    def cycle(count):
        for _ in range(count):
            add_adapter(model, "t", "pfeiffer")
            logits(model)
            delete_adapter(model, "t")
        gc.collect()
        return len(gc.get_objects())

    for kept in ((), ("kept",)):
        for name in kept:
            add_adapter(model, name, STRONG)
        before = cycle(5)
        assert cycle(20) < before + 20  # an object a cycle; other threads of the process make a few of their own


def test_a_layer_that_two_places_name_is_one_place():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))] * 2)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Shared(), torch.randn(3, 8)
    add_adapter(model, "t", STRONG, sites={"ffn": SitePattern("layers.*.0")}, modules=())
    (adapter,) = model.adapter_ops.task("t").layer_at.values()
    linear = model.layers[0][0]
    expected = x
    for _ in range(2):
        h = nn.functional.linear(expected, linear.weight, linear.bias)
        expected = adapter(h, h)
    torch.testing.assert_close(model(x), expected)
