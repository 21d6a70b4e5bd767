"""What people do to a model that has tasks: replaced modules, odd heads, shared parts, and files of such models."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from helpers_tasks import STRONG, TOKENS, bert, logits, step
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from adapter_ops import (
    AdapterConfig,
    add_adapter,
    delete_adapter,
    list_adapters,
    load_adapter,
    save_adapter,
    set_active_adapter,
    task_state_dict,
    train_adapter,
    using_adapter,
)

pytestmark = pytest.mark.usefixtures("aten")


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


# Modules that are replaced, shared, or contain the sites of adapters


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
    old, output.LayerNorm = output.LayerNorm, nn.LayerNorm(32, eps=output.LayerNorm.eps)
    with pytest.raises(RuntimeError, match=r"layer\.1\.output\.LayerNorm' was replaced after the task 't'"):
        logits(model)
    set_active_adapter(model, "t")
    assert torch.equal(logits(model), expected) and "forward" not in vars(old)
    delete_adapter(model, "t")
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_head_in_a_replaced_module_is_noticed():
    model = bert(hf.BertForMaskedLM)
    add_adapter(model, "t", STRONG, modules=["cls.predictions.transform"])
    shake(model)
    expected = logits(model)
    model.cls = copy.deepcopy(bert(hf.BertForMaskedLM).cls)
    model.tie_weights()
    with pytest.raises(RuntimeError, match=r"'cls\.predictions\.transform' was replaced"):
        logits(model)
    set_active_adapter(model, "t")
    assert torch.equal(logits(model), expected)


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
    model.classifier.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_adapter(model, "t")


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(config={"bottleneck": 4}), r"unknown preset \{'bottleneck': 4\}; known: houlsby"),
        (dict(config=None), "unknown preset None"),
        (dict(sites={"ffn": 3}), r"sites\['ffn'\] is 3, expected a pattern or a SitePattern"),
        (dict(sites={"ffn": ("a.*", None, None)}), r"sites\['ffn'\] is \('a\.\*'.*expected a pattern or a SitePattern"),
        (dict(modules=[None]), r"has no modules \[None\]"),
        (dict(modules=[""]), r"has no modules \[''\]"),
        (dict(modules=["bert.pooler", "bert.pooler.dense"]), r"\['bert\.pooler\.dense'\] are parts of others"),
    ],
    ids=str,
)
def test_arguments_of_another_kind(arguments, message):
    model = bert()
    with pytest.raises(ValueError, match=message):
        add_adapter(model, "t", **arguments)
    assert "adapter_ops" not in model._modules


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


def test_an_offloaded_head_takes_the_labels_of_a_file(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    one, two = bert(num_labels=3), bert()
    two.bert.load_state_dict(one.bert.state_dict())
    add_adapter(one, "t", STRONG)
    shake(one)
    save_adapter(one, tmp_path, "t")
    accelerate.cpu_offload(two, execution_device=torch.device("cpu"))
    load_adapter(two, tmp_path)
    assert torch.equal(logits(two), logits(one))


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
