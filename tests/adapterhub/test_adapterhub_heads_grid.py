"""Heads of AdapterHub's and of this library's, held against the package: both kinds, both ways."""

import json

import pytest
import torch
from hub_helpers import SIZES, needs_hub, randomise

from adapter_ops.integrations.adapterhub import load_adapterhub, save_adapterhub
from adapter_ops.integrations.adapterhub.heads import CHAINS
from adapter_ops.models.tasks import add_adapter, list_adapters

transformers = pytest.importorskip("transformers")
pytestmark = needs_hub

IDS = torch.arange(5, 35).view(3, 2, 5)  # three questions of two choices
ADDERS = {
    "classification": "add_classification_head",
    "multilabel_classification": "add_classification_head",
    "tagging": "add_tagging_head",
    "question_answering": "add_qa_head",
    "multiple_choice": "add_multiple_choice_head",
}
STATIC = [*CHAINS, "GPT2ForSequenceClassification", "LlamaForSequenceClassification", "BartForSequenceClassification"]
STATIC += ["GPT2ForTokenClassification", "BartForQuestionAnswering", "BertForMaskedLM", "T5ForConditionalGeneration"]


def make(kind, labels=2):
    """A model of a class of transformers or of AdapterHub, with the same base for all classes of a family."""
    import adapters

    cls = getattr(transformers, kind, None) or getattr(adapters, kind)
    sizes = {**SIZES, "num_labels": labels, "pad_token_id": 0, "eos_token_id": 1}
    if cls.config_class.model_type == "electra":
        sizes["embedding_size"] = 32
    if cls.config_class.model_type == "bart":
        sizes = dict(d_model=32, vocab_size=60, pad_token_id=0, eos_token_id=1, num_labels=labels)
        for tower in ("encoder", "decoder"):
            sizes |= {f"{tower}_layers": 2, f"{tower}_attention_heads": 2, f"{tower}_ffn_dim": 48}
    if cls.config_class.model_type == "t5":
        sizes = dict(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=60)
    if cls.config_class.model_type == "llama":
        sizes["num_key_value_heads"] = 2
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes)).eval()
    torch.manual_seed(7)
    prefix = f"{model.base_model_prefix}."
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0].removeprefix(prefix)):
        if parameter.dim() > 1 and (name.startswith(prefix) or model.config.model_type == "t5"):
            short = name.removeprefix(prefix)
            torch.manual_seed(sum(short.encode()))
            parameter.data = torch.randn(parameter.shape) * 0.2
    return model


@torch.no_grad()
def outputs(model, kind):
    ids = IDS if "MultipleChoice" in kind else IDS.flatten(0, 1)
    if "Bart" in kind:
        ids = torch.cat((ids, torch.ones(len(ids), 1, dtype=torch.long)), 1)  # the head reads the last token
    more = {"decoder_input_ids": ids[:, :4]} if "T5" in kind else {}
    found = model.eval()(input_ids=ids, **more)
    return torch.stack((found.start_logits, found.end_logits)) if "start_logits" in found else found.logits


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert expected.std() > 1e-2  # or it would say nothing


def hub_of(kind, labels):
    """A model of AdapterHub's with a random adapter and head."""
    import adapters

    model = make(kind, labels)
    adapters.init(model)
    model.add_adapter("a", config="seq_bn")
    model.set_active_adapters("a")
    torch.manual_seed(3)
    randomise(model, ".adapters.")
    for name, parameter in model.named_parameters():
        if not name.startswith(model.base_model_prefix) and ("classif" in name or "qa_" in name or "score" in name):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize("kind", STATIC)
def test_static_heads(kind, safe, tmp_path):
    """AdapterHub's head of a transformers class → ours → AdapterHub's again."""
    import adapters

    if kind == "BertForMaskedLM" and safe:
        pytest.skip("AdapterHub cannot write tensors that share memory to safetensors")
    counted = "Choice" not in kind and "Answer" not in kind and "LM" not in kind and "Generation" not in kind
    labels = 3 if counted else 2
    theirs = hub_of(kind, labels)
    theirs.save_adapter(str(tmp_path / "hub"), "a", use_safetensors=safe)
    assert (tmp_path / "hub" / "head_config.json").exists()
    ours = make(kind)
    assert load_adapterhub(ours, tmp_path / "hub") == "a"
    assert_close(outputs(ours, kind), outputs(theirs, kind))
    info = list_adapters(ours)["a"]
    if counted:
        assert info.labels == (3, {n: f"LABEL_{n}" for n in range(3)}, None)
    own = [p for n, p in ours.named_parameters() if p.requires_grad]
    assert own and all("adapter_ops" in n for n, p in ours.named_parameters() if p.requires_grad)
    save_adapterhub(ours, tmp_path / "again", "a")
    again = make(kind, labels)
    adapters.init(again)
    again.load_adapter(str(tmp_path / "again"))
    again.set_active_adapters("a")
    assert_close(outputs(again, kind), outputs(theirs, kind))


