"""What an AdapterBank refuses, with errors that name both sides, after which it is as it was."""

import dataclasses
import shutil

import pytest
import torch
import transformers as hf
from helpers_bank import CONFIG, X, check, fresh, saved, want
from helpers_mixed import add_tasks, close

from adapter_ops import AdapterBank, add_adapter, save_adapter
from adapter_ops.models.adapters import find_adapters

pytestmark = pytest.mark.usefixtures("aten")


def test_numbers_of_tasks_and_names_that_are_refused(six):
    folder, outputs = six
    model = fresh()
    bank = AdapterBank(model, 3, 8)
    for i in (2, 0):
        bank.register(f"t{i}", folder / f"t{i}")
    with torch.no_grad(), bank.using(torch.tensor([0, -1, 1, 1, 0])):
        close(model(X).logits, want(outputs, ["t2", None, "t0", "t0", "t2"]))
    for names, error, text in (
        (["t0", "t9"], ValueError, "the bank has no adapter 't9'; it has: t2, t0"),
        (torch.tensor([2]), ValueError, r"numbers \[2\], expected -1, for the bare base, to 1: the bank has 2"),
        ("t0", TypeError, "expected a sequence"),
    ):
        with pytest.raises(error, match=text), bank.using(names):
            raise AssertionError
    with bank.using(["t0"] * 4), pytest.raises(ValueError, match="batch of 5, and tasks were given for 4 examples"):
        model(X)
    for make_it, text in (
        (lambda: AdapterBank(model, 0), "capacity is 0, expected a whole number of at least 1"),
        (lambda: AdapterBank(model, 2, 0), "bottleneck is 0"),
        (lambda: AdapterBank(model, 2, timeout=-1.0), "timeout is -1.0"),
        (lambda: bank.load("t0", folder / "t1"), "the bank already has an adapter 't0'"),
        (lambda: bank.register("t 0", folder / "t1"), "may hold letters, digits"),
        (lambda: bank.unload("t9"), "the bank has no adapter 't9'; it has: t2, t0"),
        (lambda: bank.add("t0"), "the model has no adapter 't0'; it has: none"),
    ):
        with pytest.raises(ValueError, match=text):
            make_it()
    for i in range(60):
        bank.register(f"x{i}", folder / "t0")
    with pytest.raises(ValueError, match="x37 and 22 others"), bank.using(["t9"]):
        raise AssertionError
    assert bank._pins == [0, 0, 0]


def test_files_that_cannot_be_loaded_leave_the_bank_as_it_was(six, tmp_path):
    folder, outputs = six
    model = fresh()
    bank = AdapterBank(model, 1, 8)
    bank.load("good", folder / "t1")
    shutil.copytree(folder / "t2", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_ops.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for path, error in ((tmp_path / "cut", ValueError), (tmp_path / "none", FileNotFoundError)):
        with pytest.raises(error, match=path.name):
            bank.load("bad", path)
        bank.register("bad", path)
        with pytest.raises(error, match=path.name), bank.using(["bad", "good"][:1]):
            raise AssertionError
        bank.unload("bad")
    assert bank.names() == bank.resident() == ["good"] and bank.stats().evictions == 0 and bank._pins == [0]
    check(model, bank, {"good": outputs["t1"]}, ["good"] * 5)


OTHERS = {
    "activation='relu'": dict(activation="relu"),
    "scale=2.0": dict(scale=2.0),
    "depth=2": dict(depth=2),
    "layer_norms='frozen'": dict(layer_norms="frozen"),
    "leave_out=(1,)": dict(leave_out=(1,)),
}


@pytest.mark.parametrize("text", OTHERS)
def test_tasks_of_another_config(text, six, tmp_path):
    folder, _ = six
    other = dataclasses.replace(CONFIG, **OTHERS[text])
    saved(tmp_path, [other])
    bank = AdapterBank(fresh(), 2, 8)
    bank.load("t0", folder / "t0")
    field = text.partition("=")[0]
    expected = f"{field}={getattr(CONFIG, field)!r}"
    with pytest.raises(ValueError, match="bank's first task, 't0', has") as error:
        bank.load("other", tmp_path / "t0")
    assert f"the task 'other' has {text}" in str(error.value) and expected.partition("=")[2] in str(error.value)
    assert bank.names() == ["t0"]


def test_tasks_that_do_not_fit(six, tmp_path):
    folder, outputs = six
    with pytest.raises(ValueError, match=r"'big' has a bottleneck of 7 at 'bert.*attention', and .* at most 6"):
        AdapterBank(fresh(), 2, 6).load("big", folder / "t5")
    small = fresh(num_labels=3)
    add_tasks(small, [CONFIG])
    save_adapter(small, tmp_path / "labels", "t0")
    add_adapter(small, "headless", CONFIG, modules=())
    save_adapter(small, tmp_path / "headless", "headless")
    model = fresh()
    bank = AdapterBank(model, 2, 8)
    bank.load("t0", folder / "t0")
    with pytest.raises(ValueError, match=r"has \(3, 32\) torch.float32 as classifier.weight, and .*has \(5, 32\)"):
        bank.load("labels", tmp_path / "labels")
    with pytest.raises(ValueError, match=r"own modules.*they differ at classifier"):
        bank.load("headless", tmp_path / "headless")
    wide = fresh()
    add_tasks(wide, [CONFIG])
    for layer in wide.adapter_ops.task("t0").layer_at.values():
        layer.double()
    bank_of_wide = AdapterBank(wide, 2, 8)
    bank_of_wide.load("a", folder / "t0")
    with pytest.raises(ValueError, match=r"the adapter of the task 't0' at .*float64.*float32"):
        bank_of_wide.add("t0")
    bank.register("labels", tmp_path / "labels")
    with pytest.raises(ValueError, match=r"classifier\.weight"), bank.using(["labels", "t0", "t0"]):
        raise AssertionError
    check(model, bank, outputs, ["t0", None, "t0", "t0", None])
    empty = AdapterBank(fresh(), 2, 8)  # two tasks, the first of which shapes the bank, and the second does not fit
    empty.register("t0", folder / "t0")
    empty.register("labels", tmp_path / "labels")
    with pytest.raises(ValueError, match=r"classifier\.weight"), empty.using(["t0", "labels"]):
        raise AssertionError
    with empty.using(["labels"] * 5), torch.no_grad():
        assert empty.model(X).logits.shape == (5, 3)


def test_relative_positions_that_rows_share(tmp_path):
    def base():
        torch.manual_seed(0)
        fields = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)
        fields |= dict(relative_attention=True, norm_rel_ebd="layer_norm", pos_att_type="p2c|c2p")
        return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**fields)).eval()

    saved(tmp_path, [CONFIG], base)
    model = base()
    with pytest.raises(ValueError, match="which all rows of a batch share"):
        AdapterBank(model, 2, 8).load("t0", tmp_path / "t0")
    assert find_adapters(model) is None and not hasattr(model.deberta, "adapter_ops")
