"""Backend: which implementation runs a call, and why.

    triton     the kernels, on a GPU or in Triton's interpreter
    cpu        ATen and oneDNN calls that add in place
    reference  PyTorch's own operations, for everything else

`obstacle` is the one place that sends a call to the reference formula because of how it is called; `choose` goes by
device, dtype and size.
"""

import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .kernels import configs
from .kernels.installed import MISSING
from .kernels.problem import UNTUNED, Options, Tuning, Weights, forward_problem

if MISSING is None:
    from .kernels import forward, plan
    from .kernels.plan import INTERPRETED, Plan
else:
    INTERPRETED = False

NAMES = ("triton", "cpu", "reference")


class Backend(NamedTuple):
    """Which implementation runs, and why. Where kernels were considered, `plan` says what they launch."""

    name: str  # one of NAMES
    reason: str
    plan: "Plan | None" = None


# Triton reads TRITON_INTERPRET when the kernels are defined, so a value that was set later has no effect anyway.
_ASKED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
_IGNORED = f"; {MISSING}, so TRITON_INTERPRET has no effect" if MISSING is not None and _ASKED else ""
_CPU = Backend("cpu", f"the tensors are on the CPU{_IGNORED}")
_SMALL = Backend(
    "reference", f"the tensors are on the CPU and x is small, so plain PyTorch calls cost less to launch{_IGNORED}"
)
_FUNC = Backend("reference", "a torch.func or forward-mode transform is active")
_TRACE = Backend("reference", "torch.jit.trace records PyTorch's own operations")
_MODE = Backend("reference", "a torch dispatch mode is active, and has to see PyTorch's own operations")

# On the CPU a Python autograd.Function costs about 30 µs a call, which fewer elements of x do not earn back; without
# gradients the additions in place cost about 5.
SMALL, SMALL_INFERENCE = 1 << 18, 1 << 12

# The types whose memory the kernels may read and write. torch.export (without strict) runs this code with FakeTensors.
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_PLAIN_IN_EXPORT = _PLAIN | {FakeTensor}

_REQUIRE = "ADAPTER_OPS_REQUIRE"
# `os.environ.get` of a variable that is not set raises and catches two errors, which takes as long as a small product;
# so each call looks into the dictionary behind it, where there is one. It may hold keys and values as bytes.
_environment: Any = getattr(os.environ, "_data", os.environ)
_encode: Any = os.environ.encodekey if hasattr(os.environ, "_data") else str  # type: ignore[attr-defined]
_REQUIRE_KEY = _encode(_REQUIRE)
_ENCODED = {name: os.fsencode(name) if isinstance(_REQUIRE_KEY, bytes) else name for name in NAMES}

_is_compiling = torch.compiler.is_compiling
_in_functorch = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
# Whether a tensor is a batch of torch.autograd.grad with is_grads_batched=True, which does not use torch.func.
is_batch = torch._C._functorch.is_legacy_batchedtensor


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    return _in_functorch() or forward_ad._current_level >= 0


def ordinary(x: Tensor) -> bool:
    """Whether a call is eager and nothing stands between PyTorch's operations and the memory of plain tensors.

    It is what `obstacle` asks, but for the tensors' types.
    """
    return not (
        _is_compiling()
        or _in_functorch()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or _dispatch_modes()
        or is_batch(x)
    )


def obstacle(x: Tensor, *others: Tensor | None) -> Backend | None:
    """The reference backend where a call has to be made of PyTorch's own operations, else None.

    Eager calls, compiled calls, backward and `explain` all ask here. A kernel reads memory through a pointer, so it
    would pass by whatever stands between PyTorch's operations and memory: a transform, a tracer, a dispatch mode, or a
    tensor that is more than a dense array.
    """
    if transformed():
        return _FUNC
    types, compiling = _PLAIN, _is_compiling()
    if compiling:
        types = _PLAIN_IN_EXPORT
    elif _tracing_state() is not None:
        return _TRACE
    elif _dispatch_modes():
        return _MODE
    elif is_batch(x):
        return _FUNC
    for t in (x, *others):
        if t is not None and (type(t) not in types or t.layout is not torch.strided):
            kind = type(t).__name__ if type(t) not in types else str(t.layout)
            return Backend("reference", f"an operand is a {kind}, not a plain dense tensor")
        if t is not None and not compiling and t.is_neg():
            return Backend("reference", "an operand has PyTorch's negative bit, so its memory holds other values")
    # Of the others only the residual can be nested, and it has the shape of x.
    if x.is_nested:
        return Backend("reference", "x is a nested tensor")
    return None


