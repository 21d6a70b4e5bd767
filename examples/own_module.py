"""A bottleneck with a residual in a PyTorch model of your own, replaced by the fused adapter with the same parameters.

Outputs and gradients of both models are compared with those of the original in fp64.
"""

import copy
import sys

import torch
from torch import Tensor, nn

from adapter_ops import BottleneckAdapter


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))), as it is often written by hand."""

    def __init__(self, hidden_size: int, bottleneck_size: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden_size, bottleneck_size), nn.Linear(bottleneck_size, hidden_size)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.activation(self.down(x)))


def outputs_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters()}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each tensor."""
    return {name: float((found[name] - t).norm() / t.norm()) for name, t in exact.items()}


torch.manual_seed(0)
layers = [nn.Linear(256, 768), Bottleneck(768, 64), nn.LayerNorm(768), Bottleneck(768, 64), nn.Linear(768, 10)]
original = nn.Sequential(*layers)
fused = copy.deepcopy(original)
for name, module in list(fused.named_modules()):
    if isinstance(module, Bottleneck):
        adapter = BottleneckAdapter.from_linear(module.down, module.up, activation=module.activation)
        fused.set_submodule(name, adapter)
fused.load_state_dict(original.state_dict())  # the names of the parameters are the same as before

x = torch.randn(8, 128, 256)
exact = outputs_and_gradients(copy.deepcopy(original).double(), x.double())
before, after = (errors(outputs_and_gradients(model, x), exact) for model in (original, fused))
print(f"The adapter takes the backend {fused[1].explain(fused[0](x)).name!r}.")
print(f"The outputs' error against fp64 is {after['y']:.1e}; that of the original module is {before['y']:.1e}.")
print(f"The largest error of a gradient is {max(after.values()):.1e}; there it is {max(before.values()):.1e}.")
if any(after[name] > 2 * before[name] + 1e-6 for name in exact):
    sys.exit("The fused model's error is more than twice that of the original.")
print("The outputs and the gradients agree.")
