"""Several tasks that train in one batch: losses, gradients and parameters are those of separate training."""

import pytest
import torch
from helpers_mixed import add_tasks
from helpers_tasks import STRONG, bert, checkpoint_layers
from torch import nn

from adapter_ops import (
    AdapterConfig,
    active_adapter,
    list_adapters,
    set_active_adapter,
    task_state_dict,
    train_adapter,
    using_adapters,
)

pytestmark = pytest.mark.usefixtures("aten")
CONFIGS = ["houlsby", AdapterConfig(bottleneck=3, activation="relu", layer_norms="frozen", scale="learned"), "pfeiffer"]
NAMES = ["t0", "t1", "t2", "t1", "t0", "t1"]
ROWS = {name: [i for i, other in enumerate(NAMES) if other == name] for name in ("t0", "t1", "t2")}
X, Y = torch.arange(42).view(6, 7) % 50, torch.tensor([0, 1, 2, 3, 4, 0])


def trainee():
    torch.manual_seed(0)
    return add_tasks(bert(num_hidden_layers=2).double(), CONFIGS)


def optimizers(model):
    return {name: torch.optim.AdamW(model.adapter_ops.task(name).parameters(), lr=1e-2) for name in ROWS}


def loss_of(logits, rows):
    return nn.functional.cross_entropy(logits[rows], Y[rows])


def test_three_tasks_train_in_one_batch_as_they_do_alone():
    mixed, separate = trainee(), trainee()
    train_adapter(mixed, list(ROWS))
    assert active_adapter(mixed) is None
    trains = {name for name, p in mixed.named_parameters() if p.requires_grad}
    assert trains == {name for name, _ in mixed.named_parameters() if name.startswith("adapter_ops.tasks.")}
    made, losses = optimizers(mixed), {name: [] for name in ROWS}
    with using_adapters(mixed, NAMES):  # one context for all steps, in which the parameters change
        for _ in range(5):
            logits = mixed(X).logits
            each = {name: loss_of(logits, rows) for name, rows in ROWS.items()}
            sum(each.values()).backward()
            for name, optimizer in made.items():
                losses[name].append(each[name].item())
                optimizer.step()
                optimizer.zero_grad()
    for name, optimizer in optimizers(separate).items():
        train_adapter(separate, name)
        for expected in losses[name]:
            loss = nn.functional.cross_entropy(separate(X[ROWS[name]]).logits, Y[ROWS[name]])
            assert abs(loss.item() - expected) < 1e-9
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found, wanted = task_state_dict(mixed, name), task_state_dict(separate, name)
        for key, t in wanted.items():
            torch.testing.assert_close(found[key], t, rtol=1e-7, atol=1e-7)
        assert losses[name][-1] < losses[name][0]


def test_contexts_in_which_parameters_change_or_gradients_are_enabled_later():
    model = trainee()
    train_adapter(model, list(ROWS))
    parameters = [p for p in model.parameters() if p.requires_grad]
    with using_adapters(model, NAMES):
        model(X)
        with torch.no_grad():
            for p in parameters:
                p.mul_(1.1)
            found = model(X).logits
        expected = torch.autograd.grad(model(X).logits.square().sum(), parameters)
    with torch.no_grad(), using_adapters(model, NAMES):
        torch.testing.assert_close(found, model(X).logits)
        with torch.enable_grad():
            gradients = torch.autograd.grad(model(X).logits.square().sum(), parameters)
    assert all(map(torch.equal, gradients, expected))


def test_a_task_without_rows_gets_no_gradients():
    model = add_tasks(bert(), [STRONG] * 3)
    train_adapter(model, ["t0", "t1", "t2"])
    with using_adapters(model, ["t0", "t1", "t1", None, "t0", None]):
        model(X).logits.square().sum().backward()
    have = {name: any(p.grad is not None for p in model.adapter_ops.task(name).parameters()) for name in ROWS}
    assert have == {"t0": True, "t1": True, "t2": False}


def test_each_tasks_own_dropout():
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    add_tasks(model, [AdapterConfig(bottleneck=4, dropout=p) for p in (0.0, 0.5)]).train()
    with torch.no_grad(), using_adapters(model, ["t0", "t1", "t1", None, "t0", None]):
        first, second = model(X).logits, model(X).logits
        same = [torch.equal(a, b) for a, b in zip(first, second)]
        model.eval()
        exact = model(X).logits
    assert same == [True, False, False, True, True, True]
    torch.testing.assert_close(first[[0, 3, 4, 5]], exact[[0, 3, 4, 5]])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = trainee()
    train_adapter(model, list(ROWS))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients():
        with using_adapters(model, NAMES):
            loss = model(inputs_embeds=model.bert.embeddings.word_embeddings(X)).logits.square().sum()
            return torch.autograd.grad(loss, parameters) if not reentrant else backward(loss)

    def backward(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in parameters]

    expected = gradients()
    checkpoint_layers(model, reentrant)
    for found, wanted in zip(gradients(), expected):
        torch.testing.assert_close(found, wanted)


def test_training_a_compiled_model():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model = add_tasks(bert(num_hidden_layers=1), [STRONG] * 3)
    train_adapter(model, ["t0", "t1", "t2"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for names in (NAMES, ["t2", "t1", "t0", "t0", "t0", "t2"]):
        with using_adapters(model, names):
            found = torch.autograd.grad(compiled(X).logits.square().sum(), parameters)
            expected = torch.autograd.grad(model(X).logits.square().sum(), parameters)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e)
    assert counter.frame_count == 1


def test_train_adapter_with_several_names():
    model = add_tasks(bert(), [STRONG] * 2)
    set_active_adapter(model, "t0")
    for names, text in (([], "was given no task"), (["t0", "t9"], "no adapter 't9'; it has: t0, t1")):
        with pytest.raises(ValueError, match=text):
            train_adapter(model, names)
    assert not any(p.requires_grad for p in model.parameters()) and active_adapter(model) == "t0"
    train_adapter(model, ("t1",))
    assert active_adapter(model) is None and list(list_adapters(model)) == ["t0", "t1"]
    assert all(p.requires_grad == n.startswith("adapter_ops.tasks.t1.") for n, p in model.named_parameters())
