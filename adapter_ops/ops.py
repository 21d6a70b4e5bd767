"""AdapterFunction, the torch.library ops, and the way from a call to its backend.

Arguments are taken as checked (`functional.py` does that). Eager calls go through AdapterFunction straight to a
backend's forward and backward; torch.compile and torch.export see two opaque ops that do the same. Double backward,
everywhere, differentiates the reference formula.
"""

import logging
import math
import os
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import backend, reference
from .backend import Backend, compute_dtype, is_batch, is_refused, obstacle, ordinary, require, transformed
from .calls import CPUCalls, KernelCalls, rows
from .kernels.activations import find_activation
from .kernels.problem import UNTUNED, Needs, Options, Tuning, Weights
from .kinds import Kinds, present, settings_of

# A call of x, residual and the five weights, without any check, and the name of its backend.
Run = Callable[..., Tensor]
RUNS: Kinds[tuple[Run, str]] = Kinds()  # of eager calls
OP_CALLS: Kinds[tuple[CPUCalls | KernelCalls, str]] = Kinds()  # of the ops that torch.compile and torch.export see
logger = logging.getLogger(__package__)
_told: dict[Hashable, object] = {}  # what was logged, so that it is logged once
_grad_enabled, _strided = torch.is_grad_enabled, torch.strided
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def known(
    x: Tensor,
    residual: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    scale: Any,
    activation: str,
) -> Tensor | None:
    """The adapter, if a call like this one was checked before; else None, and nothing is done."""
    if residual is x:
        residual = None
    try:
        if not ordinary(x):
            return None
        factor = None if scale.__class__ is float else as_tensor(scale)
        settings = settings_of(x, residual, b_down, b_up, scale, activation)
        tensors: tuple[Any, ...] = x, w_down, b_down, w_up, b_up
        if residual is not None or factor is not None or b_down is None or b_up is None:
            tensors = present((x, residual, w_down, b_down, w_up, b_up, factor))
        found = RUNS.find(settings, tensors)
    except (AttributeError, RuntimeError, TypeError):  # the checks find what is wrong
        return None
    if found is None or is_refused(found[1]):
        return None
    return found[0](x, residual, w_down, b_down, w_up, b_up, factor)


def as_tensor(scale: Any) -> Tensor | None:
    """The scale where it is a tensor."""
    return scale if isinstance(scale, Tensor) else None


def adapter(
    x: Tensor,
    residual: Tensor | None,
    weights: Weights,
    activation: str,
    scale: float,
    tuning: Tuning = UNTUNED,
) -> Tensor:
    """`functional.bottleneck_adapter` without its checks.

    The way that an ordinary call takes is kept for others like it. `tuning` is what a test or a benchmark asks for.
    """
    options = Options(activation, scale, compute_dtype(x))
    if residual is x:
        residual = None
    found = obstacle(x, residual, *weights)
    ordinary_call = found is None
    if found is None:
        if torch.compiler.is_compiling():
            # An exported program leaves the choice to the op, which makes it where the program runs.
            exporting = torch.compiler.is_exporting()
            if x.is_cuda and not exporting and not backend.may_run_kernels(x, weights.w_down, options):
                tell_traced(x.device, options.dtype)
                return _reference(options)(x, residual, *weights)
            return forward_op(x, residual, *weights, *options, torch.is_grad_enabled())[0]
        # A tensor that has left the torch.func transform it belonged to is a wrapper without memory of its own.
        x, residual, *parameters = unwrap_dead_wrappers((x, residual, *weights))
        weights = Weights(*parameters)
        shaped = rows(x), None if residual is None else rows(residual)
        found = backend.choose(*shaped, weights, options, tuning)
    require(found)
    tell(found, x, weights.w_down, options.dtype)
    run = _run(found, x, options, tuning)
    if ordinary_call and tuning is UNTUNED:
        given = scale if weights.scale is None else weights.scale
        settings = settings_of(x, residual, weights.b_down, weights.b_up, given, activation)
        RUNS.keep(settings, present((x, residual, *weights)), (run, found.name))
    return run(x, residual, *weights)


