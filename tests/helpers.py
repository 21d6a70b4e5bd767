"""An adapter call with its inputs, its gradients, its oracle, and the rule that compares them."""

import copy
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from adapter_ops import bottleneck_adapter, ops, reference
from adapter_ops.kernels.problem import Tuning, Weights
from adapter_ops.reference import relative_error

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Every choice of what has a gradient.
SUBSETS = [s for n in range(8) for s in itertools.combinations(("x", "w_down", "b_down", "w_up", "b_up"), n)]


@dataclass
class Call:
    """Random inputs of one call. `scale` is a number, "one" (a tensor [1]) or "channel" (a tensor [D])."""

    M: int = 33
    D: int = 20
    R: int = 6
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None
    activation: str = "gelu"
    scale: float | str = 1.0
    own_residual: bool = False
    bias: bool = True
    inputs: dict[str, Tensor] = field(init=False)
    tuning: ClassVar[Tuning | None] = None  # of the kernels, where a test asks for a form

    def __post_init__(self) -> None:
        M, D, R = self.M, self.D, self.R
        w = dict(dtype=self.parameter_dtype or self.dtype)
        a = dict(dtype=self.dtype)
        self.inputs = {"x": torch.randn(M, D, **a), "w_down": torch.randn(R, D, **w) / D**0.5}
        self.inputs["w_up"] = torch.randn(D, R, **w) / R**0.5
        if self.own_residual:
            self.inputs["residual"] = torch.randn(M, D, **a)
        if self.bias:
            self.inputs |= {"b_down": torch.randn(R, **w), "b_up": torch.randn(D, **w)}
        if isinstance(self.scale, str):
            self.inputs["scale"] = 0.5 + torch.rand(D if self.scale == "channel" else 1, **w)
        t = {n: v.double() for n, v in self.inputs.items()}
        # Noise, and a part along the adapter's own output: the gradient of a scalar scale would else be a sum that
        # cancels, which says nothing about its precision.
        u = self(reference.bottleneck_adapter, **t) - t.get("residual", t["x"])
        self.dy = torch.randn(M, D, **a) + u.to(self.dtype)

    def __call__(self, function=bottleneck_adapter, **inputs: Tensor) -> Tensor:
        """The call itself, with some inputs replaced."""
        t = self.inputs | inputs
        if self.tuning and function is bottleneck_adapter:
            return self._tuned(t)
        return function(
            t["x"],
            t["w_down"],
            t.get("b_down"),
            t["w_up"],
            t.get("b_up"),
            activation=self.activation,
            scale=t.get("scale", self.scale),
            residual=t.get("residual"),
        )

    def _tuned(self, t: dict[str, Tensor]) -> Tensor:
        scale = t.get("scale")
        weights = Weights(t["w_down"], t.get("b_down"), t["w_up"], t.get("b_up"), scale)
        number = self.scale if scale is None else 1.0
        return ops.adapter(t["x"], t.get("residual"), weights, self.activation, number, self.tuning)

    def gradients(self, function=bottleneck_adapter, wanted=None, dtype=None) -> dict[str, Tensor]:
        """y and the gradient of each wanted input (all of them by default), with every other input frozen."""
        wanted = list(self.inputs) if wanted is None else wanted
        inputs = {n: t.detach().to(dtype or t.dtype).requires_grad_(n in wanted) for n, t in self.inputs.items()}
        y = self(function, **inputs)
        dy = self.dy.to(dtype or y.dtype)
        found = torch.autograd.grad(y, [inputs[n] for n in wanted], dy) if wanted else ()
        return {"y": y.detach(), **dict(zip(wanted, found))}

    def oracle(self, wanted=None) -> dict[str, Tensor]:
        return self.gradients(reference.bottleneck_adapter, wanted, torch.float64)

    def neighbor(self) -> "Call":
        """The same call, in the same layouts of memory, with every number changed by up to an eighth of itself."""
        other = copy.copy(self)
        other.inputs = {name: _changed(t) for name, t in self.inputs.items()}
        other.dy = _changed(self.dy)
        return other


