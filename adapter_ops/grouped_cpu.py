"""Adapters of many tasks in one batch, on the CPU: rows sorted by task, each task's through the single adapter.

Arguments are those of the ops of `grouped.py`, and are taken as checked.
"""

import torch
from torch import Tensor

from . import cpu
from .calls import dense, rows
from .kernels.problem import Needs, Options, Weights


def _of_task(weights: Weights) -> list[Weights]:
    """The parameters of each task; a scale is then one element or D."""
    each = [[None] * len(weights.w_down) if t is None else t.unbind(0) for t in weights]
    return [Weights(*(t.reshape(1) if t is not None and t.dim() == 0 else t for t in task)) for task in zip(*each)]


def forward(
    x, task_ids, residual, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, save_z
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; z [M, R] of the rows by task (empty unless `save_z`); the order that sorts rows by task [M]; and how many rows
    have no task, task 0, task 1 and so on [T + 1]."""
    weights, options = dense(Weights(w_down, b_down, w_up, b_up, scale_tensor)), Options(activation, scale, dtype)
    x_rows = rows(x)
    added_to = x_rows if residual is None else rows(residual)
    order = task_ids.argsort(stable=True)
    counts = torch.bincount(task_ids + 1, minlength=len(w_down) + 1)
    lengths = counts.tolist()
    y = x.new_empty(x.shape, dtype=torch.promote_types(added_to.dtype, dtype))
    z = x.new_zeros((len(x_rows), w_down.shape[1]) if save_z else (0,), dtype=dtype)
    y_rows, (taskless, *rows_of_tasks) = y.view(x_rows.shape), order.split(lengths)
    z_parts = z.split(lengths)[1:] if save_z else [z] * len(rows_of_tasks)
    y_rows[taskless] = added_to[taskless].to(y.dtype)
    # A task's rows are gathered and put back by themselves, so that they stay in the processor's cache.
    for own_rows, z_part, parameters in zip(rows_of_tasks, z_parts, _of_task(weights)):
        if len(own_rows):
            x_part = x_rows[own_rows]
            r_part = x_part if residual is None else added_to[own_rows]
            y_part, z_found = cpu.forward(x_part, r_part, parameters, options, save_z)
            y_rows[own_rows] = y_part
            if z_found is not None:
                z_part.copy_(z_found)
    return y, z, order, counts


def backward(
    dy, x, z, order, counts, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, needs, residual_is_x
) -> list[Tensor]:
    """The gradients asked for, in the order of `Needs`, without the gaps."""
    weights, options = dense(Weights(w_down, b_down, w_up, b_up, scale_tensor)), Options(activation, scale, dtype)
    asked, lengths = Needs(*needs), counts.tolist()
    x_rows, dy_rows, (taskless, *rows_of_tasks) = rows(x), rows(dy), order.split(lengths)
    dx = x.new_zeros(x.shape) if asked.x else None
    dx_rows = None if dx is None else dx.view(x_rows.shape)
    made = [torch.zeros_like(t) if need and t is not None else None for need, t in zip(needs[1:], weights)]
    if dx_rows is not None and residual_is_x:
        dx_rows[taskless] = dy_rows[taskless].to(x.dtype)
    parts = zip(rows_of_tasks, z.split(lengths)[1:], _of_task(weights))
    for task, (own_rows, z_part, parameters) in enumerate(parts):
        if len(own_rows):
            x_part, dy_part = x_rows[own_rows], dy_rows[own_rows]
            dx_part, *found = cpu.backward(dy_part, x_part, z_part, parameters, options, asked, residual_is_x)
            if dx_rows is not None:
                dx_rows[own_rows] = dx_part
            for total, part in zip(made, found):
                if total is not None and part is not None:
                    total[task].copy_(part.view(total[task].shape))
    return [t for t in (dx, *made) if t is not None]
