"""Adapters of many tasks in one batch: every row runs the adapter of its own task.

    y[m] = residual[m] + scale[t] · (act(x[m] · W_down[t]ᵀ + b_down[t]) · W_up[t]ᵀ + b_up[t])      t = task_ids[m]

Rows are sorted by task. On the CPU tasks of few rows share batched products, and a task of many rows goes through the
single adapter, as for many rows on a GPU without kernels. The kernels take rows in tiles of one task. Where neither
can be done the formula runs in PyTorch's own operations, which gather the weights of every row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import grouped_cpu
from .backend import INTERPRETED, Backend, compute_dtype, may_run_kernels, obstacle, require, transformed
from .calls import KernelCalls
from .functional import DTYPES, finite_scale
from .kernels.activations import find_activation
from .kernels.problem import Needs, Options, Weights
from .ops import OPTIONS_SCHEMA, WEIGHTS_SCHEMA, backward_products, op_calls, product_flops, tell, tell_traced

# M · R · D, the elements of the weights of every row, up to which they are gathered on a GPU.
_GATHERED = 1 << 26
_CPU = Backend("cpu", "tensors are on the CPU: rows are sorted by task, and oneDNN and ATen add in place")


def grouped_bottleneck_adapter(
    x: Tensor,
    task_ids: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    *,
    activation: str = "gelu",
    scale: float | Tensor = 1.0,
    residual: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Bottleneck adapters of T tasks, each row with that of its own task:

        y[m] = residual[m] + scale[t] · (activation(x[m] · w_down[t]ᵀ + b_down[t]) · w_up[t]ᵀ + b_up[t])

    with t = task_ids[m].

    Each row has the result that `bottleneck_adapter` gives with the parameters of its task, and each task's parameters
    have the gradients of its rows. Rows may be in any order.

    Args:
        x: [..., D], fp16, bf16, fp32 or fp64.
        task_ids: int32 or int64, on the device of x; the leading dimensions of x, all of them ([...], a task for each
            row) or the first few ([batch], a task for each sequence). From 0 to T − 1; −1 leaves a row as it is in the
            residual.
        w_down, b_down: [T, R, D] and [T, R] or None.
        w_up, b_up: [T, D, R] and [T, D] or None. The four parameters share a dtype, as in `bottleneck_adapter`.
        activation: as in `bottleneck_adapter`.
        scale: a finite number, or a tensor [T] or [T, D], which then gets a gradient.
        residual: x's shape; x itself where None.
        sizes: integers [T], the bottleneck of each task where these differ: what parameters have beyond it is not read
            and gets zero gradients. Default: R for all.

    Returns:
        [..., D] in the dtype that `residual + nn.Linear(...)(...)` would have.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown activation, an infinite scale; on the CPU also an id
            or a size out of range. On a GPU an id out of range is a device-side assertion.
        TypeError: a dtype that is not one of those above, no tensor for a tensor, no number for the scale.

    On the CPU tasks of few rows are computed together, by batched products. No GPU has run the kernels yet, so there
    PyTorch's own operations run, unless ADAPTER_OPS_UNMEASURED=1 lets the kernels run. They gather the weights of every
    row where that takes up to 2^26 elements or the call is captured in a CUDA graph, and else do as on the CPU, which
    waits for the number of rows of each task. Gradients of gradients work everywhere.

    >>> x, ids = torch.randn(3, 7, 16), torch.tensor([1, 0, -1])  # three sequences
    >>> w_down, w_up = torch.randn(2, 4, 16), torch.randn(2, 16, 4)
    >>> y = grouped_bottleneck_adapter(x, ids, w_down, None, w_up, None)
    >>> torch.equal(y[2], x[2])
    True
    """
    find_activation(activation)
    _check(x, task_ids, w_down, b_down, w_up, b_up, scale, residual, sizes)
    number, scale_tensor = (1.0, scale) if isinstance(scale, Tensor) else (finite_scale(scale), None)
    ids = task_ids.reshape(*task_ids.shape, *[1] * (x.dim() - 1 - task_ids.dim())).expand(x.shape[:-1]).reshape(-1)
    if sizes is not None:
        _check_range("sizes", sizes, 0, w_down.shape[1])
        w_down, b_down, w_up = _cut(w_down, b_down, w_up, sizes)
    weights = Weights(w_down, b_down, w_up, b_up, scale_tensor)
    options = Options(activation, number, compute_dtype(x))
    if residual is x:
        residual = None
    found = obstacle(x, ids, residual, *weights)
    if found is not None:
        require(found)
        tell(found, x, w_down, options.dtype)
    elif _has_implementation(x, residual, weights, options):
        return forward_op(x, ids, residual, *weights, *options, torch.is_grad_enabled())[0]
    _check_range("task_ids", ids, -1, len(w_down) - 1)
    return formula(x, ids, residual, weights, options)


