"""AdapterBank: tasks on the device and in folders, the same answers as alone, and what becomes of a place."""

import dataclasses
import random
import threading
import time

import pytest
import torch
import transformers as hf
from helpers_bank import CONFIG, X, check, fresh, saved, want
from helpers_families import DECODER, make
from helpers_mixed import add_tasks, close
from helpers_models import SITES, tiny
from helpers_tasks import bert
from torch import nn

from adapter_ops import (
    AdapterBank,
    add_adapter,
    delete_adapter,
    list_adapters,
    save_adapter,
    set_active_adapter,
    using_adapter,
    using_adapters,
)
from adapter_ops.models import mixed, storage
from adapter_ops.models.adapters import find_adapters
from adapter_ops.models.config import PRESETS

pytestmark = pytest.mark.usefixtures("aten")


def test_hits_misses_evictions_and_rows(six):
    folder, outputs = six
    model = fresh()
    bank = AdapterBank(model, capacity=3, bottleneck=8)
    check(model, bank, outputs, [None] * 5)  # before any task is there
    assert find_adapters(model) is None
    for i in range(5):
        bank.register(f"t{i}", folder / f"t{i}")
    bank.load("t5", folder / "t5")
    assert bank.names() == ["t0", "t1", "t2", "t3", "t4", "t5"] and bank.resident() == ["t5"]
    for names, resident in (
        (["t5", "t0", "t5", None, "t0"], ["t5", "t0"]),
        (["t1", "t1", "t0", "t1", "t1"], ["t5", "t1", "t0"]),
        (["t5", None, None, None, None], ["t1", "t0", "t5"]),
        (["t2", "t3", None, "t2", "t2"], ["t5", "t2", "t3"]),
        (["t4", "t2", "t5", "t2", "t3"], None),
    ):
        if resident is None:
            with pytest.raises(ValueError, match="the batch has 4 different tasks, and the bank has places for 3"):
                check(model, bank, outputs, names)
        else:
            check(model, bank, outputs, names)
            assert bank.resident() == resident
    stats = bank.stats()
    assert stats[:4] == (3, 4, 2, 5) and stats.seconds_per_load == stats.seconds_loading / 5 > 0
    assert stats.rows == {"t5": 3, "t0": 3, "t1": 4, "t2": 3, "t3": 1}
    check(model, bank, outputs, [None] * 5)
    with torch.no_grad():
        assert torch.equal(model(X).logits, outputs[None])
    assert AdapterBank(fresh(), 1).stats().seconds_per_load == 0.0


def test_places_are_as_many_tensors_as_sites_and_parameters(six):
    folder, _ = six
    bank = AdapterBank(fresh(), capacity=3, bottleneck=8)
    bank.load("t0", folder / "t0")
    tensors = bank._storage.tensors
    addresses = {t.data_ptr() for t in tensors}
    sites, norms = 4, 5
    assert len(tensors) == 4 * sites + 2 * norms + 2 and {len(t) for t in tensors} == {3, 4}
    for i in range(1, 6):
        bank.load(f"t{i}", folder / f"t{i}")
    assert {t.data_ptr() for t in bank._storage.tensors} == addresses


def test_a_place_is_kept_while_a_request_uses_it(six):
    folder, outputs = six
    model = fresh()
    bank = AdapterBank(model, 2, 8, timeout=0.1)
    for i in range(6):
        bank.register(f"t{i}", folder / f"t{i}")
    with bank.using(["t0", "t0", "t0", "t0", "t1"]):
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"no place for 't2': .* used all of its 2 places for 0.1 seconds"):
            check(model, bank, outputs, ["t2"] * 5)
        assert time.monotonic() - start >= 0.1
        with pytest.raises(RuntimeError, match="has no place for"):
            bank.load("again", folder / "t3")
        bank.unload("t0")
        assert bank.names() == ["t1", "t2", "t3", "t4", "t5"] and bank.resident() == ["t1"]
        with pytest.raises(RuntimeError, match="has no place for"):  # the request goes on with what was unloaded
            check(model, bank, outputs, ["t2"] * 5)
        check(model, bank, outputs, ["t1"] * 5)
        with torch.no_grad():
            close(model(X).logits, want(outputs, ["t0", "t0", "t0", "t0", "t1"]))
    check(model, bank, outputs, ["t2", "t3", "t2", "t3", "t2"])
    assert bank._pins == [0, 0]


