"""Heads that do more than an nn.Linear, each of which a task has a copy of."""

import pytest
import torch
import transformers as hf
from helpers_tasks import STRONG, TOKENS, Top, bert, copy_of, logits, shake, step
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from adapter_ops import (
    AdapterConfig,
    add_adapter,
    delete_adapter,
    list_adapters,
    load_adapter,
    save_adapter,
    using_adapter,
)

pytestmark = pytest.mark.usefixtures("aten")


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
    expected = logits(model)
    save_adapter(model, tmp_path, "t")
    delete_adapter(model, "t")
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), expected)


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
    base = logits(model)
    add_adapter(model, "t", STRONG)
    shake(model)
    expected = logits(model)
    save_adapter(model, tmp_path, "t")
    delete_adapter(model, "t")
    assert torch.equal(logits(model), base)
    load_adapter(model, tmp_path)
    assert copy_of(model, "t", "a").weight is copy_of(model, "t", "b").weight
    assert torch.equal(logits(model), expected)
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


def test_hooks_of_users_on_a_head_run_once_and_see_the_tasks_output():
    model = bert()
    seen = []
    model.classifier.register_forward_hook(lambda module, args, output: seen.append(output))
    add_adapter(model, "t", STRONG)
    step(model)
    seen.clear()
    assert torch.equal(logits(model), seen[0]) and len(seen) == 1


def test_a_norm_inside_a_head_is_the_heads():
    """Of two tasks one has its own head, and the other its own copy of the norm inside the base's head."""
    model = bert()
    model.classifier = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5))
    add_adapter(model, "norm", STRONG, modules=())
    add_adapter(model, "head", STRONG)
    with torch.no_grad():
        model.adapter_ops.task("head").copy_at["classifier"][0].weight.fill_(3.0)
        model.adapter_ops.task("norm").copy_at["classifier.0"].weight.fill_(5.0)
        for name, factor in (("head", 3.0), ("norm", 5.0)):
            with using_adapter(model, name):
                seen = []
                handle = model.classifier.register_forward_hook(lambda m, a, y, seen=seen: seen.append((a[0], y)))
                model(TOKENS)
                handle.remove()
            task = model.adapter_ops.task(name)
            linear = task.copy_at["classifier"][1] if name == "head" else model.classifier[1]
            x, y = seen[0]
            torch.testing.assert_close(y, linear(factor * nn.functional.layer_norm(x, [32])))
