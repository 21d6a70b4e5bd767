"""A small model for the tests of studies."""

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from bench.paper.finetune import find_model

TEXTS = [(f"{word} {'very ' * (i % 5)}{i}", word) for i in range(50) for word in ("cat", "dog", "cow")]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a BERT of two thin layers, and one of texts for it."""
    folder = tmp_path_factory.mktemp("tiny")
    AutoTokenizer.from_pretrained(find_model(None)).save_pretrained(folder)
    torch.manual_seed(0)
    thin = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(**thin)).save_pretrained(folder)
    (folder / "animals.csv").write_text("text,label\n" + "".join(f"{t},{w}\n" for t, w in TEXTS))
    return folder
