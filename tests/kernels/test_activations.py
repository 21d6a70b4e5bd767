"""The table: names, aliases, and the eager twins against autograd."""

import pytest
import torch

from adapter_ops.kernels.activations import ACTIVATIONS, ALIASES, find_activation

Z = torch.cat([torch.linspace(-12, 12, 4801, dtype=torch.float64), torch.tensor([1e-9, -1e-5, 0.0999, 0.1001])])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_eager_backward_is_autograds(name):
    activation = find_activation(name)
    z = Z.clone().requires_grad_()
    dh = torch.randn_like(Z)
    (expected,) = torch.autograd.grad(activation.eager(z), z, dh)
    dz = activation.eager_backward(Z, dh)
    assert dz is dh  # no memory of its own
    torch.testing.assert_close(dz, expected)


@pytest.mark.parametrize(
    "name, function",
    [
        ("gelu", torch.nn.GELU()),
        ("gelu_tanh", torch.nn.GELU("tanh")),
        ("gelu_new", torch.nn.GELU("tanh")),
        ("relu", torch.nn.ReLU()),
        ("swish", torch.nn.SiLU()),
        ("tanh", torch.nn.Tanh()),
        ("sigmoid", torch.nn.Sigmoid()),
        ("leaky_relu", torch.nn.LeakyReLU()),
        ("linear", torch.nn.Identity()),
        ("quick_gelu", lambda z: z / (1 + torch.exp(-1.702 * z))),
    ],
)
def test_names_mean_what_pytorch_means(name, function):
    torch.testing.assert_close(find_activation(name).eager(Z), function(Z))


def test_aliases_are_known_and_new():
    assert set(ALIASES.values()) <= set(ACTIVATIONS) and not set(ALIASES) & set(ACTIVATIONS)


@pytest.mark.parametrize("name", ["gelo", "", None])
def test_unknown(name):
    with pytest.raises(ValueError, match=r"unknown activation .*; known: gelu, gelu_tanh.*swish"):
        find_activation(name)
