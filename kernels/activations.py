"""Activations: for each name a pair of Triton functions and its twin in plain PyTorch.

    act(z) -> h             h = act(z)
    dact(z, dh) -> (dz, h)  dz = dh * act'(z), and h again, since backward keeps only z

Both work elementwise on a tile of fp32 (or fp64, in the interpreter). To add an activation: write the pair
and add one line to ACTIVATIONS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .installed import tl, triton

aten = torch.ops.aten


@triton.jit
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _dgelu(z, dh):
    cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    pdf = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return dh * (cdf + z * pdf), z * cdf


@triton.jit
def _gelu_tanh(z):
    # 0.5 (1 + tanh u) = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3)
    return z * tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))


@triton.jit
def _dgelu_tanh(z, dh):
    s = tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
    ds = s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    return dh * (s + z * ds), z * s


@triton.jit
def _relu(z):
    return tl.where(z <= 0, 0.0, z)  # a NaN passes, as in PyTorch; tl.maximum would drop it


@triton.jit
def _drelu(z, dh):
    return tl.where(z <= 0, 0.0, dh), tl.where(z <= 0, 0.0, z)


@triton.jit
def _silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def _dsilu(z, dh):
    s = tl.sigmoid(z)
    return dh * s * (1.0 + z * (1.0 - s)), z * s


@triton.jit
def _tanh(z):
    e = tl.exp(-2.0 * tl.abs(z))
    t = (1.0 - e) / (1.0 + e)
    # 1 - e cancels near 0; below 0.1 the Taylor series is exact to 4e-15.
    u = z * z
    p = -0.13333333333333333 + u * (0.05396825396825397 + u * (-0.021869488536155203 + u * 0.008863235529902197))
    series = z * (1.0 - u * (0.3333333333333333 + u * p))
    return tl.where(tl.abs(z) < 0.1, series, tl.where(z < 0, -t, t))


@triton.jit
def _dtanh(z, dh):
    h = _tanh(z)
    return dh * (1.0 - h * h), h


@triton.jit
def _sigmoid(z):
    return tl.sigmoid(z)


@triton.jit
def _dsigmoid(z, dh):
    h = tl.sigmoid(z)
    return dh * h * (1.0 - h), h


@triton.jit
def _quick_gelu(z):
    return z * tl.sigmoid(1.702 * z)


@triton.jit
def _dquick_gelu(z, dh):
    s = tl.sigmoid(1.702 * z)
    return dh * s * (1.0 + 1.702 * z * (1.0 - s)), z * s


@triton.jit
def _leaky_relu(z):
    return tl.where(z > 0, z, 0.01 * z)


@triton.jit
def _dleaky_relu(z, dh):
    return tl.where(z > 0, dh, 0.01 * dh), tl.where(z > 0, z, 0.01 * z)


@triton.jit
def _identity(z):
    return z


@triton.jit
def _didentity(z, dh):
    return dh, z


def _eager_quick_gelu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(1.702 * z)


def _derivative(op: Any, dh: Tensor, *arguments: Any, grad_input: Tensor | None, **options: Any) -> Tensor:
    """dz by one of ATen's `*_backward`; the overload is named, because to search for it takes 7 µs."""
    if grad_input is None:
        return op.default(dh, *arguments, **options)
    return op.grad_input(dh, *arguments, grad_input=grad_input, **options)


def _eager_dsilu(z: Tensor, dh: Tensor, grad_input: Tensor | None = None) -> Tensor:
    if grad_input is not None:
        return aten.silu_backward.grad_input(dh, z, grad_input=grad_input)
    wide = z.to(torch.promote_types(z.dtype, torch.float32))  # silu_backward has no derivative of its own
    s = torch.sigmoid(wide)
    return (dh * (s * (1 + wide * (1 - s)))).to(dh.dtype)


def _eager_dquick_gelu(z: Tensor, dh: Tensor, grad_input: Tensor | None = None) -> Tensor:
    s = torch.sigmoid(1.702 * z)
    return torch.mul(dh, s * (1 + 1.702 * z * (1 - s)), out=grad_input)


@dataclass(frozen=True)
class Activation:
    """One row of the table: `act` and `dact` for the kernels, `eager` and `eager_derivative` for PyTorch.

    `eager(z) -> h` is differentiable and may return z itself. `eager_derivative(z, dh) -> dz` is what autograd would
    run for it, and is differentiable too; with `grad_input=t` it writes dz over t.
    """

    act: Any
    dact: Any
    eager: Callable[[Tensor], Tensor]
    eager_derivative: Callable[..., Tensor]

    def eager_backward(self, z: Tensor, dh: Tensor) -> Tensor:
        """dz, written over dh."""
        return self.eager_derivative(z, dh, grad_input=dh)


ACTIVATIONS = {
    "gelu": Activation(
        _gelu,
        _dgelu,
        F.gelu,
        lambda z, dh, grad_input=None: _derivative(aten.gelu_backward, dh, z, grad_input=grad_input),
    ),
    "gelu_tanh": Activation(
        _gelu_tanh,
        _dgelu_tanh,
        lambda z: F.gelu(z, approximate="tanh"),
        lambda z, dh, grad_input=None: _derivative(
            aten.gelu_backward, dh, z, approximate="tanh", grad_input=grad_input
        ),
    ),
    "relu": Activation(
        _relu,
        _drelu,
        torch.relu,
        lambda z, dh, grad_input=None: _derivative(aten.threshold_backward, dh, z, 0, grad_input=grad_input),
    ),
    "silu": Activation(_silu, _dsilu, F.silu, _eager_dsilu),
    "tanh": Activation(
        _tanh,
        _dtanh,
        torch.tanh,
        lambda z, dh, grad_input=None: _derivative(aten.tanh_backward, dh, torch.tanh(z), grad_input=grad_input),
    ),
    "sigmoid": Activation(
        _sigmoid,
        _dsigmoid,
        torch.sigmoid,
        lambda z, dh, grad_input=None: _derivative(aten.sigmoid_backward, dh, torch.sigmoid(z), grad_input=grad_input),
    ),
    "quick_gelu": Activation(_quick_gelu, _dquick_gelu, _eager_quick_gelu, _eager_dquick_gelu),
    "leaky_relu": Activation(
        _leaky_relu,
        _dleaky_relu,
        F.leaky_relu,
        lambda z, dh, grad_input=None: _derivative(aten.leaky_relu_backward, dh, z, 0.01, False, grad_input=grad_input),
    ),
    "identity": Activation(_identity, _didentity, lambda z: z, lambda z, dh, grad_input=None: dh),
}

# Other names in use: Hugging Face's ACT2FN and AdapterHub's configs.
ALIASES = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "leakyrelu": "leaky_relu",
    "linear": "identity",
}


def find_activation(name: str) -> Activation:
    """The row for `name` or one of its aliases. Raises ValueError that lists the known names."""
    row = ACTIVATIONS.get(name) or ACTIVATIONS.get(ALIASES.get(name, ""))
    if row is None:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join([*ACTIVATIONS, *ALIASES])}")
    return row
