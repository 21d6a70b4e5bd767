"""What is timed: providers of one adapter, the cases they run on, and the gate they must pass."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_ops import BottleneckAdapter, reference
from adapter_ops.reference import relative_error

from ..shape import Shape

MODES = ("fwd", "bwd", "fwd+bwd")
Call = Callable[[], Any]
Module = Callable[[Tensor], Tensor]


class Unfused(nn.Module):
    """The adapter as PyTorch users write it: x + up(gelu(down(x)))."""

    def __init__(self, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.down, self.act, self.up = adapter.down, nn.GELU(), adapter.up

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.act(self.down(x)))


class InPlace(nn.Module):
    """The best that inference gets without a kernel of its own: the activation in the first product's epilogue, the
    second product added into its result."""

    def __init__(self, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.down, self.up = adapter.down, adapter.up

    def forward(self, x: Tensor) -> Tensor:
        h = torch._addmm_activation(self.down.bias, x, self.down.weight.t(), use_gelu=True)
        return (x + self.up.bias).addmm_(h, self.up.weight.t())


class AdapterHub(nn.Module):
    """AdapterHub's own module, over the same parameters."""

    def __init__(self, adapter: BottleneckAdapter) -> None:
        super().__init__()
        from adapters import BnConfig
        from adapters.methods.modeling import Adapter

        config = BnConfig(mh_adapter=True, output_adapter=True, reduction_factor=1, non_linearity="gelu")
        self.inner = Adapter("bench", adapter.down.in_features, adapter.down.out_features, config)
        self.inner.adapter_down[0], self.inner.adapter_up = adapter.down, adapter.up

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)[0]


def _compiled(**options: Any) -> Callable[[BottleneckAdapter], Module]:
    def make(adapter: BottleneckAdapter) -> Module:
        return torch.compile(Unfused(adapter), dynamic=False, **options)

    return make


