"""A folder in the format of AdapterHub's package `adapters`, written and then loaded on transformers 5.

The package itself, in version 1.3.0, needs transformers 4. The base is a small BERT with random weights.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from transformers import BertConfig, BertModel

from adapter_ops import add_adapter, list_adapters
from adapter_ops.integrations.adapterhub import load_adapterhub, save_adapterhub


def base() -> BertModel:
    """The same base every time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    return BertModel(BertConfig(vocab_size=100, **sizes)).eval()


ids = torch.randint(0, 100, (4, 12))
model = base()
with torch.no_grad():
    bare = model(ids).last_hidden_state
add_adapter(model, "sentiment", "pfeiffer", modules=())  # A folder of AdapterHub's has no head and no LayerNorms.
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(10):  # a stand-in for real training: the outputs are moved away from those of the base
    torch.nn.functional.mse_loss(model(ids).last_hidden_state, bare.flip(-1)).backward()
    optimizer.step()
    optimizer.zero_grad()

with TemporaryDirectory() as folder:
    path = Path(folder) / "sentiment"
    save_adapterhub(model, path, "sentiment")
    fields = json.loads((path / "adapter_config.json").read_text())
    keys = list(torch.load(path / "pytorch_adapter.bin", weights_only=True))
    fresh = base()
    name = load_adapterhub(fresh, path)
print(f"The folder has an adapter of {fields['version']} for {fields['model_type']}, with {len(keys)} tensors.")
print(f"The first tensor is {keys[0]}.")

with torch.no_grad():
    expected, found = model(ids).last_hidden_state, fresh(ids).last_hidden_state
moved = float((found - bare).abs().max())
size = list_adapters(fresh)[name].config.size(layer=0, hidden_size=128)
print(f"transformers {transformers.__version__} loaded it as {name!r}, with a bottleneck of {size}.")
print(f"The adapter changes an output of the base by up to {moved:.2f}.")
if not torch.equal(found, expected) or moved < 0.1:
    sys.exit("The loaded adapter does not give the outputs that it was saved with.")
print("The outputs are equal, bit for bit, to those that the adapter was saved with.")
