"""Tensors that are more than a dense array: subclasses, nested tensors, DTensors.

They have to give what PyTorch's own operations give, in eager mode and compiled.
"""

import pytest
import torch
from helpers import Call, Named, Wrapper, bare
from torch import nn

from adapter_ops import BottleneckAdapter, bottleneck_adapter, reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("which", ["x", "w_up", "b_down", "residual", "scale", "all"])
@pytest.mark.parametrize("kind", [Named, Wrapper])
def test_subclasses(path, kind, which, compiled, grad):
    call = Call(9, 20, 6, own_residual=True, scale="channel")
    names = list(call.inputs) if which == "all" else [which]
    torch.compiler.reset()

    def run(function):
        inputs = {n: t.detach().clone() for n, t in call.inputs.items()}
        for n in names:
            inputs[n] = inputs[n].as_subclass(Named) if kind is Named else Wrapper(inputs[n])
        leaves = [t.requires_grad_(grad) for t in inputs.values()]
        y = call(function, **inputs)
        return y, torch.autograd.grad(y.sum(), leaves) if grad else ()

    found = bottleneck_adapter
    if compiled:  # AOTAutograd fails on any call with a subclass that has no __torch_dispatch__
        found = torch.compile(found, fullgraph=True, backend="eager" if kind is Named else "aot_eager")
    (y, gradients), (expected, expected_gradients) = run(found), run(reference.bottleneck_adapter)
    assert type(y) is type(expected) is kind
    for f, e in zip((y, *gradients), (expected, *expected_gradients)):
        assert type(f) is type(e)
        torch.testing.assert_close(bare(f), bare(e))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(path, layout, grad):
    adapter = BottleneckAdapter(20, 6, init_std=0.2)
    parts = [torch.randn(n, 20) for n in (3, 5)]
    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        y = adapter(x)
    assert y.is_nested and adapter.explain(x).name == "reference"
    for found, part in zip(y.unbind(), parts):
        torch.testing.assert_close(found, adapter(part))
    if grad:
        y.values().sum().backward() if layout == torch.jagged else torch.cat(y.unbind()).sum().backward()
        assert adapter.down.weight.grad.any()
    with pytest.raises(ValueError, match="x has hidden size 20, w_down"):
        BottleneckAdapter(24, 6)(x)


def test_transformer_encoder_with_a_padding_mask(path):
    """With its defaults, in eval mode, it makes a nested tensor of what the mask leaves."""

    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    adapter = BottleneckAdapter(16, 4, init_std=0.2)
    seen = []
    for block in encoder.layers:
        block.register_forward_hook(lambda m, args, out: seen.append(out.is_nested) or adapter(out))
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    with torch.no_grad():
        found = encoder(x, src_key_padding_mask=mask)
    encoder.enable_nested_tensor = False
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=mask)
    assert any(seen)
    torch.testing.assert_close(found[~mask], expected[~mask], rtol=1e-4, atol=1e-4)


@pytest.fixture
def mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_dtensor(path, mesh, compiled):
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    torch.compiler.reset()
    adapter = BottleneckAdapter(20, 6, init_std=0.2)
    x = torch.randn(4, 9, 20)
    expected = adapter(x)
    wanted = torch.autograd.grad(expected.square().sum(), list(adapter.parameters()))
    distribute_module(adapter, mesh)
    run = torch.compile(adapter, fullgraph=True, backend="aot_eager") if compiled else adapter
    y = run(distribute_tensor(x, mesh, [Shard(0)]))
    torch.testing.assert_close(y.full_tensor(), expected)
    found = torch.autograd.grad(y.square().sum(), list(adapter.parameters()))
    for f, e in zip(found, wanted):
        torch.testing.assert_close(f.redistribute(mesh, [Replicate()]).to_local(), e)
