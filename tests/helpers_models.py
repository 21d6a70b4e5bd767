"""Small models to put adapters into, and what tests do with them."""

import torch
import transformers as hf
from torch import nn

from adapter_ops import AdapterConfig
from adapter_ops.models.families import SitePattern

TEXT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40)
IDS = torch.arange(3, 17).view(2, 7)
CONFIG = AdapterConfig(bottleneck=4)


def bert(cls="BertForSequenceClassification", seed=0, **fields):
    """A BERT that has the same weights every time, in eval mode."""
    torch.manual_seed(seed)
    return getattr(hf, cls)(hf.BertConfig(**TEXT | fields)).eval()


@torch.no_grad()
def strengthen(model, seed=1):
    """Changes what trains, since a new adapter hardly changes anything."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) / 4)


@torch.no_grad()
def run(model, *inputs):
    """The first tensor of the output, for IDS unless other inputs are given."""
    output = model(*inputs or (IDS,))
    return output if isinstance(output, torch.Tensor) else output[0]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = x + self.mix(self.norm1(x).cumsum(1))
        return x + self.down(self.up(self.norm2(x)).relu())


class Tiny(nn.Module):
    """A pre-norm model of no known family."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


SITES = {
    "attention": SitePattern("layers.*.mix", "layers.*.norm1"),
    "ffn": SitePattern("layers.*.down", "layers.*.norm2"),
}


def tiny(seed=0):
    torch.manual_seed(seed)
    return Tiny().eval()
