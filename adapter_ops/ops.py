"""AdapterFunction, the torch.library ops, and the choice of path.

Arguments are taken as checked (`functional.py` does that). Eager calls go through AdapterFunction straight to a path's
`forward` and `backward`; torch.compile sees two opaque ops that do the same. Double backward, everywhere,
differentiates the reference formula.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, reference
from .kernels import backward as triton_backward
from .kernels import forward as triton_forward
from .kernels import launch
from .kernels.launch import Needs, Options, Weights


class Path(NamedTuple):
    """Which implementation runs, and why."""

    name: str  # "triton", "cpu" or "reference"
    reason: str


_GPU = Path("triton", "the tensors are on a GPU")
_INTERPRETER = Path("triton", "TRITON_INTERPRET=1 runs the kernels on the CPU")
_CPU = Path("cpu", "the tensors are on the CPU")
_CPU_SMALL = Path("cpu", "the tensors are on the CPU; x is small, so autograd records plain PyTorch calls")
_FUNC = Path("reference", "a torch.func or forward-mode transform is active")

# On the CPU a Python autograd.Function costs about 30 µs a call, which fewer elements of x do not earn back.
SMALL = 1 << 18


def choose_path(x: Tensor, w_down: Tensor) -> Path:
    """The path of a call with x [..., D] and w_down [R, D].

    Raises RuntimeError if the environment variable ADAPTER_OPS_REQUIRE names another path.
    """
    path = _choose(x, w_down)
    required = os.environ.get("ADAPTER_OPS_REQUIRE")
    if required and required != path.name:
        raise RuntimeError(
            f"ADAPTER_OPS_REQUIRE={required}, but this call would take the path {path.name!r}: {path.reason}"
        )
    return path


def _choose(x: Tensor, w_down: Tensor) -> Path:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _FUNC
    kind = x.device.type
    if kind == "cpu" and not launch.INTERPRETED:
        return _CPU_SMALL if torch.is_grad_enabled() and x.numel() < SMALL else _CPU
    if kind not in ("cpu", "cuda"):
        return Path("reference", f"no kernels for device type {kind!r}")
    if w_down.numel() >= 1 << 31:
        return Path("reference", f"a weight {list(w_down.shape)} has more elements than the kernels address, 2^31 - 1")
    if launch.INTERPRETED:
        return _INTERPRETER
    if x.dtype == torch.float64:
        return Path("reference", "float64 has no GPU kernel")
    if torch.version.cuda and launch.facts(x.device).capability < (8, 0):
        return Path("reference", f"compute capability {launch.facts(x.device).capability} is under (8, 0)")
    return _GPU


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on, else x's."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def adapter(x: Tensor, residual: Tensor | None, weights: Weights, activation: str, scale: float) -> Tensor:
    """`functional.bottleneck_adapter` without its checks."""
    options = Options(activation, scale, compute_dtype(x))
    if torch.compiler.is_compiling():
        return forward_op(x, residual, *weights, *options, torch.is_grad_enabled())[0]
    path = choose_path(x, weights.w_down)
    if path.name == "reference" or path is _CPU_SMALL:
        return _reference(x, residual, weights, options)
    if torch.is_grad_enabled():
        return AdapterFunction.apply(x, residual, *weights, options, path)
    return _forward(x, residual, weights, options, False, path)[0]


def _reference(x: Tensor, residual: Tensor | None, weights: Weights, options: Options) -> Tensor:
    w_down, b_down, w_up, b_up, scale = weights
    return reference.bottleneck_adapter(
        x,
        w_down,
        b_down,
        w_up,
        b_up,
        activation=options.activation,
        scale=options.scale if scale is None else scale,
        residual=residual,
        compute_dtype=options.dtype,
    )


def _rows(t: Tensor) -> Tensor:
    """t [..., D] as [M, D] with a dense last dimension; a view wherever one exists.

    A tile of 128 rows is addressed in 32 bits, so rows further apart than 2^24 elements are copied together.
    """
    if t.dim() != 2:
        t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 and t.stride(0) < 1 << 24 else t.contiguous()


def _dense(weights: Weights) -> Weights:
    """The kernels and oneDNN take no strides of parameters; oneDNN reads a strided bias as if it were dense."""
    dense: Any = (None if t is None else t.contiguous() for t in weights)
    return Weights(*dense)


def _forward(
    x: Tensor, residual: Tensor | None, weights: Weights, options: Options, save_z: bool, path: Path
) -> tuple[Tensor, Tensor | None]:
    rows, weights = _rows(x), _dense(weights)
    run = triton_forward.forward if path.name == "triton" else cpu.forward
    y, z = run(rows, rows if residual is None else _rows(residual), weights, options, save_z)
    return y.view(x.shape), z


def _backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weights: Weights,
    options: Options,
    needs: Needs,
    residual_is_x: bool,
    path: Path,
) -> list[Tensor | None]:
    run = triton_backward.backward if path.name == "triton" else cpu.backward
    dx, *rest = run(_rows(dy), _rows(x), z, _dense(weights), options, needs, residual_is_x)
    return [None if dx is None else dx.view(x.shape), *rest]


def _double_backward(
    dy: Tensor, x: Tensor, weights: Weights, options: Options, needs: Needs, residual_is_x: bool
) -> list[Tensor | None]:
    """The six gradients once more, as differentiable functions of dy, x and the parameters."""
    # New nodes, so that a gradient stops here: x may depend on the parameters, and two of these may be one tensor.
    views: Any = [None if t is None else t.view_as(t) for t in (x, *weights)]
    x, weights = views[0], Weights(*views[1:])
    # dy reaches x through the residual only where the residual is x.
    y = _reference(x, None if residual_is_x else torch.zeros_like(x), weights, options)
    wanted = [t for t, need in zip((x, *weights), needs) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True) if wanted else ())
    return [next(found) if need else None for need in needs]


class AdapterFunction(torch.autograd.Function):
    """y = residual + scale · (act(x · W_downᵀ + b_down) · W_upᵀ + b_up); x and z are saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        *parameters, options, path = rest
        weights = Weights(*parameters)
        y, z = _forward(x, residual, weights, options, any(ctx.needs_input_grad), path)
        ctx.save_for_backward(x, z, *weights)
        ctx.options, ctx.path, ctx.residual_dtype = options, path, None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, functools.partial(_backward, path=ctx.path)), None, None


