"""Batches of several tasks inside generate(), under torch.compile, in threads, in backward, and what is refused."""

import asyncio
import copy
import inspect
import pickle
import threading

import pytest
import torch
import transformers as hf
from helpers_context import nothing_left
from helpers_families import DECODER, OPT, T5, forward
from helpers_mixed import add_tasks, alone, close, model_of
from helpers_tasks import STRONG, bert
from torch import nn

from adapter_ops import (
    AdapterConfig,
    active_adapter,
    add_adapter,
    delete_adapter,
    list_adapters,
    using_adapter,
    using_adapters,
)

pytestmark = pytest.mark.usefixtures("aten")
GENERATORS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
}
LENGTH = dict(do_sample=False, max_new_tokens=6, min_new_tokens=6)


def generator(name, preset="houlsby"):
    torch.manual_seed(0)
    return add_tasks(GENERATORS[name]().eval(), [preset] * 3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("preset", ["houlsby", "parallel"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generate(name, preset, options):
    model = generator(name, preset)
    tokens, names = torch.randint(3, 50, (4, 5)), ["t2", "t0", None, "t1"]
    expected = []
    for i, task in enumerate(names):
        with using_adapter(model, task):
            expected.append(model.generate(tokens[i : i + 1], **LENGTH, **options))
    with using_adapters(model, names):
        found = model.generate(tokens, **LENGTH, **options)
        from_config = model.generate(tokens, hf.GenerationConfig(**LENGTH, **options, decoder_start_token_id=0))
    assert torch.equal(found, torch.cat(expected)) and torch.equal(from_config, found)
    assert len({tuple(row[-6:].tolist()) for row in found}) >= 3 and nothing_left(model)


def test_generate_with_sequences_that_are_sampled():
    """Each example's rows are neighbours, so the logits of the first step tell which task they had."""
    model = generator("llama")
    tokens, names = torch.randint(3, 50, (2, 5)), ["t1", "t0"]
    with using_adapters(model, names):
        found = model.generate(
            tokens,
            do_sample=True,
            num_return_sequences=3,
            max_new_tokens=2,
            output_scores=True,
            return_dict_in_generate=True,
            top_k=0,
        )
    first = found.scores[0]
    for i, name in enumerate(names):
        with torch.no_grad(), using_adapter(model, name):
            close(first[3 * i : 3 * i + 3], model(tokens[i : i + 1]).logits[:, -1].expand(3, -1))


def test_copies_of_a_model_generate_and_a_model_without_tasks_has_its_own_generate():
    model = generator("llama")
    tokens, names = torch.randint(3, 50, (2, 5)), ["t2", "t0"]
    signature = inspect.signature(type(model).generate.__get__(model))
    with using_adapters(model, names):
        expected = model.generate(tokens, **LENGTH, num_beams=2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with using_adapters(other, names):
            assert torch.equal(other.generate(tokens, **LENGTH, num_beams=2), expected)
        assert inspect.signature(other.generate) == signature
        for name in list_adapters(other):
            delete_adapter(other, name)
        assert not {"generate", "forward"} & vars(other).keys()
        assert not torch.equal(other.generate(tokens, **LENGTH, num_beams=2), expected)


class Chat(nn.Module):
    """A module around a model that generates, which has the tasks."""

    def __init__(self):
        super().__init__()
        self.llm = GENERATORS["llama"]().eval()

    def forward(self, tokens):
        return self.llm.generate(tokens, **LENGTH, num_beams=2)


def test_generate_inside_another_module():
    torch.manual_seed(0)
    model = add_tasks(Chat(), ["houlsby"] * 2)
    tokens = torch.randint(3, 50, (2, 5))
    with using_adapter(model, "t1"):
        expected = model(tokens[:1])
    with using_adapters(model, ["t1", "t0"]):
        assert torch.equal(model(tokens)[:1], expected)


def test_what_is_refused_before_anything_runs():
    model, inputs = model_of("bert", ["houlsby", "pfeiffer"])
    ran = []
    model.bert.embeddings.register_forward_pre_hook(lambda *_: ran.append(1))
    for names, error, text in (
        (["t0", "t7", "t8", None], ValueError, r"the model has no adapters 't7', 't8'; it has: t0, t1"),
        (["t0", "t7"], ValueError, r"the model has no adapter 't7'; it has: t0, t1"),
        ("t0", TypeError, "expected a sequence with the name of a task, or None, for each example"),
        (iter(["t0"]), TypeError, "expected a sequence with the name"),
        (["t0", 1], TypeError, "hold 1, expected names of tasks"),
        ([], ValueError, "expected the task of at least one example"),
        (torch.tensor([0, 2, -2]), ValueError, r"numbers \[-2, 2\], expected -1, for the bare base, to 1"),
        (torch.tensor([0.0]), TypeError, r"dtype torch.float32 and shape \(1,\), expected integers \[examples\]"),
        (torch.tensor([True]), TypeError, "dtype torch.bool"),
        (torch.tensor([[0]]), TypeError, r"shape \(1, 1\)"),
    ):
        with pytest.raises(error, match=text), using_adapters(model, names):
            raise AssertionError
    wrong = r"has a batch of 3, and tasks were given for 2 examples"
    with using_adapters(model, ["t0", None]):
        with pytest.raises(ValueError, match=f"input_ids {wrong}"):
            model(**inputs)
        with pytest.raises(ValueError, match=f"the first argument {wrong}"):
            model(inputs["input_ids"])
        with pytest.raises(ValueError, match=f"inputs_embeds {wrong}"):
            model(inputs_embeds=torch.randn(3, 7, 32))
    with pytest.raises(ValueError, match="has no adapters; it has: none"), using_adapters(bert(), [None]):
        raise AssertionError
    assert not ran and nothing_left(model)


def test_wrong_counts_inside_generate():
    model = generator("llama")
    tokens = torch.randint(3, 50, (4, 5))

    def twice(input_ids, scores):
        """As classifier-free guidance does that runs both conditions in one batch."""
        return model(torch.cat([input_ids, input_ids])).logits[: len(scores), -1]

    with using_adapters(model, ["t0", "t1"]):
        with pytest.raises(ValueError, match="has a batch of 4, and tasks were given for 2 examples"):
            model.generate(tokens, **LENGTH)
        with pytest.raises(ValueError, match=r"batch of 12, .* 2 examples, of which generate\(\) makes 6 rows"):
            model.generate(tokens[:2], **LENGTH, num_beams=3, logits_processor=[twice])

    def half(input_ids, scores):
        """As a model does that goes on with some of the examples, whose rows are as many as there were examples."""
        return model(input_ids[:4]).logits[:, -1].repeat(2, 1)

    with using_adapters(model, ["t0", "t1", None, "t2"]), pytest.raises(ValueError, match=r"batch of 4, .* 4 examples"):
        model.generate(tokens, **LENGTH, num_beams=2, logits_processor=[half])
    assert nothing_left(model)


def test_a_batch_that_is_not_the_first_dimension():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=False)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for name in ("a", "b"):
        add_adapter(model, name, sites={"ffn": "layers.*.linear2"})
    text = r"shape \(5, 3, 8\) reached .*, and 3 tasks .* must be the batch, of size 3"
    with using_adapters(model, ["a", "b", "a"]), pytest.raises(ValueError, match=text):
        model.adapter_ops.slots["layers.0.ffn"].on_output(model.layers[0].linear2, (), torch.randn(5, 3, 8))


def test_relative_positions_that_rows_share():
    model, _ = model_of("deberta-v2", ["houlsby", "pfeiffer"])
    text = "'deberta.encoder.LayerNorm' is of the relative positions, which all rows of a batch share"
    with pytest.raises(ValueError, match=text), using_adapters(model, ["t0", "t1"]):
        raise AssertionError


def test_batch_norm_that_trains():
    model, inputs = model_of("bert", [AdapterConfig(bottleneck=4, norm="batch"), "pfeiffer"])
    model.train()
    text = "norm='batch' takes its statistics from all rows"
    with pytest.raises(ValueError, match=f"task 't0': {text}"), using_adapters(model, ["t0", "t1", None]):
        raise AssertionError
    model.eval()
    with using_adapters(model, ["t0", "t1", None]):
        model.train()
        with pytest.raises(RuntimeError, match=text):
            forward(model, inputs)


def test_parameters_without_values():
    for name, module, text in (
        ("t0", lambda m: m.adapter_ops.task("t0").layer_at["bert.encoder.layer.0.ffn"], "of the task 't0' is on the"),
        ("t0", lambda m: m.bert.embeddings.LayerNorm, "module 'bert.embeddings.LayerNorm' is on the"),
    ):
        model, _ = model_of("bert", ["houlsby", "pfeiffer"])
        module(model).to("meta")
        with pytest.raises(ValueError, match=f"{text} meta device"), using_adapters(model, [name, "t1", None]):
            raise AssertionError


def test_eight_threads_with_different_mixes():
    model, inputs = model_of("bert", ["houlsby", "pfeiffer", "parallel", "adapter_plus"])
    names = ["t0", "t1", "t2", "t3", None]
    mixes = [names[i:] + names[:i] for i in range(5)] + [
        ["t0"] * 5,
        [None] * 4 + ["t1"],
        ["t3", "t3", "t2", "t2", "t0"],
    ]
    expected, wrong = [alone(model, mix, inputs) for mix in mixes], []

    def serve(i):
        for turn in range(8):
            with torch.no_grad(), using_adapters(model, mixes[(i + turn) % 8]):
                found = forward(model, inputs)[0]
            if not torch.allclose(found, expected[(i + turn) % 8], rtol=1e-4, atol=2e-5):
                wrong.append((i, turn))

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and nothing_left(model) and active_adapter(model) is None


def test_async_tasks_with_different_mixes():
    model, inputs = model_of("bert", ["houlsby", "pfeiffer"])
    mixes = [["t0", "t1", None], ["t1", None, "t0"], [None, "t0", "t1"]]
    expected = [alone(model, mix, inputs) for mix in mixes]

    async def request(i):
        with using_adapters(model, mixes[i]):
            for _ in range(3):
                await asyncio.sleep(0)
                close(forward(model, inputs)[0], expected[i])

    async def serve():
        await asyncio.gather(*(request(i % 3) for i in range(9)))

    with torch.no_grad():
        asyncio.run(serve())
    assert nothing_left(model)


MIXES = [["t0", "t1", "t2", "t3"], ["t3", "t3", "t3", "t3"], ["t2", None, "t0", "t2"], [None, None, "t1", None]]


@pytest.mark.parametrize("name, preset", [("bert", STRONG), ("llama", "adapter_plus")])
def test_a_compiled_model_serves_every_mix_with_one_compilation(name, preset):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model, inputs = model_of(name, [preset] * 5)
    inputs = {key: t[:4] for key, t in inputs.items()}
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for mix in MIXES:
        with torch.no_grad(), using_adapters(model, mix):
            close(forward(compiled, inputs)[0], alone(model, mix, inputs))
    assert counter.frame_count == 1
    unsupported, text = torch._dynamo.exc.Unsupported, "tasks were given for 3 examples"
    with torch.no_grad(), using_adapters(model, MIXES[0][:3]), pytest.raises(unsupported, match=text):
        compiled(**inputs)


@pytest.mark.parametrize("family, limit", [("deberta", 1 << 24), ("vit", 0)])
def test_heads_of_a_compiled_model(family, limit, monkeypatch):
    from adapter_ops.models import batches, mixed

    torch.compiler.reset()
    monkeypatch.setattr(mixed, "GATHERED", limit)
    monkeypatch.setattr(batches, "GATHERED", limit)
    model, inputs = model_of(family, [STRONG] * 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mix = ["t0", "t1", None, "t2"]
    with torch.no_grad(), using_adapters(model, mix):
        close(forward(compiled, inputs)[0], alone(model, mix, inputs))


def test_threads_of_a_compiled_model():
    torch.compiler.reset()
    model, inputs = model_of("bert", [STRONG] * 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mixes = [["t0", "t1", None, "t2"], ["t2", "t0", "t0", None], ["t1"] * 4]
    expected, wrong = [alone(model, mix, inputs) for mix in mixes], []

    def serve(i):
        for turn in range(5):
            with torch.no_grad(), using_adapters(model, mixes[(i + turn) % 3]):
                if not torch.allclose(forward(compiled, inputs)[0], expected[(i + turn) % 3], rtol=1e-4, atol=2e-5):
                    wrong.append((i, turn))

    serve(0)
    threads = [threading.Thread(target=serve, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