FLEXIBLE = [(kind, chain, head) for kind, chains in CHAINS.items() for chain in chains for head in chain.types]


@pytest.mark.parametrize(("kind", "chain", "head"), FLEXIBLE, ids=lambda value: str(value).partition("(")[0])
def test_flexible_heads(kind, chain, head, tmp_path):
    """AdapterHub's flexible head → ours → a flexible head again, and a static one."""
    import adapters

    flexible = kind.partition("For")[0] + "AdapterModel"
    theirs = hub_of(flexible, 2)
    count = 2 if head in ("question_answering", "multiple_choice") else 4
    options = {"num_choices": 2} if head == "multiple_choice" else {"num_labels": count}
    if head == "multilabel_classification":
        options["multilabel"] = True
    if head not in ("tagging", "question_answering"):
        options["use_pooler"] = chain.use_pooler
    activation = "gelu" if chain.activation == "pooler_hidden_act" else chain.activation
    if head != "question_answering":
        options["id2label"] = {n: f"name {n}" for n in range(count)}
    getattr(theirs, ADDERS[head])(
        "a", layers=len(chain.linears), activation_function=activation, overwrite_ok=True, **options
    )
    torch.manual_seed(4)
    randomise(theirs, "heads.")
    theirs.add_classification_head("ab", num_labels=3)  # whose keys come along, since its name begins with "a"
    theirs.active_head = "a"
    theirs.save_adapter(str(tmp_path / "hub"), "a")
    ours = make(kind)
    load_adapterhub(ours, tmp_path / "hub")
    expected = outputs(theirs, kind)
    assert_close(outputs(ours, kind).view(expected.shape), expected)
    labels = list_adapters(ours)["a"].labels
    if head in ("classification", "multilabel_classification", "tagging"):
        problem = "multi_label_classification" if head.startswith("multi") else None
        assert labels == (4, options["id2label"], problem)
    own_pooler = "pooler.dense" in str(chain.linears) and "DebertaV2" not in kind
    if own_pooler and head == "multiple_choice":
        with pytest.warns(UserWarning, match="no room for .*pooler.dense"):
            save_adapterhub(ours, tmp_path / "again", "a")
        return
    save_adapterhub(ours, tmp_path / "again", "a")
    assert (json.loads((tmp_path / "again" / "head_config.json").read_text())["config"] is None) != own_pooler
    again = make(flexible)
    again.load_adapter(str(tmp_path / "again"), set_active=True)
    assert_close(outputs(again, kind), expected)
    if head.endswith("classification"):
        assert again.get_labels_dict("a") == options["id2label"]
    if not own_pooler:
        static = make(kind, count)
        adapters.init(static)
        static.load_adapter(str(tmp_path / "again"), set_active=True)
        assert_close(outputs(static, kind).view(expected.shape), expected)


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_heads_trained_here(kind, tmp_path):
    """With names for the classes, and a name with a point, which AdapterHub does not take."""
    import adapters

    ours = make(kind, 3)
    ours.config.id2label, ours.config.label2id = {0: "x", 1: "y", 2: "z"}, {"x": 0, "y": 1, "z": 2}
    add_adapter(ours, "my.task", "pfeiffer")
    randomise(ours, "adapter_ops")
    save_adapterhub(ours, tmp_path / "a", "my.task")
    theirs = make(kind, 3)
    adapters.init(theirs)
    assert theirs.load_adapter(str(tmp_path / "a"), set_active=True) == "my_task"
    assert_close(outputs(theirs, kind), outputs(ours, kind))
    assert theirs.config.id2label == {0: "x", 1: "y", 2: "z"}


@pytest.mark.parametrize("options", [{"activation_function": "relu"}, {"layers": 3}, {"layers": 1}])
@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_flexible_heads_that_compute_something_else(kind, options, tmp_path):
    theirs = hub_of(kind.partition("For")[0] + "AdapterModel", 2)
    theirs.add_classification_head("a", num_labels=2, overwrite_ok=True, **options)
    theirs.save_adapter(str(tmp_path / "hub"), "a")
    ours = make(kind)
    with pytest.raises(ValueError, match=r"the head in .*hub is head_type='classification', layers=.*with_head=False"):
        load_adapterhub(ours, tmp_path / "hub")
    assert not list_adapters(ours) and not hasattr(ours, "adapter_ops")
    load_adapterhub(ours, tmp_path / "hub", with_head=False)
    assert list_adapters(ours)["a"].modules == ()
