"""A vision transformer of timm, which is no known family: patterns of module names say where the adapters go.

The model is a small one with random weights, and learns to tell which colour an image has most of.
"""

import sys
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from adapter_ops import AdapterConfig, adapter_summary, add_adapter, load_adapter, save_adapter, using_adapter

try:
    import timm
except ModuleNotFoundError as error:
    sys.exit(f"This example needs the package {error.name}, which is not installed.")

SITES = {"attention": "blocks.*.attn", "ffn": "blocks.*.mlp"}


def base() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=3).eval()


def images() -> tuple[Tensor, Tensor]:
    """Random images [30, 3, 32, 32], each with one channel that is brighter, and the numbers of those channels [30]."""
    pixels, colours = torch.randn(30, 3, 32, 32), torch.arange(30) % 3
    pixels[torch.arange(30), colours] += 1
    return pixels, colours


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(test)


model = base()
test, wanted = images()
before = outputs(model)
add_adapter(model, "colours", AdapterConfig(bottleneck=16), sites=SITES, modules=["head"])
print(adapter_summary(model))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
for _ in range(15):
    pixels, colours = images()
    nn.functional.cross_entropy(model(pixels), colours).backward()
    optimizer.step()
    optimizer.zero_grad()
after = outputs(model)
accuracy = (after.argmax(-1) == wanted).float().mean()
print(f"The colour of {accuracy:.0%} of {len(test)} images that were not trained on is told.")
with TemporaryDirectory() as folder:
    save_adapter(model, folder, "colours")
    load_adapter(fresh := base(), folder)  # The sites are in the folder.
with using_adapter(model, None):
    if accuracy < 0.7 or not (torch.equal(outputs(model), before) and torch.equal(outputs(fresh), after)):
        sys.exit("The task was not learned, or the loaded task or the base gives other outputs than before.")
print("The loaded task and the base without the task give the same outputs as before.")
