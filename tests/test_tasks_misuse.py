"""What people do to a model that has tasks: replaced modules, odd heads, shared parts, threads, weight decay groups."""

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
from test_inject import STRONG, TOKENS, bert, logits, step
from test_integrations import DECODER, T5, TEXT, TWO, make
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

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
    task_state_dict,
    train_adapter,
    using_adapter,
)
from adapter_ops.context import _NOTHING
from adapter_ops.inject import insert
from adapter_ops.integrations.transformers import Place

pytestmark = pytest.mark.usefixtures("aten")

SMALL = AdapterConfig(bottleneck=1, layer_norms="frozen")


class Top(nn.Module):
    """A base and one head under any name."""

    def __init__(self, name="head", encoder=None, head=None):
        super().__init__()
        self.encoder = encoder or bert(hf.BertModel)
        self.name = name
        self.add_module(name, head or nn.Linear(32, 5))

    def forward(self, x):
        return self._modules[self.name](self.encoder(x)[1])


def run(model):
    with torch.no_grad():
        output = model(TOKENS)
        return output if isinstance(output, torch.Tensor) else output[0]


def shake(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)


def copy_of(model, name, path):
    return model.adapter_ops.task(name).copy_at[path]


# Heads that do more than an nn.Linear


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    "reparametrise",
    [weight_norm, spectral_norm, parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)],
    ids=["weight_norm", "spectral_norm", "parametrizations.weight_norm", "prune"],
)
def test_a_head_whose_weight_is_computed_trains(reparametrise, called):
    model = bert()
    reparametrise(model.classifier)
    if called:
        model.requires_grad_(False)
        logits(model)
    add_adapter(model, "t", STRONG)
    model(TOKENS).logits.square().sum().backward()
    head = copy_of(model, "t", "classifier")
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
    before = logits(model)
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(2).add_(0.1)
    assert not torch.equal(logits(model), before)


def test_a_head_that_keeps_its_last_output():
    class Head(nn.Linear):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    model = bert()
    model.classifier = Head(32, 5)
    model(TOKENS)
    add_adapter(model, "t", STRONG)
    step(model)
    model(TOKENS)
    add_adapter(model, "u", STRONG)
    step(model)


def test_a_lazy_head_is_refused_until_it_has_a_shape():
    model = bert()
    model.classifier = nn.LazyLinear(5)
    with pytest.raises(ValueError, match=r"'classifier\.weight' has no shape yet.*call the model once"):
        add_adapter(model, "t", STRONG)
    assert not hasattr(model, "adapter_ops")
    logits(model)
    add_adapter(model, "t", STRONG)
    step(model)


def test_hooks_on_parts_of_a_head_stay_the_users():
    class Recorder:
        def __init__(self):
            self.seen = []

        def hook(self, module, args, output):
            self.seen.append(output)

    model, recorder = bert(), Recorder()
    model.classifier = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 5))
    model.classifier[1].register_forward_hook(recorder.hook)
    add_adapter(model, "t", STRONG)
    step(model)
    recorder.seen.clear()
    assert torch.equal(logits(model), recorder.seen[0]) and len(recorder.seen) == 1


@pytest.mark.parametrize("name", ["values", "keys", "items", "pop", "update", "clear", "forwards"])
def test_a_head_named_like_a_method_of_a_dictionary(name, tmp_path):
    model = Top(name).eval()
    add_adapter(model, "t", STRONG)
    assert list_adapters(model)["t"].modules == (name,)
    shake(model)
    expected = run(model)
    save_adapter(model, tmp_path, "t")
    delete_adapter(model, "t")
    load_adapter(model, tmp_path)
    assert torch.equal(run(model), expected)


