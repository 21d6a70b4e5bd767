"""A small BERT with tasks in it, for tests of what tasks do."""

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from adapter_ops import AdapterConfig


def bert(kind=BertForSequenceClassification, **changes):
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    return kind(BertConfig(**(sizes | dict(num_labels=5, max_position_embeddings=20) | changes))).eval()


TOKENS = torch.arange(14).view(2, 7)
STRONG = AdapterConfig(bottleneck=4, init_std=0.3)


class Top(nn.Module):
    """A base and one head under any name."""

    def __init__(self, name="head", encoder=None, head=None):
        super().__init__()
        self.encoder = encoder or bert(BertModel)
        self.name = name
        self.add_module(name, head or nn.Linear(32, 5))

    def forward(self, x):
        return self._modules[self.name](self.encoder(x)[1])


@torch.no_grad()
def logits(model):
    """The output for TOKENS, or the first of its outputs."""
    output = model(TOKENS)
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.no_grad()
def shake(model):
    """Changes what trains, since a new adapter hardly changes anything."""
    for p in model.parameters():
        if p.requires_grad:
            p += 0.3 * torch.randn_like(p)


def copy_of(model, name, path):
    """A task's own copy of the module at that path."""
    return model.adapter_ops.task(name).copy_at[path]


def step(model, lr=0.1):
    """One step of gradient descent on what trains."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model(TOKENS)[0].square().sum().backward()
    with torch.no_grad():
        for p in parameters:
            p -= lr * p.grad / (p.grad.norm() + 1e-6)
            p.grad = None


def checkpoint_layers(model, reentrant):
    """Training with each layer's forward run again in backward, and without dropout, so that it can be compared."""
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
