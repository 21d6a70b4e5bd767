"""AdapterFunction, the torch.library ops, and the choice of path.

Arguments are taken as checked (`functional.py` does that). Eager calls go through AdapterFunction straight to a path's
`forward` and `backward`; torch.compile and torch.export see two opaque ops that do the same. `_obstacle` is the one
place that sends a call to the reference formula because of how it is called. Double backward, everywhere,
differentiates the reference formula.
"""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import cpu, reference
from .kernels import backward as triton_backward
from .kernels import forward as triton_forward
from .kernels import launch
from .kernels.launch import Needs, Options, Weights

_NAMES = ("triton", "cpu", "reference")


class Path(NamedTuple):
    """Which implementation runs, and why."""

    name: str  # one of _NAMES
    reason: str


_GPU = Path("triton", "the tensors are on a GPU")
_INTERPRETER = Path("triton", "TRITON_INTERPRET=1 runs the kernels on the CPU")
_CPU = Path("cpu", "the tensors are on the CPU")
_CPU_SMALL = Path("cpu", "the tensors are on the CPU; x is small, so autograd records plain PyTorch calls")
_FUNC = Path("reference", "a torch.func or forward-mode transform is active")
_TRACE = Path("reference", "torch.jit.trace records PyTorch's own operations")
_MODE = Path("reference", "a torch dispatch mode is active, and has to see PyTorch's own operations")

# On the CPU a Python autograd.Function costs about 30 µs a call, which fewer elements of x do not earn back.
SMALL = 1 << 18

# The types whose memory the kernels may read and write. torch.export (without strict) runs this code with FakeTensors.
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_PLAIN_IN_EXPORT = _PLAIN | {FakeTensor}


def find_path(x: Tensor, w_down: Tensor) -> Path:
    """The path of a call with x [..., D] and w_down [R, D], whatever ADAPTER_OPS_REQUIRE says."""
    return _obstacle(x, w_down) or choose_path(x, w_down)


def _transform() -> Path | None:
    """The reference path while torch.func or forward-mode differentiation is at work, else None."""
    return _FUNC if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 else None


# Whether a tensor is a batch of torch.autograd.grad with is_grads_batched=True, which does not use torch.func.
_is_batch = torch._C._functorch.is_legacy_batchedtensor


def _obstacle(x: Tensor, *others: Tensor | None) -> Path | None:
    """The reference path where a call has to be made of PyTorch's own operations, else None.

    Eager calls, compiled calls, backward and `explain` all ask here. A kernel reads memory through a pointer, so it
    would pass by whatever stands between PyTorch's operations and memory: a transform, a tracer, a dispatch mode, or a
    tensor that is more than a dense array.
    """
    path = _transform()
    if path is not None:
        return path
    types = _PLAIN
    if torch.compiler.is_compiling():
        types = _PLAIN_IN_EXPORT
    elif torch._C._get_tracing_state() is not None:
        return _TRACE
    elif torch._C._len_torch_dispatch_stack():
        return _MODE
    elif _is_batch(x):
        return _FUNC
    for t in (x, *others):
        if t is not None and (type(t) not in types or t.layout is not torch.strided):
            kind = type(t).__name__ if type(t) not in types else str(t.layout)
            return Path("reference", f"an operand is a {kind}, not a plain dense tensor")
    # Of the others only the residual can be nested, and it has the shape of x.
    if x.is_nested:
        return Path("reference", "x is a nested tensor")
    return None


def _require(path: Path) -> None:
    """Raises RuntimeError if the environment variable ADAPTER_OPS_REQUIRE names another path, or none."""
    required = os.environ.get("ADAPTER_OPS_REQUIRE")
    if not required or required == path.name:
        return
    if required not in _NAMES:
        raise RuntimeError(f"ADAPTER_OPS_REQUIRE={required} names no path; known: {', '.join(_NAMES)}")
    raise RuntimeError(
        f"ADAPTER_OPS_REQUIRE={required}, but this call would take the path {path.name!r}: {path.reason}"
    )