def tell(found: Backend, x: Tensor, w_down: Tensor, dtype: torch.dtype) -> None:
    """Logs which backend runs adapters of these sizes, and why: once, and as a warning where a GPU's kernels do not.

    Only calls of a new kind come here. While a call is traced nothing runs yet, and its sizes may be no numbers.
    """
    if torch.compiler.is_compiling() or not all(type(size) is int for size in w_down.shape):
        return
    (*tasks, R, D), fallback = w_down.shape, x.is_cuda and found.name != "triton"
    what = "A batch of several tasks" if tasks else "An adapter"
    takes = "falls back from the kernels to" if fallback else "takes"
    _log_once(
        logging.WARNING if fallback else logging.INFO,
        (x.device, dtype, D, R, found.name, what),
        f"{what} with D={D} and R={R} {takes} the backend {found.name!r} for {dtype} on {x.device}: {found.reason}",
    )


def tell_traced(device: torch.device, dtype: torch.dtype) -> None:
    """`tell` of a call that torch.compile traces, whose sizes may be symbols."""
    reason = "no kernel was measured to be faster at its sizes"
    text = f"torch.compile takes PyTorch's own operations for an adapter in {dtype} on {device}: {reason}"
    _log_once(logging.WARNING, (device, dtype, "compiled"), text)


tell_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called while it is traced


def _log_once(level: int, key: Hashable, text: str) -> None:
    mine = object()
    if logger.isEnabledFor(level) and _told.setdefault(key, mine) is mine:
        logger.log(level, "%s. This is logged once; adapter_ops.explain answers for each call.", text)


def _run(found: Backend, x: Tensor, options: Options, tuning: Tuning) -> Run:
    """The way of a call through a backend. It is the same for all calls of a kind (kinds.py)."""
    if found.name == "reference":
        return _reference(options)
    calls = _calls(found, x, options, tuning)
    first = calls.forward

    def train(x, residual, w_down, b_down, w_up, b_up, scale):
        return _apply(x, residual, w_down, b_down, w_up, b_up, scale, calls)

    def infer(*inputs):
        return first(inputs, False)[0]

    return train if torch.is_grad_enabled() else infer


def _calls(found: Backend, x: Tensor, options: Options, tuning: Tuning = UNTUNED) -> CPUCalls | KernelCalls:
    if found.name != "triton":
        return CPUCalls(options)
    calls = KernelCalls(options, backend.plan.target(x.device), tuning)
    if found.plan:
        calls.plans[found.plan.problem] = found.plan
    return calls


def _reference(options: Options) -> Run:
    formula, eager, number, dtype = (
        reference.formula,
        find_activation(options.activation).eager,
        options.scale,
        options.dtype,
    )

    def run(x, residual, w_down, b_down, w_up, b_up, scale):
        return formula(x, residual, w_down, b_down, w_up, b_up, number if scale is None else scale, eager, dtype)

    return run


