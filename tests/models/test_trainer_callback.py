"""Checkpoints of transformers' Trainer with AdapterCallback."""

import json
import logging

import pytest
import torch
import transformers as hf

pytest.importorskip("accelerate")
from helpers_models import TEXT, tiny
from helpers_tasks import STRONG
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from adapter_ops import AdapterConfig, add_adapter
from adapter_ops.integrations.trainer import AdapterCallback

pytestmark = pytest.mark.usefixtures("aten")
DATA = [{"input_ids": torch.arange(i, i + 7), "labels": torch.tensor(i % 3)} for i in range(20)]


class Wrapper(nn.Module):
    """A module of the user's, with a BatchNorm that the base updates in training."""

    def __init__(self):
        super().__init__()
        self.encoder = hf.BertModel(hf.BertConfig(**TEXT))
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.norm(self.encoder(input_ids).last_hidden_state[:, 0]))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def bert(**fields):
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT | dict(num_labels=3) | fields))


MAKE = {"bert": (bert, None), "wrapper": (Wrapper, ["head"])}


def seeded(kind="bert"):
    make, modules = MAKE[kind]
    torch.manual_seed(7)
    model = make()
    add_adapter(model, "other", "pfeiffer", modules=modules)
    add_adapter(model, "t", STRONG, modules=modules)
    return model


def trainer(model, folder, *callbacks, **fields):
    options = dict(per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, save_steps=2, report_to=[])
    options |= dict(disable_tqdm=True, use_cpu=True, logging_steps=1) | fields
    arguments = TrainingArguments(output_dir=str(folder), **options)
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=list(callbacks))


def size(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


class StopAt4(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 4


@pytest.fixture
def warnings(caplog):
    """Trainer's own warnings, which tell of keys that a checkpoint lacks."""
    logger = logging.getLogger("transformers.trainer")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("kind", MAKE)
def test_a_checkpoint_has_what_trains_and_the_buffers(tmp_path, kind):
    model = seeded(kind)
    trainer(model, tmp_path, AdapterCallback()).train()
    found = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained | buffers
    state = model.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert kind == "wrapper" or json.loads((tmp_path / "checkpoint-6" / "config.json").read_text())["hidden_size"] == 16


@pytest.mark.parametrize("kind", MAKE)
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, kind, warnings):
    whole = seeded(kind)
    trainer(whole, tmp_path / "whole").train()
    trainer(seeded(kind), tmp_path / "broken", StopAt4(), AdapterCallback()).train()
    resumed = seeded(kind)
    run = trainer(resumed, tmp_path / "broken", AdapterCallback())
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 6
    expected = whole.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in resumed.state_dict().items())
    assert [r.getMessage() for r in warnings.records if "missing keys" in r.getMessage()] == []


@pytest.mark.parametrize("kind", MAKE)
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, kind, warnings):
    model = seeded(kind)
    choose = max if kind == "wrapper" else min  # that which is not the last one here
    fields = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, learning_rate=0.3)
    fields |= dict(metric_for_best_model="eval_loss", greater_is_better=choose is max)
    run = trainer(model, tmp_path, AdapterCallback(), **fields)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    best = 2 * (1 + losses.index(choose(losses)))
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}") and best < 6
    assert run.evaluate()["eval_loss"] == pytest.approx(choose(losses), rel=1e-5)
    assert [r.getMessage() for r in warnings.records if "missing keys" in r.getMessage()] == []


def test_a_checkpoint_is_small(tmp_path):
    """A task of 2.4 MB on a base of the size of MiniLM: less than 10 MB, with the state of the optimizer."""
    torch.manual_seed(0)
    model = bert(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    add_adapter(model, "t", AdapterConfig(bottleneck=64))
    trainer(model, tmp_path, AdapterCallback(), max_steps=1, save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    task = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert 2.3e6 < task < 2.5e6 and 3 * task < size(checkpoint) < 10e6
    model.save_pretrained(tmp_path / "whole")
    assert size(tmp_path / "whole") > 42e6


def test_what_is_no_checkpoint_is_saved_whole_during_the_training_too(tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            model.save_pretrained(tmp_path / f"own-{state.global_step}")

    model = seeded()
    trainer(model, tmp_path / "run", AdapterCallback(), Save(), max_steps=1).train()
    assert load_file(tmp_path / "own-1" / "model.safetensors").keys() == model.state_dict().keys()
    assert "save_pretrained" not in vars(model) and not model._load_state_dict_post_hooks


def test_a_run_that_broke_off_leaves_a_model_that_is_saved_whole(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise KeyboardInterrupt

    model = seeded()
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, AdapterCallback(), Break()).train()
    model.save_pretrained(tmp_path / "own")
    assert load_file(tmp_path / "own" / "model.safetensors").keys() == model.state_dict().keys()
    run = trainer(model, tmp_path, AdapterCallback())
    run.train()
    assert "save_pretrained" not in vars(model)
    with pytest.raises(RuntimeError, match="Missing key"):
        seeded().load_state_dict(load_file(tmp_path / "checkpoint-6" / "model.safetensors"))


def test_a_task_may_be_added_after_the_trainer_is_made(tmp_path):
    torch.manual_seed(7)
    model = bert()
    run = trainer(model, tmp_path, AdapterCallback())
    add_adapter(model, "t", STRONG)
    run.train()
    assert not any("bert.encoder" in name for name in load_file(tmp_path / "checkpoint-6" / "model.safetensors"))


def test_models_without_a_task_are_refused(tmp_path):
    run = trainer(bert(), tmp_path, AdapterCallback())
    with pytest.raises(ValueError, match="the model has no adapters; it has: none"):
        run.train()
    model = tiny()
    model.peft_config = {}
    add_adapter(model, "t", STRONG, sites={"ffn": "layers.*.down"}, modules=())
    with pytest.raises(ValueError, match="Tiny is wrapped by PEFT"):
        AdapterCallback().on_train_begin(None, None, None, model=model)
