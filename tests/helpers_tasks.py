"""A small BERT with tasks in it, for tests of what tasks do."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from adapter_ops import AdapterConfig


def bert(kind=BertForSequenceClassification, **changes):
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    return kind(BertConfig(**(sizes | dict(num_labels=5, max_position_embeddings=20) | changes))).eval()


TOKENS = torch.arange(14).view(2, 7)
STRONG = AdapterConfig(bottleneck=4, init_std=0.3)


def logits(model):
    with torch.no_grad():
        return model(TOKENS)[0]


def step(model, lr=0.1):
    """One step of gradient descent on what trains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(TOKENS)[0].square().sum().backward()
    with torch.no_grad():
        for p in parameters:
            p -= lr * p.grad / (p.grad.norm() + 1e-6)
            p.grad = None
