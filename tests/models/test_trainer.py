"""A model with adapters under transformers' Trainer, which knows nothing of them."""

import pytest
import torch

pytest.importorskip("accelerate")
from helpers_tasks import STRONG, bert, logits
from transformers import Trainer, TrainerCallback, TrainingArguments

from adapter_ops import add_adapter, load_adapter, save_adapter, set_active_adapter

pytestmark = pytest.mark.usefixtures("aten")


DATA = [{"input_ids": torch.arange(i, i + 7), "labels": torch.tensor(i % 5)} for i in range(20)]


def seeded():
    torch.manual_seed(7)
    model = bert()
    add_adapter(model, "t", STRONG)
    return model


def trainer(model, folder, callbacks=(), **fields):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=10,
        learning_rate=1e-2,
        save_steps=5,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **fields,
    )
    return Trainer(model, arguments, train_dataset=DATA, callbacks=list(callbacks))


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_the_loss_falls_and_the_base_stays(tmp_path, fields):
    torch.manual_seed(7)
    base = {name: t.clone() for name, t in bert().state_dict().items()}
    model = seeded()
    run = trainer(model, tmp_path, **fields)
    run.train()
    first, *_, last = losses(run)
    assert last < first
    set_active_adapter(model, None)
    found = model.state_dict()
    assert all(torch.equal(found[name], t) for name, t in base.items())


class StopAt5(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 5


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    whole = seeded()
    trainer(whole, tmp_path / "whole").train()
    trainer(seeded(), tmp_path / "broken", [StopAt5()]).train()
    resumed = seeded()
    run = trainer(resumed, tmp_path / "broken")
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 10
    expected = whole.eval().state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in resumed.eval().state_dict().items())

    save_adapter(resumed, tmp_path / "t", "t")
    torch.manual_seed(7)
    fresh = bert()
    load_adapter(fresh, tmp_path / "t")
    assert torch.equal(logits(fresh), logits(resumed))
