"""What a user does first, on six kinds of models: add a task, train three steps, save, load into a fresh model."""

from dataclasses import dataclass, field
from typing import Any

import helpers_vision
import pytest
import torch
import transformers as hf
from helpers_models import IDS, TEXT
from torch import Tensor, nn

from adapter_ops import SitePattern, add_adapter, list_adapters, load_adapter, save_adapter, set_active_adapter

pytestmark = pytest.mark.usefixtures("aten")
FOLDER = {}  # of a saved model, which a fixture makes
VIT = {
    "attention": SitePattern("blocks.*.attn", entry="blocks.*.norm1"),
    "ffn": SitePattern("blocks.*.mlp", entry="blocks.*.norm2"),
}
DECODER = TEXT | dict(num_key_value_heads=1)
T5 = dict(d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, vocab_size=40)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


@dataclass
class Kind:
    """A model, what it is called with, and what else `add_adapter` needs to know."""

    make: Any
    inputs: dict[str, Tensor]
    heads: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER))


def t5():
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0))


def vit():
    return helpers_vision.timm().create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=24, num_heads=2, depth=2, num_classes=3
    )


def sentence_transformer():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    parts = [
        modules.Transformer(str(FOLDER["model"])),
        modules.Pooling(16, pooling_mode="mean"),
        modules.Dense(16, 5, activation_function=nn.Identity()),
    ]
    return sentence_transformers.SentenceTransformer(modules=parts, device="cpu")


class Wrapper(nn.Module):
    """A module of the user's, with a base model of a known family and a head of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = hf.BertModel(hf.BertConfig(**TEXT))
        self.score = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 3))

    def forward(self, input_ids):
        return self.score(self.encoder(input_ids).last_hidden_state[:, 0])


class Showing(Wrapper):
    def __init__(self):
        super().__init__()
        self.config = self.encoder.config


class PretrainedWrapper(hf.PreTrainedModel):
    config_class = hf.BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.encoder, self.score = hf.BertModel(config), nn.Linear(16, 3)

    forward = Wrapper.forward


KINDS = {
    "BERT": Kind(bert, {"input_ids": IDS}, ("classifier",)),
    "Llama": Kind(llama, {"input_ids": IDS}, ("lm_head",)),
    "T5": Kind(t5, {"input_ids": IDS, "decoder_input_ids": IDS + 5}, ()),  # the head is tied to the embeddings
    "ViT of timm": Kind(vit, {"x": PIXELS}, ("head",), {"sites": VIT}),
    "SentenceTransformer": Kind(sentence_transformer, {"input_ids": IDS, "attention_mask": IDS * 0 + 1}, ("2",)),
    "wrapper": Kind(Wrapper, {"input_ids": IDS}, ("score",)),
    "wrapper with its model's config": Kind(Showing, {"input_ids": IDS}, ("score",)),
    "wrapper of transformers' class": Kind(
        lambda: PretrainedWrapper(hf.BertConfig(**TEXT)), {"input_ids": IDS}, ("score",)
    ),
}


@pytest.fixture(scope="module", autouse=True)
def folder_of_a_model(tmp_path_factory):
    """A saved BERT with a tokenizer, from which a SentenceTransformer is made."""
    folder = FOLDER["model"] = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**TEXT)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    hf.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def make(kind: Kind) -> nn.Module:
    torch.manual_seed(0)
    return kind.make().eval()


def call(model: nn.Module, kind: Kind) -> Tensor:
    if type(model).__name__ == "SentenceTransformer":
        return model(dict(kind.inputs))["sentence_embedding"]
    output = model(**kind.inputs)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.filterwarnings("ignore:2 parameters outside the base:UserWarning")  # of the ViT
@pytest.mark.parametrize("preset", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("name", KINDS)
def test_add_train_save_load(name, preset, tmp_path):
    kind = KINDS[name]
    model = make(kind)
    with torch.no_grad():
        before = call(model, kind).clone()
    base = {key: t.clone() for key, t in model.state_dict().items()}
    add_adapter(model, "mine", preset, **kind.options)
    assert list_adapters(model)["mine"].modules == kind.heads

    model.train()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=0.02)
    losses = []
    for _ in range(3):
        loss = (call(model, kind) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        after = call(model, kind).clone()
        save_adapter(model, tmp_path, "mine")
        fresh = make(kind)
        load_adapter(fresh, tmp_path)
        assert torch.equal(call(fresh, kind), after) and not torch.allclose(after, before, atol=1e-3)
        for other in (model, fresh):
            set_active_adapter(other, None)
            assert torch.equal(call(other, kind), before)
    state = model.state_dict()
    assert all(torch.equal(state[key], t) for key, t in base.items())