@dataclass(frozen=True)
class Provider:
    """A way to compute the adapter. `copy` computes nothing: it moves as many bytes as must be moved."""

    make: Callable[[BottleneckAdapter], Module] | None
    modes: tuple[str, ...] = MODES
    compiles: bool = False
    # cublasLt's epilogue has the tanh form only; on the CPU the same call takes erf.
    cuda_activation: str = "gelu"
    package: str = "torch"

    def activation(self, device: str) -> str:
        return self.cuda_activation if device == "cuda" else "gelu"

    def available(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


PROVIDERS = {
    "eager": Provider(Unfused),
    "compile": Provider(_compiled(), compiles=True),
    "max-autotune": Provider(_compiled(mode="max-autotune-no-cudagraphs"), compiles=True),
    "in-place": Provider(InPlace, modes=("fwd",), cuda_activation="gelu_tanh"),
    "adapterhub": Provider(AdapterHub, package="adapters"),
    "adapter_ops": Provider(lambda adapter: adapter),
    "copy": Provider(None),
}


class Case:
    """One shape and dtype with `sets` sets of inputs; one set of weights, so drawn that the adapter is no identity."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, sets: int = 1) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.adapter = BottleneckAdapter(shape.D, shape.R, init_std=0.05, device=device, dtype=dtype)
        self.parameters = list(self.adapter.parameters())
        self.xs, self.dys = ([self._random() for _ in range(sets)] for _ in range(2))
        for x in self.xs:
            x.requires_grad_()

    def _random(self) -> Tensor:
        return torch.randn(self.shape.M, self.shape.D, device=self.device, dtype=self.dtype)

    def make(self, name: str) -> Module | None:
        """The provider's module; None for `copy`."""
        provider = PROVIDERS[name]
        if provider.compiles:
            # One backward is run many times over what its forward saved, so nothing saved may be reused as scratch.
            import torch._functorch.config

            torch._functorch.config.donated_buffer = False
        return provider.make and provider.make(self.adapter)

    def calls(self, module: Module | None, mode: str) -> list[Call]:
        """What to time, on each set of inputs in turn."""
        return [self.call(module, mode, i) for i in range(len(self.xs))]

    def call(self, module: Module | None, mode: str, i: int = 0) -> Call:
        """What to time, returning its results: "fwd" without gradients, "bwd" over a forward done here, or both."""
        x, dy = self.xs[i], self.dys[i]
        if module is None:
            return self._copy(x, dy, mode)
        inputs = [x, *self.parameters]

        def fwd() -> Tensor:
            with torch.no_grad():
                return module(x)

        if mode == "fwd":
            return fwd
        if mode == "bwd":
            y = module(x)
            return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

        def both() -> tuple[Tensor, ...]:
            y = module(x)
            return y, *torch.autograd.grad(y, inputs, dy)

        return both

    def _copy(self, x: Tensor, dy: Tensor, mode: str) -> Call:
        flat, other = x.detach().view(-1), dy.view(-1)
        parts = {"fwd": [flat], "bwd": [flat, other[::2]], "fwd+bwd": [flat, other, flat[::2]]}[mode]
        source = torch.cat(parts)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def outputs(self, module: Module, mode: str) -> list[Tensor]:
        """y ("fwd"), or y, dx and the parameters' gradients."""
        found = self.call(module, "fwd" if mode == "fwd" else "fwd+bwd")()
        return [t.detach() for t in (found if isinstance(found, tuple) else [found])]

    def oracle(self, activation: str, chunk: int = 8192) -> list[Tensor]:
        """y, dx and the parameters' gradients in fp64, some rows at a time to stay small."""
        parameters = [p.detach().double().requires_grad_() for p in self.parameters]
        rows: list[list[Tensor]] = []
        sums = [torch.zeros_like(p) for p in parameters]
        for x, dy in zip(self.xs[0].detach().split(chunk), self.dys[0].split(chunk)):
            x = x.double().requires_grad_()
            y = reference.bottleneck_adapter(x, *parameters, activation=activation)
            dx, *grads = torch.autograd.grad(y, [x, *parameters], dy.double())
            rows.append([y.detach(), dx])
            sums = [a + g for a, g in zip(sums, grads)]
        return [torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows]), *sums]

    def same_dtype(self, activation: str, mode: str) -> list[Tensor]:
        """`outputs` of plain PyTorch with that activation."""
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        down, up = self.adapter.down, self.adapter.up
        return self.outputs(lambda x: x + up(F.gelu(down(x), approximate=approximate)), mode)


@dataclass(frozen=True)
class Errors:
    """A provider's error against fp64 beside eager's, for the result where it does worst."""

    error: float
    eager: float
    ratio: float  # over 2 is wrong

    @property
    def right(self) -> bool:
        return self.ratio <= 2


class Gate:
    """Compares providers with fp64 on one case; oracle and eager results are computed once for each activation."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.known: dict[str, tuple[list[Tensor], list[float]]] = {}

    def check(self, name: str, module: Module, mode: str) -> Errors:
        case, activation = self.case, PROVIDERS[name].activation(self.case.device)
        if activation not in self.known:
            oracle = case.oracle(activation)
            found = case.same_dtype(activation, "fwd+bwd")
            self.known[activation] = oracle, [relative_error(f, o) for f, o in zip(found, oracle)]
        oracle, eager = self.known[activation]
        worst = Errors(0.0, 0.0, 0.0)
        for f, o, e in zip(case.outputs(module, mode), oracle, eager):
            # Eight roundings of a sum in fp32, as in the tests; of few numbers also one in the dtype of the result,
            # where either side may be lucky.
            slack = 4 * torch.finfo(torch.float32).eps
            if o.numel() < 64:
                slack = max(slack, torch.finfo(case.dtype).eps / 2)
            error = relative_error(f, o)
            ratio = error / (e + slack)
            if not ratio <= worst.ratio:  # so written, a NaN is the worst
                worst = Errors(error, e, ratio)
                if ratio != ratio:
                    break
        return worst
