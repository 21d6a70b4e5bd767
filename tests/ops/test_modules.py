"""BottleneckAdapter: parameters, initialisation, and its place in a model."""

import copy
import os
import pickle

import pytest
import torch
from torch import nn

import adapter_ops
from adapter_ops import BottleneckAdapter
from adapter_ops.kernels.activations import find_activation
from adapter_ops.modules import activation_name


class Houlsby(nn.Module):
    """What the module stands in for."""

    def __init__(self, D, R):
        super().__init__()
        self.down, self.act, self.up = nn.Linear(D, R), nn.GELU(), nn.Linear(R, D)

    def forward(self, x):
        return x + self.up(self.act(self.down(x)))


def test_state_dict_moves_both_ways():
    unfused, adapter = Houlsby(20, 6), BottleneckAdapter(20, 6)
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (adapter, unfused)]
    assert shapes[0] == shapes[1]
    adapter.load_state_dict(unfused.state_dict())
    x = torch.randn(4, 3, 20)
    torch.testing.assert_close(adapter(x), unfused(x))
    unfused.load_state_dict(BottleneckAdapter(20, 6).state_dict())


def test_from_linear_shares_parameters():
    unfused = Houlsby(20, 6)
    adapter = BottleneckAdapter.from_linear(unfused.down, unfused.up, activation=unfused.act)
    assert adapter.down.weight is unfused.down.weight
    x = torch.randn(4, 20)
    torch.testing.assert_close(adapter(x), unfused(x))
    with pytest.raises(ValueError, match="down maps 20 to 6, up maps 5 to 20"):
        BottleneckAdapter.from_linear(unfused.down, nn.Linear(5, 20), activation="gelu")


ACTIVATIONS = [
    (nn.GELU(), "gelu"),
    (nn.GELU("tanh"), "gelu_tanh"),
    (nn.ReLU(), "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (nn.SiLU(), "silu"),
    (nn.Tanh(), "tanh"),
    (nn.Sigmoid(), "sigmoid"),
    (nn.LeakyReLU(), "leaky_relu"),
    (nn.Identity(), "identity"),
]


@pytest.mark.parametrize("module, name", ACTIVATIONS, ids=lambda a: str(a))
def test_activation_modules(module, name):
    down, up, x = nn.Linear(20, 6), nn.Linear(6, 20), torch.randn(7, 20)
    adapter = BottleneckAdapter.from_linear(down, up, activation=module)
    assert adapter.activation == BottleneckAdapter(20, 6, activation=module).activation == name
    torch.testing.assert_close(adapter(x), x + up(module(down(x))))


class OwnGELU(nn.GELU):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    "module",
    [nn.LeakyReLU(0.2), nn.ReLU6(), nn.PReLU(), nn.Dropout(0.1), nn.Sequential(nn.GELU()), OwnGELU(), nn.GELU("erf")],
    ids=str,
)
def test_other_activation_modules_are_refused(module):
    for make in (
        lambda: BottleneckAdapter(20, 6, activation=module),
        lambda: BottleneckAdapter.from_linear(nn.Linear(20, 6), nn.Linear(6, 20), activation=module),
    ):
        with pytest.raises(ValueError, match=r"no kernel for the activation (.|\n)*known: nn.GELU\(\)"):
            make()


def test_activations_of_transformers():
    """Each of them is taken for what it computes, or refused."""
    table = pytest.importorskip("transformers.activations").ACT2FN
    z = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    taken = set()
    for name in table:
        module = table[name]
        try:
            found = activation_name(module)
        except ValueError:
            continue
        taken.add(name)
        torch.testing.assert_close(find_activation(found).eager(z), module(z))
    names = {
        "gelu",
        "gelu_new",
        "gelu_pytorch_tanh",
        "quick_gelu",
        "relu",
        "silu",
        "swish",
        "tanh",
        "sigmoid",
        "linear",
    }
    assert names <= taken


def test_from_linear_of_a_sequential():
    unfused = nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 20))
    adapter = BottleneckAdapter.from_linear(unfused, scale=0.5)
    assert adapter.activation == "relu" and adapter.down is unfused[0] and adapter.up is unfused[2]
    x = torch.randn(4, 20)
    torch.testing.assert_close(adapter(x), x + 0.5 * unfused(x))


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((nn.Sequential(),), ValueError, "an activation and nn.Linear, got one of nothing"),
        ((nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)),), ValueError, "got one of Linear, Linear"),
        (
            (nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4), nn.Dropout(0.1)),),
            ValueError,
            "got one of Linear, ReLU, Linear, Dropout",
        ),
        ((nn.Sequential(nn.Linear(4, 2), nn.Dropout(), nn.Linear(2, 4)),), ValueError, "no kernel for the activation"),
        ((nn.Sequential(nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 4)),), TypeError, "down is ReLU, expected torch.nn"),
        ((nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4)), nn.Linear(2, 4)), TypeError, "got an nn.Seq"),
        ((nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 5)),), ValueError, "down maps 4 to 2, up maps 2 to 5"),
        ((nn.Sequential(nn.Linear(4, 2), nn.ReLU(), Halved(2, 4)),), TypeError, "up is Halved, expected torch.nn"),
        ((nn.Linear(4, 2),), TypeError, "up is NoneType, expected torch.nn.Linear"),
    ],
)
def test_from_linear_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        BottleneckAdapter.from_linear(*arguments)