class AdapterFunction(torch.autograd.Function):
    """y = residual + scale · (act(x · W_downᵀ + b_down) · W_upᵀ + b_up); x and z are saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        *weights, calls = rest
        y, z = calls.forward((x, residual, *weights), any(ctx.needs_input_grad))
        ctx.save_for_backward(x, z, *weights)
        ctx.calls, ctx.residual_dtype = calls, None if residual is None else residual.dtype
        # Hooks may bring back other tensors than those that are saved here.
        ctx.hooked = _saved_tensors_hooks(False) is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plain = dy.__class__ is Tensor and dy.layout is _strided and ordinary(dy)
        if _grad_enabled() or not (plain or obstacle(dy) is None):
            return *_gradients(ctx, ctx.calls.options, dy, reference.gradients), None
        x, z, *weights = ctx.saved_tensors
        need_x, need_residual, w_down, b_down, w_up, b_up, scale, _ = ctx.needs_input_grad
        residual_dtype = ctx.residual_dtype
        needs = (need_x, w_down, b_down, w_up, b_up, scale)
        dx, *rest = ctx.calls.backward(dy, x, z, weights, needs, residual_dtype is None, ctx.hooked)
        return dx, dy.to(residual_dtype) if need_residual else None, *rest, None


# `Function.apply` looks for torch.func transforms, which `ordinary` and `obstacle` have done, before it calls this.
_apply: Any = super(torch.autograd.Function, AdapterFunction).apply


def _gradients(
    ctx: Any, options: Options, dy: Tensor, first_order: Callable[..., list[Tensor | None]]
) -> list[Tensor | None]:
    """Gradients of x, the residual and the five weights, from what a context saved."""
    need_x, need_residual, *need_weights = ctx.needs_input_grad[:7]
    needs, residual_is_x = Needs(need_x, *need_weights), ctx.residual_dtype is None
    x, z, *parameters = ctx.saved_tensors
    weights = Weights(*parameters)
    if torch.is_grad_enabled():
        z = reference.pre_activation(x, weights, options.dtype)  # once more, as a function of x and the parameters
        dx, *rest = reference.gradients(dy, x, z, weights, options, needs, residual_is_x)
    else:
        dx, *rest = first_order(dy, x, z, weights, options, needs, residual_is_x)
    return [dx, dy.to(ctx.residual_dtype) if need_residual else None, *rest]


# `torch.library.custom_op` would check each call for aliases, which takes longer than a launch.
WEIGHTS_SCHEMA = "Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? scale_tensor"
OPTIONS_SCHEMA = "str activation, float scale, ScalarType dtype"
_library = torch.library.Library("adapter_ops", "DEF")
_library.define(
    f"forward(Tensor x, Tensor? residual, {WEIGHTS_SCHEMA}, {OPTIONS_SCHEMA}, bool save_z) -> (Tensor, Tensor)"
)
_library.define(
    f"backward(Tensor dy, Tensor x, Tensor z, {WEIGHTS_SCHEMA}, {OPTIONS_SCHEMA}, "
    "bool[] needs, bool residual_is_x) -> Tensor[]"
)
forward_op = torch.ops.adapter_ops.forward.default
backward_op = torch.ops.adapter_ops.backward.default


def _forward(
    x, residual, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, save_z
) -> tuple[Tensor, Tensor]:
    """y and z (empty unless `save_z`)."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "an exported adapter has no forward-mode derivative: call the adapter itself, or decompose the exported "
            "program by program.run_decompositions(torch._decomp.get_decompositions([torch.ops.adapter_ops.forward]))"
        )
    weights = Weights(w_down, b_down, w_up, b_up, scale_tensor)
    calls = op_calls(x, residual, weights, Options(activation, scale, dtype))
    y, z = calls.forward((x, residual, *weights), save_z)
    return y, x.new_empty(0, dtype=dtype) if z is None else z


_library.impl("forward", _forward, "CompositeExplicitAutograd")


