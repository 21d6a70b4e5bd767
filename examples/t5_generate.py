"""T5 with adapters: trained with teacher forcing, then called with generate(), greedily and with beams.

The model is a small one with random weights. Its adapters learn to give the first four tokens of a text backwards.
"""

import sys

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from adapter_ops import AdapterConfig, add_adapter, using_adapter

torch.manual_seed(0)
config = T5Config(
    vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
)
model = T5ForConditionalGeneration(config).eval()
texts = torch.randint(2, 64, (4, 8))  # [B, T]; 0 is the padding and 1 the end of a text
end = torch.full((4, 1), 1)
targets = torch.cat((texts[:, :4].flip(1), end), dim=1)  # [B, 5]


def generate(**options: bool | int) -> Tensor:
    """What the model writes behind the start token, for each text, [B, at most 8]."""
    return model.generate(texts, max_new_tokens=8, do_sample=False, **options)[:, 1:]


before = generate()
add_adapter(model, "backwards", AdapterConfig(bottleneck=16))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(100):
    loss = model(input_ids=texts, labels=targets).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"The loss after 100 steps is {loss.item():.3f}.")
print(f"The first text is {texts[0].tolist()}, and the model writes {generate()[0].tolist()}.")

ways = {"greedy": {}, "greedy without a cache": {"use_cache": False}, "three beams": {"num_beams": 3}}
for way, options in ways.items():
    if not torch.equal(generate(**options), targets):
        sys.exit(f"With the adapter, generate() ({way}) does not give the first four tokens of each text backwards.")
with using_adapter(model, None):
    if not torch.equal(generate(), before):
        sys.exit("Without the adapter, generate() gives other tokens than before the training.")
print(f"generate() gives the four tokens backwards: {', '.join(ways)}.")
print("Without the adapter it gives the same tokens as before the training.")