def _changed(t: Tensor) -> Tensor:
    elements = t.untyped_storage().nbytes() // t.element_size()
    storage = torch.as_strided(t, (elements,), (1,), 0)
    changed = storage * (1 + torch.rand(elements, device=t.device) / 8).to(t.dtype)
    return torch.as_strided(changed, t.shape, t.stride(), t.storage_offset())


def assert_two_times_rule(found, eager, oracle, slack: float = 0.0) -> None:
    """Every error against fp64 is at most twice eager's, give or take eight roundings of the accumulator.

    That is for sums of few terms that cancel (a bias of one element), where either side may be lucky; `slack` is for
    the interpreter's bf16.
    """
    check_rule([(found, eager, oracle)], slack)


def check_rule(results, slack: float) -> None:
    """The rule for the root mean square of each tensor's errors over some calls: triples of found, eager and oracle."""
    for name in results[0][2]:
        errors, allowed = [], []
        for found, eager, oracle in results:
            assert found.keys() == eager.keys() == oracle.keys()
            assert found[name].shape == eager[name].shape and found[name].dtype == eager[name].dtype, name
            errors.append(relative_error(found[name], oracle[name]))
            allowed.append(relative_error(eager[name], oracle[name]))
        epsilon = 8 * torch.finfo(torch.promote_types(found[name].dtype, torch.float32)).eps
        error, limit = (math.sqrt(sum(e * e for e in all_) / len(all_)) for all_ in (errors, allowed))
        message = f"{name}: error {error:.2e}, eager has {limit:.2e}, in {len(results)} calls"
        assert error <= 2 * limit + epsilon + slack, message


def check_with_neighbors(call: "Call", run: Callable[["Call"], tuple], slack: float) -> None:
    """The 2× rule for one call, or for that call and sixteen neighbors of it together.

    `run` returns found, eager and oracle. The error of a gradient of few elements in 16 bits is a matter of luck: over
    300 seeds both sides have the same root mean square, yet in one call of ten either has more than twice the other's.
    A call that breaks the rule by such luck has neighbors that do not.
    """
    results = [run(call)]
    try:
        check_rule(results, slack)
    except AssertionError:
        check_rule(results + [run(call.neighbor()) for _ in range(16)], slack)


def slack(path: str, dtype: torch.dtype) -> float:
    """The interpreter truncates to bf16 where hardware rounds: a bias of up to one eps in what is stored."""
    return torch.finfo(dtype).eps if path == "interpreter" and dtype == torch.bfloat16 else 0.0


def check(call: Call, path: str, wanted=None, eager: Callable[[Call], dict[str, Tensor]] | None = None) -> None:
    """The 2× rule; `eager` makes the gradients that those of the call are compared with."""
    eager = eager or (lambda call: call.gradients(reference.bottleneck_adapter, wanted))
    check_with_neighbors(
        call, lambda call: (call.gradients(wanted=wanted), eager(call), call.oracle(wanted)), slack(path, call.dtype)
    )


def check_exact(call: Call) -> None:
    """With small integers every sum is exact, so any slip of an index or a mask shows in a bit."""
    for name, t in call.inputs.items():
        call.inputs[name] = torch.randint_like(t, -2, 3)
    call.dy = torch.randint_like(call.dy, -2, 3)
    oracle, found = call.oracle(), call.gradients()
    for name in oracle:
        assert torch.equal(found[name].double(), oracle[name]), name


class Named(torch.Tensor):
    """A subclass that changes nothing."""


class Wrapper(torch.Tensor):
    """A wrapper subclass: PyTorch's operations reach the tensor inside, a pointer would reach nothing."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Wrapper({self.inner})"

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Wrapper(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner_args, inner_kwargs = tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
        found = tree_map_only(torch.Tensor, Wrapper, func(*inner_args, **inner_kwargs))
        return return_and_correct_aliasing(func, args, kwargs or {}, found)


def bare(t: Tensor) -> Tensor:
    """The plain tensor that a Named, a Wrapper or a plain tensor stands for."""
    return t.inner if isinstance(t, Wrapper) else t.as_subclass(torch.Tensor)


def as_function(call: Call, wanted):
    return (lambda *t: call(**dict(zip(wanted, t)))), [call.inputs[n].clone().requires_grad_() for n in wanted]


def python(*arguments):
    """stdout of a process of its own: in this one the kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