@torch.library.register_fake("adapter_ops::forward", lib=_library)
def _fake_forward(x, residual, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, save_z):
    if os.getenv("CI"):
        # Where this variable is set, Inductor takes an op that has a decomposition for a mistake of its own, unless
        # this list has the op. A compiled call comes through here before Inductor lowers it.
        from torch._inductor.lowering import FALLBACK_ALLOW_LIST

        FALLBACK_ALLOW_LIST.add("adapter_ops::forward")
    y_dtype = torch.promote_types(x.dtype if residual is None else residual.dtype, dtype)
    z_shape = (x.numel() // x.shape[-1], w_down.shape[0]) if save_z else (0,)
    return x.new_empty(x.shape, dtype=y_dtype), x.new_empty(z_shape, dtype=dtype)


def _backward(
    dy, x, z, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, needs, residual_is_x
) -> list[Tensor]:
    """The gradients asked for, in the order of `Needs`, without the gaps."""
    weights, options = Weights(w_down, b_down, w_up, b_up, scale_tensor), Options(activation, scale, dtype)
    calls = op_calls(x, None if residual_is_x else dy, weights, options)
    gradients = calls.backward(dy, x, z, weights, needs, residual_is_x)
    return [t for t in gradients if t is not None]


_library.impl("backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("adapter_ops::backward", lib=_library)
def _(dy, x, z, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, needs, residual_is_x):
    inputs = (x, w_down, b_down, w_up, b_up, scale_tensor)
    return [t.new_empty(t.shape) for t, need in zip(inputs, needs) if need]


def op_calls(x: Tensor, residual: Tensor | None, weights: Weights, options: Options) -> CPUCalls | KernelCalls:
    """The calls of an op, also of the grouped ones. The backend is chosen when the op runs, not when it is traced.

    Inside an op there is no autograd to fall back on: what would be the reference is ATen.
    """
    given = options.scale if weights.scale is None else weights.scale
    settings = settings_of(x, residual, weights.b_down, weights.b_up, given, options.activation), options
    tensors = present((x, residual, *weights))
    known_calls = OP_CALLS.find(settings, tensors)
    if known_calls is None or is_refused(known_calls[1]):
        shaped = rows(x), None if residual is None else rows(residual)
        found = backend.choose(*shaped, weights, options)
        require(found)
        tell(found, x, weights.w_down, options.dtype)
        known_calls = _calls(found, x, options), found.name
        OP_CALLS.keep(settings, tensors, known_calls)
    return known_calls[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, *rest = inputs
    ctx.save_for_backward(x, output[1], *rest[:5])
    ctx.options, ctx.residual_dtype = Options(*rest[5:8]), None if residual is None else residual.dtype


def _op_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    def kernels(dy, x, z, weights, options, needs, residual_is_x):
        found = iter(backward_op(dy, x, z, *weights, *options, list(needs), residual_is_x))
        return [next(found) if need else None for need in needs]

    # Not `obstacle`: tracers, dispatch modes and fake tensors know the op.
    first_order = reference.gradients if transformed() or is_batch(dy) else kernels
    return *_gradients(ctx, ctx.options, dy, first_order), None, None, None, None


torch.library.register_autograd("adapter_ops::forward", _op_backward, setup_context=_setup_context, lib=_library)


@register_decomposition(torch.ops.adapter_ops.forward.default)
def _formula(
    x, residual, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, save_z
) -> tuple[Tensor, Tensor]:
    """`forward_op` in PyTorch's own operations, for exporters to formats that know none of our ops, such as ONNX.

    torch.compile takes no decomposition from this table.
    """
    weights = Weights(w_down, b_down, w_up, b_up, scale_tensor)
    y = _reference(Options(activation, scale, dtype))(x, residual, *weights).contiguous()
    return y, reference.pre_activation(x, weights, dtype) if save_z else x.new_empty(0, dtype=dtype)


# Where sizes are symbolic, a FakeTensor would go through the decomposition, if the table of metas had no entry.
register_decomposition(torch.ops.adapter_ops.forward.default, type="meta")(_fake_forward)


@torch.library.register_vmap("adapter_ops::forward", lib=_library)
def _(info, in_dims, *arguments):
    return torch.vmap(_formula, in_dims)(*arguments), (0, 0)


def _backward_formula(
    dy, x, z, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, needs, residual_is_x
) -> list[Tensor]:
    """`backward_op` in PyTorch's own operations."""
    weights, options = Weights(w_down, b_down, w_up, b_up, scale_tensor), Options(activation, scale, dtype)
    found = reference.gradients(dy, x, z, weights, options, Needs(*needs), residual_is_x)
    return [t for t in found if t is not None]


@torch.library.register_vmap("adapter_ops::backward", lib=_library)
def _(info, in_dims, *arguments):
    tensors, rest = arguments[:8], arguments[8:]
    found = torch.vmap(lambda *tensors: _backward_formula(*tensors, *rest), in_dims[:8])(*tensors)
    return found, [0] * len(found)


# torch.autograd.grad with is_grads_batched=True, through the backward of a compiled model: a vmap of its own kind.
_library.impl("backward", _backward_formula, "Batched")


@register_flop_formula(torch.ops.adapter_ops.forward)
def _(x_shape, residual_shape, w_down_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * product_flops(x_shape, w_down_shape)


@register_flop_formula(torch.ops.adapter_ops.backward)
def _(dy_shape, x_shape, z_shape, w_down_shape, *args, out_shape=None, **kwargs) -> int:
    return backward_products(Needs(*args[-2])) * product_flops(x_shape, w_down_shape)


def backward_products(needs: Needs) -> int:
    """How many products of the size of forward's the gradients take."""
    dh = needs.x or needs.w_down or needs.b_down
    return dh + needs.x + needs.w_down + (needs.w_up or needs.scale)


def product_flops(x_shape, w_down_shape) -> int:
    """Of each of the products, all of which have M · D · R terms."""
    return 2 * math.prod(x_shape[:-1]) * math.prod(w_down_shape)