class Calls(nn.Module):
    """A head that returns a tuple, is called twice, and takes keywords."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = bert(hf.BertModel), Pair()

    def forward(self, x):
        pooled = self.encoder(x)[1]
        return self.head(pooled)[0] + 2 * self.head(x=pooled, shift=1.0)[0]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(32, 5)

    def forward(self, x, *, shift=0.0):
        return self.lin(x) + shift, x


def test_a_head_that_is_called_twice_and_returns_a_tuple():
    model = Calls().eval()
    add_adapter(model, "t", STRONG)
    shake(model)
    pooled = model.encoder(TOKENS)[1]
    torch.testing.assert_close(model(TOKENS), 3 * copy_of(model, "t", "head").lin(pooled) + 2)


def test_heads_that_share_a_weight_share_it_in_a_task_and_after_a_load(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.a, self.b = bert(hf.BertModel), nn.Linear(32, 5), nn.Linear(32, 5)
            self.b.weight = self.a.weight

        def forward(self, x):
            pooled = self.encoder(x)[1]
            return self.a(pooled) * self.b(pooled)

    model = Two().eval()
    base = run(model)
    add_adapter(model, "t", STRONG)
    shake(model)
    expected = run(model)
    save_adapter(model, tmp_path, "t")
    delete_adapter(model, "t")
    assert torch.equal(run(model), base)
    load_adapter(model, tmp_path)
    assert copy_of(model, "t", "a").weight is copy_of(model, "t", "b").weight
    assert torch.equal(run(model), expected)
    with pytest.raises(ValueError, match=r"'a' shares a parameter with 'b\.weight'"):
        add_adapter(model, "u", STRONG, modules=["a"])


def test_a_tasks_copies_follow_the_models_mode():
    model = bert()
    model.classifier = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, 5))
    add_adapter(model.eval(), "t", AdapterConfig(bottleneck=4, dropout=0.5, norm="batch", init_std=0.3))
    task = model.adapter_ops.task("t")
    leaves = [m for m in task.modules() if not list(m.children())]
    assert not any(m.training for m in leaves)
    assert torch.equal(logits(model), logits(model))
    mean = copy_of(model, "t", "classifier")[1].running_mean
    before, of_base = mean.clone(), model.classifier[1].running_mean.clone()
    model.train()
    assert all(m.training for m in leaves) and not torch.equal(logits(model), logits(model))
    assert not torch.equal(mean, before) and torch.equal(model.classifier[1].running_mean, of_base)


# Modules that are replaced, shared, or contain the places of adapters


def test_a_replaced_module_does_not_take_its_adapter_along():
    model = bert()
    add_adapter(model, "t", STRONG)
    expected, output = logits(model), model.bert.encoder.layer[1].output
    old, output.dropout = output.dropout, nn.Dropout(0.0)
    with pytest.raises(RuntimeError, match=r"layer\.1\.output\.dropout' was replaced after .* save the tasks"):
        logits(model)
    with using_adapter(model, None):
        logits(model)
    output.dropout = nn.Sequential(old)  # a wrapper that calls the old one
    assert torch.equal(logits(model), expected)
    output.dropout = old
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("config", [STRONG, "pfeiffer"], ids=["copied", "read by an adapter"])
def test_a_replaced_norm_is_noticed_and_the_task_runs_there_again(config):
    model = bert()
    add_adapter(model, "t", config)
    shake(model)
    expected, output = logits(model), model.bert.encoder.layer[1].output
    output.LayerNorm = nn.LayerNorm(32, eps=output.LayerNorm.eps)
    with pytest.raises(RuntimeError, match=r"layer\.1\.output\.LayerNorm' was replaced after the task 't'"):
        logits(model)
    set_active_adapter(model, "t")
    assert torch.equal(logits(model), expected)
    delete_adapter(model, "t")
    assert not any("forward" in vars(m) for m in model.modules())


def test_replaced_embeddings_are_the_bases_matter():
    model = bert()
    add_adapter(model, "t", STRONG)
    expected = logits(model)
    model.resize_token_embeddings(60, mean_resizing=False)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("inside", ["bert.encoder.layer.2", "bert.encoder.layer.2.output", "bert.encoder"])
def test_a_module_with_places_inside_is_no_tasks_own(inside):
    model = bert()
    with pytest.raises(ValueError, match=rf"'{inside}' contains .*layer\.2.*leave_out="):
        add_adapter(model, "t", AdapterConfig(bottleneck=4, leave_out=(0, 1)), modules=[inside])
    assert not hasattr(model, "adapter_ops")
    everywhere = AdapterConfig(bottleneck=4, leave_out=(0, 1, 2))
    add_adapter(model, "t", everywhere, modules=[inside])
    model(TOKENS).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_place_itself_and_its_norm_can_be_a_tasks_own(tmp_path):
    """The adapter stands behind the task's own module, and with ln_before on its own norm."""
    model = bert()
    norm, intermediate = "bert.encoder.layer.2.output.LayerNorm", "bert.encoder.layer.2.intermediate"
    add_adapter(model, "t", "pfeiffer", modules=[norm, intermediate])
    shake(model)
    x = copy_of(model, "t", norm).forward(torch.ones(1, 32) * torch.arange(32))
    assert list_adapters(model)["t"].modules == (norm, intermediate) and x.isfinite().all()
    expected, count = logits(model), sum(p.requires_grad for p in model.parameters())
    model(TOKENS).logits.square().sum().backward()
    assert sum(p.grad is not None and p.grad.any() for p in model.parameters()) == count
    save_adapter(model, tmp_path, "t")
    delete_adapter(model, "t")
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)