def test_inference_mode_and_gradients_take_turns(six):
    folder, outputs = six
    model = fresh()
    bank = AdapterBank(model, 1, 8)
    for i in range(2):
        bank.register(f"t{i}", folder / f"t{i}")
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        for i in range(2):
            with mode, bank.using([f"t{i}"] * 4 + [None]):
                close(model(X).logits.detach(), want(outputs, [f"t{i}"] * 4 + [None]))
    embeddings = model.bert.embeddings.word_embeddings.weight
    assert embeddings.requires_grad and not any(t.requires_grad for t in bank._storage.tensors)
    with bank.using(["t1"] * 5):  # gradients flow through the adapters to what stands below them
        model(X).logits.sum().backward()
    assert embeddings.grad.abs().sum() > 0


def test_a_request_waits_for_a_place(six):
    folder, outputs = six
    model = fresh()
    bank = AdapterBank(model, 1, 8)
    for i in range(2):
        bank.register(f"t{i}", folder / f"t{i}")
    done = []

    def serve():
        check(model, bank, outputs, ["t1"] * 5)
        done.append(1)

    with bank.using(["t0"] * 5):
        thread = threading.Thread(target=serve)
        thread.start()
        time.sleep(0.2)
        assert not done
    thread.join(10)
    assert done == [1]


def test_a_name_that_is_given_to_another_folder(six):
    folder, outputs = six
    model = fresh()
    bank = AdapterBank(model, 2, 8)
    for i in (0, 1, 0):
        bank.load("it", folder / f"t{i}")
        check(model, bank, {"it": outputs[f"t{i}"]}, ["it"] * 5)
        bank.unload("it")
    with pytest.raises(ValueError, match="no adapter 'it'; it has: none"), bank.using(["it"]):
        raise AssertionError


def test_a_name_that_is_given_to_another_folder_while_it_is_read(six, monkeypatch):
    folder, outputs = six
    model = fresh()
    bank = AdapterBank(model, 2, 8)
    bank.register("it", folder / "t0")
    read = bank._read

    def slowly(name, source):
        found = read(name, source)
        if source.path == folder / "t0":
            bank.unload("it")
            bank.register("it", folder / "t1")
        return found

    monkeypatch.setattr(bank, "_read", slowly)
    check(model, bank, {"it": outputs["t1"]}, ["it"] * 5)
    bank.unload("it")
    bank.register("it", folder / "t0")
    monkeypatch.setattr(bank, "_read", lambda name, source: (read(name, source), bank.unload("it"))[0])
    with pytest.raises(ValueError, match="no adapter 'it' any more: it was unloaded meanwhile"):
        check(model, bank, outputs, ["it"] * 5)
    assert bank._pins == [0, 0]


