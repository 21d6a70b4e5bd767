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
from test_inject import STRONG, TOKENS, bert, logits
from test_integrations import DECODER, T5, TEXT, TWO, make
from torch import nn

from adapter_ops import (
    AdapterConfig,
    active_adapter,
    add_adapter,
    delete_adapter,
    set_active_adapter,
    skip_layers,
    using_adapter,
)
from adapter_ops.context import _NOTHING
from adapter_ops.inject import insert
from adapter_ops.integrations.transformers import Place

pytestmark = pytest.mark.usefixtures("aten")

SMALL = AdapterConfig(bottleneck=1, layer_norms="frozen")


def run(model):
    with torch.no_grad():
        return model(TOKENS)


def shake(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)


# What trains


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
    base = run(model)
    add_adapter(model, "t", STRONG)
    shake(model)
    expected = run(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(run(other), expected)
        set_active_adapter(other, None)
        assert torch.equal(run(other), base)
        delete_adapter(other, "t")
        assert not any("forward" in vars(m) for m in other.modules()) and torch.equal(run(other), base)


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
        assert cycle(5) >= cycle(20)


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
    add_adapter(model, "t", STRONG, places={"ffn": Place("layers.*.0")}, modules=())
    (adapter,) = model.adapter_ops.task("t").layer_at.values()
    linear = model.layers[0][0]
    expected = x
    for _ in range(2):
        h = nn.functional.linear(expected, linear.weight, linear.bias)
        expected = adapter(h, h)
    torch.testing.assert_close(model(x), expected)