def _has_implementation(x: Tensor, residual: Tensor | None, weights: Weights, options: Options) -> bool:
    """Whether a call that meets no obstacle is left to the op, rather than to `formula`.

    Without a kernel the op takes `grouped_cpu`, which waits for the number of rows of each task, so that it cannot be
    captured in a CUDA graph, but needs no memory for the gathered weights.
    """
    if x.device.type == "cpu":
        return True
    large = x.is_cuda and x.numel() * weights.w_down.shape[1] > _GATHERED
    if not torch.compiler.is_compiling():
        if isinstance(op_calls(x, residual, weights, options), KernelCalls):
            return True
        return large and not torch.cuda.is_current_stream_capturing()
    # An exported program leaves the choice to the op, which makes it where the program runs.
    if not x.is_cuda or torch.compiler.is_exporting() or may_run_kernels(x, weights.w_down, options):
        return x.is_cuda
    tell_traced(x.device, options.dtype)
    return large


def formula(x: Tensor, task_ids: Tensor, residual: Tensor | None, weights: Weights, options: Options) -> Tensor:
    """The formula in PyTorch's own operations, for `task_ids` [M] of all rows of x [..., D]."""
    eager, dtype = find_activation(options.activation).eager, options.dtype
    serves, ids = (task_ids >= 0)[:, None], task_ids.clamp(min=0)
    w_down, b_down, w_up, b_up, scale = (None if t is None else t.index_select(0, ids) for t in weights)
    assert w_down is not None and w_up is not None
    x_rows = x.reshape(-1, x.shape[-1])
    # A row without a task may hold anything, also NaN, and has no part in the parameters' gradients.
    inner = torch.where(serves, x_rows, 0).to(dtype)
    z = torch.bmm(w_down.to(dtype), inner[:, :, None])[:, :, 0]
    z = z if b_down is None else z + b_down.to(dtype)
    u = torch.bmm(w_up.to(dtype), eager(z)[:, :, None])[:, :, 0]
    u = u if b_up is None else u + b_up.to(dtype)
    if scale is not None:
        u = (u * (scale if scale.dim() == 2 else scale[:, None])).to(u.dtype)
    elif options.scale != 1.0:
        u = u * options.scale
    added_to = x_rows if residual is None else residual.reshape(x_rows.shape)
    y = added_to + u
    return torch.where(serves, y, added_to.to(y.dtype)).reshape(x.shape)