def test_the_tasks_of_a_model_and_of_its_part_do_not_run_on_top_of_each_other():
    model = bert()
    add_adapter(model, "t", STRONG)
    expected = logits(model)
    for other in (model.bert, Top(encoder=model.bert)):
        with pytest.raises(ValueError, match="runs the adapters of another model, which contains it too"):
            add_adapter(other, "u", STRONG)
        assert "adapter_ops" not in other._modules and torch.equal(logits(model), expected)
    delete_adapter(model, "t")
    add_adapter(model.bert, "u", STRONG)


def test_a_head_outside_of_the_part_that_has_the_tasks_is_named():
    model = bert()
    add_adapter(model.bert, "t", STRONG)
    for verb in (add_adapter, lambda model, name: train_adapter(model, "t")):
        with pytest.warns(UserWarning, match=r"2 parameters train .* outside of the BertModel .*classifier\.weight"):
            verb(model, "u")
    assert list_adapters(model) == list_adapters(model.bert) and list(list_adapters(model)) == ["t", "u"]


def test_a_task_of_the_whole_runs_in_its_part_alone():
    model = bert()
    for name in ("a", "b"):
        add_adapter(model, name, STRONG)
        step(model)
    found = {}
    for name in ("a", "b", None):
        with using_adapter(model, name), torch.no_grad():
            found[name] = model.bert(TOKENS)[1]
            assert torch.equal(model.classifier(found[name]), logits(model))
    assert not torch.equal(found["a"], found["b"])


# Files


def test_a_module_outside_of_the_base_with_the_path_of_one_inside(tmp_path):
    """Both the wrapper and its base have a `pooler`, of the same shape."""
    encoder = bert(hf.BertModel)
    model = Top("pooler", encoder, copy.deepcopy(encoder.pooler))
    model.forward = lambda x: model.pooler(model.encoder(x)[0])
    base = copy.deepcopy(model.state_dict())
    for modules in (None, ["pooler", "encoder.pooler"]):
        add_adapter(model, "t", STRONG, modules=modules)
        shake(model)
        expected = (run(model), model.encoder(TOKENS)[1])
        assert len(task_state_dict(model, "t")) == len(model.adapter_ops.task("t").state_dict())
        save_adapter(model, tmp_path, "t")
        delete_adapter(model, "t")
        load_adapter(model, tmp_path)
        assert all(map(torch.equal, expected, (run(model), model.encoder(TOKENS)[1])))
        delete_adapter(model, "t")
        assert all(torch.equal(model.state_dict()[k], t) for k, t in base.items())
    bare = bert(hf.BertModel)
    bare.load_state_dict(encoder.state_dict())
    with pytest.raises(ValueError, match=r"the model has no modules .*'\+pooler'"):
        load_adapter(bare, tmp_path)


@pytest.mark.parametrize("labels", [5, 32])
def test_as_many_classes_as_another_layer_has_outputs(labels, tmp_path):
    """pre_classifier has 32 outputs in both models."""
    fields = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=50)
    one, two = (
        hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**fields, num_labels=n)).eval() for n in (3, labels)
    )
    two.distilbert.load_state_dict(one.distilbert.state_dict())
    add_adapter(one, "t", STRONG)
    shake(one)
    save_adapter(one, tmp_path, "t")
    load_adapter(two, tmp_path)
    assert torch.equal(logits(two), logits(one)) and list_adapters(two)["t"].labels.num_labels == 3


def test_two_heads_take_the_labels_of_a_file(tmp_path):
    class Two(hf.BertForTokenClassification):
        def __init__(self, config):
            super().__init__(config)
            self.second = nn.Linear(32, config.num_labels)

    one, two = bert(Two, num_labels=3), bert(Two)
    two.bert.load_state_dict(one.bert.state_dict())
    add_adapter(one, "t", STRONG)
    save_adapter(one, tmp_path, "t")
    load_adapter(two, tmp_path)
    assert [copy_of(two, "t", path).out_features for path in ("classifier", "second")] == [3, 3]
    assert torch.equal(logits(two), logits(one))


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