def test_eight_threads_that_load_unload_and_ask(six):
    folder, outputs = six
    model = fresh()
    bank = AdapterBank(model, 3, 8)
    for i in range(6):
        bank.register(f"t{i}", folder / f"t{i}")
    end, wrong, answers = time.monotonic() + 3, [], []

    def ask(names, expected):
        with torch.no_grad(), bank.using(names):
            found = model(X).logits
        answers.append(1)
        if not torch.allclose(found, want(expected, names), rtol=1e-4, atol=2e-5):
            wrong.append(names)

    def serve(i):
        choices = random.Random(i)
        while time.monotonic() < end:
            two = choices.sample([f"t{i}" for i in range(6)], 2)
            ask([choices.choice([*two, None]) for _ in range(5)], outputs)

    def change(i):
        choices = random.Random(100 + i)
        while time.monotonic() < end:
            task = choices.choice([f"t{i}" for i in range(6)])
            bank.load(f"mine{i}", folder / task)
            ask([f"mine{i}"] * 5, {f"mine{i}": outputs[task]})
            bank.unload(f"mine{i}")

    def run(job, i):
        try:
            job(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(change if i < 2 else serve, i)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = bank.stats()
    assert wrong == [] and len(answers) > 20 and stats.evictions > 5 and stats.hits > 5 and bank._pins == [0, 0, 0]
    assert sum(stats.rows.values()) > 20 and bank.names() == [f"t{i}" for i in range(6)]


def test_tasks_of_the_model_move_into_the_bank(six):
    _, outputs = six
    model = add_tasks(fresh(), [dataclasses.replace(CONFIG, bottleneck=2 + i) for i in range(3)])
    base = [p.data_ptr() for n, p in model.named_parameters() if "adapter_ops" not in n]
    bank = AdapterBank(model, 2, 8)
    for i in range(3):
        bank.add(f"t{i}", delete=i > 0)
    assert list(list_adapters(model)) == ["t0"] and bank.resident() == ["t1", "t2"]
    with torch.no_grad():
        for p in model.adapter_ops.task("t0").parameters():
            p.zero_()  # the bank has the values of before
    for names in (["t0", "t1", None, "t0", "t1"], ["t2", "t0", "t2", None, None], ["t1"] * 5):
        check(model, bank, outputs, names)
    delete_adapter(model, "t0")
    assert list_adapters(model) == {} and bank.stats().evictions >= 3
    check(model, bank, outputs, ["t0", "t1", None, "t0", "t1"])
    assert base == [p.data_ptr() for n, p in model.named_parameters() if "adapter_ops" not in n]
    assert not any("adapter_ops" in n for n, _ in model.named_parameters())
    with pytest.raises(ValueError, match="already has an adapter 't2'"):
        add_tasks(model, [CONFIG] * 3)
        bank.add("t2")


def test_beside_tasks_of_the_model_and_other_contexts(six):
    folder, outputs = six
    model = add_tasks(fresh(), [dataclasses.replace(CONFIG, bottleneck=2 + i) for i in range(2)])
    set_active_adapter(model, "t1")
    bank = AdapterBank(model, 2, 8)
    bank.load("t0", folder / "t5")  # a name that the model's tasks have too
    with torch.no_grad():
        close(model(X).logits, outputs["t1"])
        with bank.using(["t0", None, "t0", None, "t0"]):
            with using_adapters(model, ["t0", "t1", "t0", "t1", None]):
                close(model(X).logits, want(outputs, ["t0", "t1", "t0", "t1", None]))
            close(model(X).logits, want(outputs, ["t5", None, "t5", None, "t5"]))
        close(model(X).logits, outputs["t1"])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset, tmp_path):
    config = dataclasses.replace(PRESETS[preset], reduction_factor=None, bottleneck=6)
    outputs, model = saved(tmp_path, [config] * 3), fresh()
    bank = AdapterBank(model, 3, 8)
    for i in range(3):
        bank.register(f"t{i}", tmp_path / f"t{i}")
    check(model, bank, outputs, ["t2", None, "t0", "t1", "t2"])


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("position", ["before", "after"])
def test_norms_depth_and_learned_scales(norm, position, tmp_path):
    config = dataclasses.replace(CONFIG, norm=norm, norm_position=position, depth=2, scale="learned", dropout=0.1)
    outputs, model = saved(tmp_path, [config] * 2), fresh()
    bank = AdapterBank(model, 3, 8)
    for i in range(2):
        bank.register(f"t{i}", tmp_path / f"t{i}")
    check(model, bank, outputs, ["t1", None, "t0", "t1", "t0"])