def choose_path(x: Tensor, w_down: Tensor) -> Path:
    """The path of a call that meets no obstacle: a matter of device, dtype and size."""
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
    path = _obstacle(x, residual, *weights)
    if path is None:
        if torch.compiler.is_compiling():
            return forward_op(x, residual, *weights, *options, torch.is_grad_enabled())[0]
        path = choose_path(x, weights.w_down)
    _require(path)
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

    Rows may overlap. A tile of 128 rows is addressed in 32 bits, so rows further apart than 2^24 elements are copied
    together.
    """
    if t.dim() != 2:
        t = t.reshape(-1, t.shape[-1])
    if t.is_contiguous():
        return t
    row, column = t.stride()
    return t if column == 1 and row < 1 << 24 else t.contiguous()


def _dense(weights: Weights) -> Weights:
    """The kernels and oneDNN take no strides of parameters; oneDNN reads a strided bias as if it were dense."""
    w_down, b_down, w_up, b_up, scale = weights
    return Weights(
        w_down.contiguous(),
        None if b_down is None else b_down.contiguous(),
        w_up.contiguous(),
        None if b_up is None else b_up.contiguous(),
        None if scale is None else scale.contiguous(),
    )


def _forward(
    x: Tensor, residual: Tensor | None, weights: Weights, options: Options, save_z: bool, path: Path
) -> tuple[Tensor, Tensor | None]:
    rows, weights = _rows(x), _dense(weights)
    run = triton_forward.forward if path.name == "triton" else cpu.forward
    y, z = run(rows, rows if residual is None else _rows(residual), weights, options, save_z)
    if x.dim() != 2:
        y.resize_(x.shape)  # autograd lets nobody write into a view that was made inside of a Function
    return y, z


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
        kernels = functools.partial(_backward, path=ctx.path) if _obstacle(dy) is None else reference.gradients
        return *_gradients(ctx, dy, kernels), None, None


def _gradients(ctx: Any, dy: Tensor, first_order: Callable[..., list[Tensor | None]]) -> list[Tensor | None]:
    """Gradients of x, the residual and the five weights, from what a context saved."""
    need_x, need_residual, *need_weights = ctx.needs_input_grad[:7]
    needs, residual_is_x = Needs(need_x, *need_weights), ctx.residual_dtype is None
    x, z, *parameters = ctx.saved_tensors
    weights = Weights(*parameters)
    if torch.is_grad_enabled():
        z = reference.pre_activation(x, weights, ctx.options.dtype)  # once more, as a function of x and the parameters
        dx, *rest = reference.gradients(dy, x, z, weights, ctx.options, needs, residual_is_x)
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
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "an exported adapter has no forward-mode derivative: call the adapter itself, or decompose the exported "
            "program by program.run_decompositions(torch._decomp.get_decompositions([torch.ops.adapter_ops.forward]))"
        )
    weights = Weights(w_down, b_down, w_up, b_up, scale_tensor)
    y, z = _forward(x, residual, weights, Options(activation, scale, dtype), save_z, _op_path(x, w_down))
    return y, x.new_empty(0, dtype=dtype) if z is None else z


@forward_op.register_fake
def _fake_forward(x, residual, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, save_z):
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
    _require(path)
    return _CPU if path.name == "reference" else path


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, *rest = inputs
    ctx.save_for_backward(x, output[1], *rest[:5])
    ctx.options, ctx.residual_dtype = Options(*rest[5:8]), None if residual is None else residual.dtype


def _op_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    def kernels(dy, x, z, weights, options, needs, residual_is_x):
        found = iter(backward_op(dy, x, z, *weights, *options, list(needs), residual_is_x))
        return [next(found) if need else None for need in needs]

    # Not `_obstacle`: tracers, dispatch modes and fake tensors know the op.
    first_order = reference.gradients if _transform() or _is_batch(dy) else kernels
    return *_gradients(ctx, dy, first_order), None, None, None, None


forward_op.register_autograd(_op_backward, setup_context=_setup_context)


@register_decomposition(torch.ops.adapter_ops.forward.default)
def _formula(
    x, residual, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, save_z
) -> tuple[Tensor, Tensor]:
    """`forward_op` in PyTorch's own operations, for exporters to formats that know none of our ops, such as ONNX.

    torch.compile takes no decomposition from this table.
    """
    weights = Weights(w_down, b_down, w_up, b_up, scale_tensor)
    y = _reference(x, residual, weights, Options(activation, scale, dtype)).contiguous()
    return y, reference.pre_activation(x, weights, dtype) if save_z else x.new_empty(0, dtype=dtype)


# Where sizes are symbolic, a FakeTensor would go through the decomposition, if the table of metas had no entry.
register_decomposition(torch.ops.adapter_ops.forward.default, type="meta")(_fake_forward)


@forward_op.register_vmap
def _(info, in_dims, *arguments):
    return torch.vmap(_formula, in_dims)(*arguments), (0, 0)


def _backward_formula(
    dy, x, z, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, needs, residual_is_x
) -> list[Tensor]:
    """`backward_op` in PyTorch's own operations."""
    weights, options = Weights(w_down, b_down, w_up, b_up, scale_tensor), Options(activation, scale, dtype)
    found = reference.gradients(dy, x, z, weights, options, Needs(*needs), residual_is_x)
    return [t for t in found if t is not None]


@backward_op.register_vmap
def _(info, in_dims, *arguments):
    tensors, rest = arguments[:8], arguments[8:]
    found = torch.vmap(lambda *tensors: _backward_formula(*tensors, *rest), in_dims[:8])(*tensors)
    return found, [0] * len(found)


# torch.autograd.grad with is_grads_batched=True, through the backward of a compiled model: a vmap of its own kind.
_library = torch.library.Library("adapter_ops", "FRAGMENT")
_library.impl("backward", _backward_formula, "Batched")


@register_flop_formula(torch.ops.adapter_ops.forward)
def _(x_shape, residual_shape, w_down_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _product_flops(x_shape, w_down_shape)


@register_flop_formula(torch.ops.adapter_ops.backward)
def _(dy_shape, x_shape, z_shape, w_down_shape, *args, out_shape=None, **kwargs) -> int:
    needs = Needs(*args[-2])
    dh = needs.x or needs.w_down or needs.b_down
    return (dh + needs.x + needs.w_down + (needs.w_up or needs.scale)) * _product_flops(x_shape, w_down_shape)


def _product_flops(x_shape, w_down_shape) -> int:
    """Of each of the products, all of which have M · D · R terms."""
    return 2 * math.prod(x_shape[:-1]) * math.prod(w_down_shape)