def _cut(w_down: Tensor, b_down: Tensor | None, w_up: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The parameters with zeros beyond each task's own bottleneck."""
    valid = torch.arange(w_down.shape[1], device=sizes.device) < sizes[:, None]  # [T, R]
    cut = torch.where(valid[:, :, None], w_down, 0), torch.where(valid[:, None, :], w_up, 0)
    return cut[0], None if b_down is None else torch.where(valid, b_down, 0), cut[1]


def _check(
    x: Any,
    task_ids: Any,
    w_down: Any,
    b_down: Any,
    w_up: Any,
    b_up: Any,
    scale: Any,
    residual: Any,
    sizes: Any,
) -> None:
    needed = {"x": x, "task_ids": task_ids, "w_down": w_down, "w_up": w_up}
    parameters = {"w_down": w_down, "b_down": b_down, "w_up": w_up, "b_up": b_up}
    scale = scale if isinstance(scale, Tensor) else None
    tensors = needed | parameters | {"residual": residual, "scale": scale, "sizes": sizes}
    integers = (torch.int32, torch.int64)
    for name, t in tensors.items():
        if (t is None and name in needed) or (t is not None and not isinstance(t, Tensor)):
            raise TypeError(f"{name} must be a tensor, not {type(t).__name__}")
        known = integers if name in ("task_ids", "sizes") else DTYPES
        if t is not None and t.dtype not in known:
            raise TypeError(f"{name} has dtype {t.dtype}, expected one of {', '.join(sorted(map(str, known)))}")
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x is on {x.device}")
    if w_down.dim() != 3 or 0 in w_down.shape:
        raise ValueError(
            f"w_down has shape {tuple(w_down.shape)}, expected [tasks, bottleneck, hidden size], each at least 1"
        )
    T, R, D = w_down.shape
    if x.dim() < 2 or x.shape[-1] != D:
        raise ValueError(f"x has shape {tuple(x.shape)}, w_down {(T, R, D)} expects [..., {D}]")
    if not 1 <= task_ids.dim() < x.dim() or task_ids.shape != x.shape[: task_ids.dim()]:
        raise ValueError(
            f"task_ids has shape {tuple(task_ids.shape)}, expected the first dimensions of x, which has shape "
            f"{tuple(x.shape)}"
        )
    shapes = {"b_down": (T, R), "w_up": (T, D, R), "b_up": (T, D), "residual": tuple(x.shape), "sizes": (T,)}
    for name, shape in shapes.items():
        if tensors[name] is not None and tensors[name].shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}: w_down has shape {(T, R, D)}"
            )
    if scale is not None and scale.shape not in ((T,), (T, D)):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, expected {(T,)} or {(T, D)}")
    for name, t in parameters.items():
        if t is not None and t.dtype != w_down.dtype:
            raise TypeError(f"{name} has dtype {t.dtype}, w_down has {w_down.dtype}")


def _check_range(name: str, t: Tensor, low: int, high: int) -> None:
    """Raises ValueError for values out of range. On a GPU, where that would wait for the values, it asserts there."""
    if torch.compiler.is_compiling() or transformed() or type(t) is not Tensor or t.numel() == 0:
        return
    if t.is_cuda:
        torch._assert_async(((t >= low) & (t <= high)).all())
    elif t.device.type == "cpu":
        smallest, largest = t.min().item(), t.max().item()
        if smallest < low or largest > high:
            raise ValueError(f"{name} has values from {smallest} to {largest}, expected {low} to {high}")