def _gradients(ctx: Any, dy: Tensor, first_order: Callable[..., list[Tensor | None]]) -> list[Tensor | None]:
    """Gradients of x, the residual and the five weights, from what a context saved."""
    need_x, need_residual, *need_weights = ctx.needs_input_grad[:7]
    needs, residual_is_x = Needs(need_x, *need_weights), ctx.residual_dtype is None
    x, z, *parameters = ctx.saved_tensors
    weights = Weights(*parameters)
    if torch.is_grad_enabled():
        dx, *rest = _double_backward(dy, x, weights, ctx.options, needs, residual_is_x)
    else:
        dx, *rest = first_order(dy, x, z, weights, ctx.options, needs, residual_is_x)
    return [dx, dy.to(ctx.residual_dtype) if need_residual else None, *rest]


@torch.library.custom_op("adapter_ops::forward", mutates_args=())
def forward_op(
    x: Tensor,
    residual: Optional[Tensor],
    w_down: Tensor,
    b_down: Optional[Tensor],
    w_up: Tensor,
    b_up: Optional[Tensor],
    scale_tensor: Optional[Tensor],
    activation: str,
    scale: float,
    dtype: torch.dtype,
    save_z: bool,
) -> tuple[Tensor, Tensor]:
    """y and z (empty unless `save_z`). The path is chosen when the op runs, not when it is traced."""
    weights = Weights(w_down, b_down, w_up, b_up, scale_tensor)
    y, z = _forward(x, residual, weights, Options(activation, scale, dtype), save_z, _op_path(x, w_down))
    return y, x.new_empty(0, dtype=dtype) if z is None else z


@forward_op.register_fake
def _(x, residual, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, save_z):
    y_dtype = torch.promote_types(x.dtype if residual is None else residual.dtype, dtype)
    z_shape = (x.numel() // x.shape[-1], w_down.shape[0]) if save_z else (0,)
    return x.new_empty(x.shape, dtype=y_dtype), x.new_empty(z_shape, dtype=dtype)


@torch.library.custom_op("adapter_ops::backward", mutates_args=())
def backward_op(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    w_down: Tensor,
    b_down: Optional[Tensor],
    w_up: Tensor,
    b_up: Optional[Tensor],
    scale_tensor: Optional[Tensor],
    activation: str,
    scale: float,
    dtype: torch.dtype,
    needs: list[bool],
    residual_is_x: bool,
) -> list[Tensor]:
    """The gradients asked for, in the order of `Needs`, without the gaps."""
    weights, options = Weights(w_down, b_down, w_up, b_up, scale_tensor), Options(activation, scale, dtype)
    path = _op_path(x, w_down)
    gradients = _backward(dy, x, z, weights, options, Needs(*needs), residual_is_x, path)
    return [t for t in gradients if t is not None]


@backward_op.register_fake
def _(dy, x, z, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, needs, residual_is_x):
    inputs = (x, w_down, b_down, w_up, b_up, scale_tensor)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs) if need]


def _op_path(x: Tensor, w_down: Tensor) -> Path:
    """Inside an op there is no autograd to fall back on: what would be the reference is ATen."""
    path = choose_path(x, w_down)
    return _CPU if path.name == "reference" else path


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, *rest = inputs
    ctx.save_for_backward(x, output[1], *rest[:5])
    ctx.options, ctx.residual_dtype = Options(*rest[5:8]), None if residual is None else residual.dtype


def _op_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    def first_order(dy, x, z, weights, options, needs, residual_is_x):
        found = iter(backward_op(dy, x, z, *weights, *options, list(needs), residual_is_x))
        return [next(found) if need else None for need in needs]

    return *_gradients(ctx, dy, first_order), None, None, None, None


forward_op.register_autograd(_op_backward, setup_context=_setup_context)