@pytest.mark.parametrize("limit", [1 << 24, 0])
def test_heads_of_several_parts_and_norms_that_rows_cannot_have(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed, "GATHERED", limit)
    monkeypatch.setattr(storage, "norm_by_rows", lambda module: limit > 0)

    def base():
        torch.manual_seed(0)
        return hf.RobertaForSequenceClassification(hf.RobertaConfig(**ROBERTA)).eval()

    outputs, model = saved(tmp_path, [CONFIG] * 2, base), base()
    bank = AdapterBank(model, 3, 8)
    for i in range(2):
        bank.register(f"t{i}", tmp_path / f"t{i}")
    check(model, bank, outputs, ["t1", None, "t0", "t1", "t0"])


ROBERTA = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)
ROBERTA |= dict(max_position_embeddings=20, num_labels=3)


def test_a_base_whose_head_has_another_size(tmp_path):
    """Rows of the base are filled up with -inf, as using_adapters does it."""

    def base():
        torch.manual_seed(0)
        return bert(num_hidden_layers=1, num_labels=4)

    tasks = add_tasks(base(), [CONFIG])
    tasks.adapter_ops.task("t0").replace_head("classifier", nn.Linear(32, 6))
    bank = AdapterBank(tasks, 2, 8)
    bank.add("t0")
    with torch.no_grad():
        with using_adapter(tasks, "t0"):
            own = tasks(X).logits
        with bank.using(["t0", None, "t0", "t0", None]):
            found = tasks(X).logits
            with pytest.raises(ValueError, match="base's head has another number of outputs"):
                tasks(X, labels=torch.zeros(5, dtype=torch.int64))
        close(found[[0, 2, 3]], own[[0, 2, 3]])
        close(found[[1, 4], :4], base()(X).logits[[1, 4]])
        assert (found[[1, 4], 4:] == float("-inf")).all()


def test_generate_with_beams(tmp_path):
    def base():
        torch.manual_seed(0)
        return make(hf.LlamaForCausalLM, DECODER)

    tokens, length = torch.randint(3, 50, (3, 5)), dict(do_sample=False, num_beams=3, max_new_tokens=5)
    tasks, model = add_tasks(base(), [CONFIG] * 2), base()
    bank = AdapterBank(model, 2, 8)
    for i in range(2):
        save_adapter(tasks, tmp_path / f"t{i}", f"t{i}")
        bank.register(f"t{i}", tmp_path / f"t{i}")
    names, expected = ["t1", None, "t0"], []
    for i, name in enumerate(names):
        with using_adapter(tasks, name):
            expected.append(tasks.generate(tokens[i : i + 1], **length))
    with bank.using(names):
        found = model.generate(tokens, **length)
    for i, row in enumerate(expected):
        assert torch.equal(found[i, : row.shape[1]], row[0])


def test_one_compilation_for_all_tasks_and_mixes(six):
    from torch._dynamo.testing import CompileCounterWithBackend

    folder, outputs = six
    torch.compiler.reset()
    model, counter = fresh(), CompileCounterWithBackend("eager")
    bank = AdapterBank(model, 3, 8)
    for i in range(6):
        bank.register(f"t{i}", folder / f"t{i}")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names in (["t0", "t1", None, "t2", "t0"], ["t3"] * 5, ["t4", "t5", None, None, "t3"], ["t1"] * 5):
        with torch.no_grad(), bank.using(names):
            close(compiled(X).logits, want(outputs, names))
    assert counter.frame_count == 1


def test_a_model_of_no_known_family(tmp_path):
    x, outputs = torch.randn(4, 3, 8), {}
    tasks = tiny()
    for i in range(2):
        add_adapter(tasks, f"t{i}", dataclasses.replace(CONFIG, placement="parallel"), sites=SITES)
        save_adapter(tasks, tmp_path / f"t{i}", f"t{i}")
    with torch.no_grad():
        for name in ("t0", "t1", None):
            with using_adapter(tasks, name):
                outputs[name] = tasks(x)
        model = tiny()
        bank = AdapterBank(model, 2, 8)
        bank.load("t0", tmp_path / "t0")
        bank.load("t1", tmp_path / "t1")
        with bank.using(["t1", "t0", None, "t1"]):
            close(model(x), want(outputs, ["t1", "t0", None, "t1"]))