def test_from_linear_has_no_default_activation():
    with pytest.raises(TypeError, match="activation"):
        BottleneckAdapter.from_linear(nn.Linear(20, 6), nn.Linear(6, 20))
    with pytest.raises(ValueError, match="unknown activation 'gelo'; known: gelu"):
        BottleneckAdapter.from_linear(nn.Linear(20, 6), nn.Linear(6, 20), activation="gelo")


@pytest.mark.parametrize("std", [1e-2, 1e-7, 0.5])
def test_initialisation_is_the_papers(std):
    adapter = BottleneckAdapter(768, 64, init_std=std)
    for weight in (adapter.down.weight, adapter.up.weight):
        assert weight.abs().max() <= 2 * std
        # A normal cut at two standard deviations keeps 0.8796 of its own.
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.02) and abs(weight.mean()) < 0.02 * std
    assert not adapter.down.bias.any() and not adapter.up.bias.any()
    x = torch.randn(64, 768)
    if std <= 1e-2:
        assert (adapter(x) - x).norm() < 0.02 * x.norm()


@pytest.mark.parametrize("scale, size", [("learned", 1), ("channel", 20)])
def test_learned_scale(scale, size):
    adapter = BottleneckAdapter(20, 6, scale=scale, init_std=0.2)
    assert torch.equal(adapter.scale, torch.ones(size)) and "scale" in adapter.state_dict()
    x = torch.randn(7, 20)
    plain = BottleneckAdapter(20, 6)
    plain.load_state_dict({n: t for n, t in adapter.state_dict().items() if n != "scale"})
    torch.testing.assert_close(adapter(x), plain(x))
    adapter(x).square().sum().backward()
    assert adapter.scale.grad.abs().min() > 0


def test_own_residual():
    adapter = BottleneckAdapter(20, 6, init_std=0.2)
    x, residual = torch.randn(2, 7, 20)
    torch.testing.assert_close(adapter(x, residual), adapter(x) - x + residual)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bottleneck_size": 0}, "hidden_size 20 and bottleneck_size 0 must be at least 1"),
        ({"hidden_size": 0}, "hidden_size 0 and bottleneck_size 6"),
        ({"activation": "gelo"}, "unknown activation 'gelo'; known: gelu"),
        ({"init_std": 0.0}, "init_std is 0.0, must be positive"),
        ({"init_std": float("nan")}, "init_std is nan"),
        ({"scale": float("nan")}, "scale is nan, must be finite"),
        ({"scale": -float("inf")}, "scale is -inf, must be finite"),
        ({"scale": "chanel"}, "unknown scale 'chanel'; known: a number, 'learned', 'channel'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BottleneckAdapter(**({"hidden_size": 20, "bottleneck_size": 6} | arguments))


def test_copies_pickles_and_moves():
    adapter = BottleneckAdapter(20, 6, init_std=0.2, scale="channel")
    x = torch.randn(3, 20)
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert torch.equal(other(x), adapter(x)) and other.down.weight is not adapter.down.weight
    half = adapter.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert BottleneckAdapter(20, 6, device="meta")(x.to("meta")).shape == (3, 20)


def test_no_bias():
    adapter = BottleneckAdapter(20, 6, bias=False)
    assert list(adapter.state_dict()) == ["down.weight", "up.weight"]
    assert adapter(torch.randn(3, 20)).shape == (3, 20)


def test_gradient_checkpointing():
    adapter = BottleneckAdapter(20, 6, init_std=0.2)
    x = torch.randn(9, 20, requires_grad=True)
    expected = torch.autograd.grad(adapter(x).square().sum(), [x, *adapter.parameters()])
    for reentrant in (True, False):
        y = torch.utils.checkpoint.checkpoint(adapter, x, use_reentrant=reentrant)
        y.square().sum().backward()
        found = [x.grad, *(p.grad for p in adapter.parameters())]
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e)
        x.grad = None
        adapter.zero_grad()


def test_explain_and_repr():
    adapter = BottleneckAdapter(20, 6)
    x = torch.zeros(3, 20)
    assert adapter.explain(x)[:2] == adapter_ops.explain(x, adapter.down.weight)[:2]
    assert "activation=gelu, scale=1.0" in repr(adapter)
    assert "scale=channel" in repr(BottleneckAdapter(20, 6, scale="channel"))


def test_it_trains():
    adapter = BottleneckAdapter(20, 6, init_std=0.1)
    x = torch.randn(256, 20)
    target = x + torch.tanh(x.roll(1, 1))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (adapter(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_type_checker_sees_tensors(tmp_path):
    """nn.Module says that a call returns Any, which hides every mistake made with the result."""
    api = pytest.importorskip("mypy.api")
    root = os.path.dirname(os.path.dirname(adapter_ops.__file__))
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, adapter_ops\nreveal_type(adapter_ops.BottleneckAdapter(8, 2)(torch.zeros(1, 8)))\n"
    )
    options = ["--config-file", os.path.join(root, "pyproject.toml"), "--follow-imports=silent", "--no-incremental"]
    out, _, _ = api.run([*options, "--cache-dir", str(tmp_path), str(script)])
    assert 'Revealed type is "torch._tensor.Tensor"' in out, out