_library = torch.library.Library("adapter_ops", "FRAGMENT")
_library.define(
    f"grouped_forward(Tensor x, Tensor task_ids, Tensor? residual, {WEIGHTS_SCHEMA}, {OPTIONS_SCHEMA}, bool save_z) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"grouped_backward(Tensor dy, Tensor x, Tensor z, Tensor order, Tensor counts, {WEIGHTS_SCHEMA}, {OPTIONS_SCHEMA}, "
    "bool[] needs, bool residual_is_x) -> Tensor[]"
)
forward_op = torch.ops.adapter_ops.grouped_forward.default
backward_op = torch.ops.adapter_ops.grouped_backward.default


def _calls(x: Tensor, residual: Tensor | None, weights: Weights, options: Options) -> KernelCalls | None:
    """The kernels' calls; None where `grouped_cpu` runs, also on a GPU: a compiled call may find there that the kernels
    do not take its dtype."""
    if x.device.type == "cpu" and not INTERPRETED:
        require(_CPU)
        return None
    calls = op_calls(x, residual, weights, options)
    return calls if isinstance(calls, KernelCalls) else None


def _index(task_ids: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """The order that sorts rows by task [M], and how many rows have no task, task 0, task 1 and so on [T + 1].

    Nothing waits for values, and nothing is atomic. Rows with an id out of range come last, and are counted nowhere.
    """
    ids, order = task_ids.sort(stable=True)
    bounds = torch.arange(-1, T + 1, dtype=ids.dtype, device=ids.device)
    return order, torch.searchsorted(ids, bounds).diff()


def _forward(
    x, task_ids, residual, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, save_z
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; z [M, R] of the rows by task (empty unless `save_z`); and both parts of `_index`."""
    _check_range("task_ids", task_ids, -1, len(w_down) - 1)  # here, as a compiled call has values when it runs
    weights, options = Weights(w_down, b_down, w_up, b_up, scale_tensor), Options(activation, scale, dtype)
    calls = _calls(x, residual, weights, options)
    if calls is None:
        return grouped_cpu.forward(x, task_ids, residual, *weights, *options, save_z)
    index = _index(task_ids, len(w_down))
    y, z = calls.forward((x, residual, *weights, *index), save_z)
    return y, x.new_empty(0, dtype=dtype) if z is None else z, *index


def _backward(
    dy, x, z, order, counts, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, needs, residual_is_x
) -> list[Tensor]:
    """The gradients asked for, in the order of `Needs`, without the gaps."""
    weights, options = Weights(w_down, b_down, w_up, b_up, scale_tensor), Options(activation, scale, dtype)
    calls = _calls(x, None if residual_is_x else dy, weights, options)
    if calls is None:
        return grouped_cpu.backward(dy, x, z, order, counts, *weights, *options, needs, residual_is_x)
    found = calls.backward(dy, x, z, weights, needs, residual_is_x, index=(order, counts))
    return [t for t in found if t is not None]


_library.impl("grouped_forward", _forward, "CompositeExplicitAutograd")
_library.impl("grouped_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("adapter_ops::grouped_forward", lib=_library)
def _(x, task_ids, residual, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, save_z):
    y_dtype = torch.promote_types(x.dtype if residual is None else residual.dtype, dtype)
    M = x.numel() // x.shape[-1]
    z = x.new_empty((M, w_down.shape[1]) if save_z else (0,), dtype=dtype)
    whole = dict(dtype=torch.int64)
    return x.new_empty(x.shape, dtype=y_dtype), z, x.new_empty(M, **whole), x.new_empty(len(w_down) + 1, **whole)


@torch.library.register_fake("adapter_ops::grouped_backward", lib=_library)
def _(
    dy, x, z, order, counts, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, needs, residual_is_x
):
    tensors = (x, w_down, b_down, w_up, b_up, scale_tensor)
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, task_ids, residual, *rest = inputs
    _, z, order, counts = output
    ctx.mark_non_differentiable(z, order, counts)
    ctx.save_for_backward(x, task_ids, z, order, counts, *rest[:5])
    ctx.options, ctx.residual_dtype = Options(*rest[5:8]), None if residual is None else residual.dtype


def _op_backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    need_x, _, need_residual, *need_weights = ctx.needs_input_grad[:8]
    x, task_ids, z, order, counts, *parameters = ctx.saved_tensors
    weights, needs = Weights(*parameters), Needs(need_x, *need_weights)
    residual_is_x = ctx.residual_dtype is None
    if torch.is_grad_enabled() or transformed():
        found = _by_autograd(dy, x, task_ids, weights, ctx.options, needs, residual_is_x)
    else:
        made = iter(backward_op(dy, x, z, order, counts, *weights, *ctx.options, list(needs), residual_is_x))
        found = [next(made) if need else None for need in needs]
    dx, *rest = found
    return dx, None, dy.to(ctx.residual_dtype) if need_residual else None, *rest, None, None, None, None


def _by_autograd(
    dy: Tensor,
    x: Tensor,
    task_ids: Tensor,
    weights: Weights,
    options: Options,
    needs: Needs,
    residual_is_x: bool,
) -> list[Tensor | None]:
    """The gradients of the formula, as differentiable functions of dy, x and the parameters."""
    wanted = [t for t, need in zip((x, *weights), needs) if need and t is not None]
    with torch.enable_grad():
        y = formula(x, task_ids, None if residual_is_x else torch.zeros_like(x), weights, options)
        found = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype), create_graph=True, materialize_grads=True))
    return [next(found) if need else None for need in needs]


torch.library.register_autograd(
    "adapter_ops::grouped_forward", _op_backward, setup_context=_setup_context, lib=_library
)


@register_flop_formula(torch.ops.adapter_ops.grouped_forward)
def _(x_shape, ids_shape, residual_shape, w_down_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * product_flops(x_shape, w_down_shape[1:])


@register_flop_formula(torch.ops.adapter_ops.grouped_backward)
def _(dy_shape, x_shape, z_shape, order_shape, counts_shape, w_down_shape, *args, out_shape=None, **kwargs) -> int:
    return backward_products(Needs(*args[-2])) * product_flops(x_shape, w_down_shape[1:])