def is_refused(name: str) -> bool:
    """Whether ADAPTER_OPS_REQUIRE is set to something else than the name of a backend."""
    return _REQUIRE_KEY in _environment and _environment[_REQUIRE_KEY] != _ENCODED[name]


def require(backend: Backend) -> None:
    """Raises RuntimeError if the environment variable ADAPTER_OPS_REQUIRE names another backend, or none."""
    required = os.environ.get(_REQUIRE)
    if not required or required == backend.name:
        return
    if required not in NAMES:
        raise RuntimeError(f"{_REQUIRE}={required} names no backend; known: {', '.join(NAMES)}")
    raise RuntimeError(
        f"{_REQUIRE}={required}, but this call would take the backend {backend.name!r}: {backend.reason}"
    )


def choose(x: Tensor, residual: Tensor | None, weights: Weights, options: Options, tuning: Tuning = UNTUNED) -> Backend:
    """The backend of a call that meets no obstacle: a matter of device, dtype and size.

    Args:
        x, residual: [M, D] as the kernels take them.
        weights: of one adapter, or of T tasks.
    """
    kind, shape = x.device.type, list(weights.w_down.shape[-2:])
    if kind == "cpu" and not INTERPRETED:
        return _SMALL if x.numel() < (SMALL if torch.is_grad_enabled() else SMALL_INFERENCE) else _CPU
    if kind not in ("cpu", "cuda"):
        return Backend("reference", f"no kernels for device type {kind!r}")
    if MISSING is not None:
        return Backend("reference", MISSING)
    if math.prod(shape) >= 1 << 31:
        return Backend("reference", f"a weight {shape} has more elements than the kernels address, 2^31 - 1")
    if weights.w_down.dim() == 3 and len(weights.w_down) >= 1 << 15:
        return Backend("reference", f"{len(weights.w_down)} tasks are more than a grid holds, 2^15 - 1")
    target = plan.target(x.device)
    if not target.interpreted:
        if x.dtype == torch.float64:
            return Backend("reference", "float64 has no GPU kernel")
        if torch.version.cuda and target.capability < (8, 0):
            return Backend("reference", f"compute capability {target.capability} is under (8, 0)")
    problem = forward_problem(x, residual, weights, options, torch.is_grad_enabled(), target, tuning)
    made = forward.plan(problem)
    return Backend("reference" if made.form == "pytorch" else "triton", made.reason, made)


def may_run_kernels(x: Tensor, w_down: Tensor, options: Options) -> bool:
    """Whether a compiled call on a GPU is left to the kernels; else the compiler gets PyTorch's own operations.

    It is traced, and asks no more than sizes and the card. Where it is wrong, the op decides when it runs.
    """
    (*tasks, R, D), M = w_down.shape, x.numel() // x.shape[-1]
    for itemsize, rows, columns, bottleneck in _limits(x.device):
        if tasks and itemsize:  # what was measured is one adapter for all rows
            continue
        if itemsize in (0, options.dtype.itemsize) and rows <= M and columns >= D and bottleneck >= R:
            return True
    return False


def _limits(device: torch.device) -> list[tuple[int, int, int, int]]:
    """What kernels take on a card: bytes of an element or 0 for any, M at least, D and R at most.

    Everything is left to the op, which asks again when it runs, where there is no card to ask, or where
    ADAPTER_OPS_REQUIRE is set.
    """
    everything = [(0, 0, 1 << 62, 1 << 62)]
    if _REQUIRE_KEY in _environment or not torch.cuda.is_available():
        return everything
    if MISSING is not None:
        return []
    target = plan.target(device)
    if target.unmeasured:
        return everything
    rows = (row for form in forward.FORMS for row in configs.measured(form, target))
    return [(row.itemsize, row.rows, row.columns, row.bottleneck) for row in rows]


# As torch.compiler.assume_constant_result would mark it, which imports all of the compiler.
_limits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else x's."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype
