"""Adapters of many tasks in one batch, in PyTorch's own operations: rows sorted by task, as many tasks as possible in
one batched product.

Tasks of few rows are padded with zero rows to one size, so that the rows of several tasks are one tensor
[tasks, size, D], and each product of the adapter is one `torch.bmm` for all of them. A task of many rows goes through
the single adapter by itself. Batches are small enough to stay in a processor's cache from the gathering of their rows
to the writing of their results.

Arguments are those of the ops of `grouped.py`, and are taken as checked.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu
from .calls import dense, rows
from .kernels.activations import find_activation
from .kernels.problem import Needs, Options, Weights

# A task that goes through the single adapter costs as much time again as this many rows.
_ROWS_OF_A_CALL = 64
_BATCH = 512  # rows for each thread in one batched product
_LARGEST = 512  # rows of a task in a batched product, whose sums over the rows are made term by term


class _Part(NamedTuple):
    """Tasks that are computed together, each with `size` rows of which the last ones may be padding."""

    tasks: slice | Tensor
    n_tasks: int
    size: int
    first: int  # where the rows begin in the order by task, in which the rows of all these tasks are neighbors
    end: int
    places: (
        Tensor | None
    )  # where each of the n_tasks · size rows is in that order, padding at any; None without padding
    padding: Tensor | None  # numbers of the padding rows
    real: Tensor | None  # numbers of the other rows

    def own(self, t: Tensor) -> Tensor:
        """The tasks' part of a tensor [T, ...]."""
        return t[self.tasks] if isinstance(self.tasks, slice) else t.index_select(0, self.tasks)

    def gather(self, t: Tensor, order: Tensor | None) -> Tensor:
        """Rows [n_tasks, size, ...] of a tensor [M, ...]. `order` sorts it by task, and is None where it is sorted."""
        if self.places is None:
            found = t[self.first : self.end] if order is None else t.index_select(0, order[self.first : self.end])
        else:
            assert self.padding is not None
            found = t.index_select(0, self.places if order is None else order[self.places])
            found.index_fill_(0, self.padding, 0)
        return found.unflatten(0, (self.n_tasks, self.size))

    def place(self, t: Tensor) -> Tensor:
        """Memory [n_tasks, size, ...] for the rows of a tensor sorted by task: its own where no row is padding."""
        if self.places is None:
            return t[self.first : self.end].unflatten(0, (self.n_tasks, self.size))
        return t.new_empty(self.n_tasks, self.size, *t.shape[1:])

    def put(self, t: Tensor, found: Tensor) -> None:
        """Writes rows to a tensor that is ordered by task, unless `place` gave that tensor's own memory for them."""
        if self.real is not None:
            torch.index_select(found.flatten(0, 1), 0, self.real, out=t[self.first : self.end])


def _parts(lengths: list[int], device: torch.device) -> Iterator[_Part]:
    """How the rows are divided; `lengths` are the rows without a task and those of each task."""
    start, *of_tasks = lengths
    size = _padded_size(of_tasks)
    step = max(1, _BATCH * torch.get_num_threads() // max(size, 1))
    tasks: list[int] = []
    for task, n in enumerate([*of_tasks, size + 1]):  # the last one ends the batch before it
        if tasks and (n > size or len(tasks) == step):
            yield _batch(tasks, [of_tasks[t] for t in tasks], size, start, device)
            start += sum(of_tasks[t] for t in tasks)
            tasks = []
        if task == len(of_tasks) or not n:
            continue
        if n > size:
            yield _Part(slice(task, task + 1), 1, n, start, start + n, None, None, None)
            start += n
        else:
            tasks.append(task)


def _batch(tasks: list[int], of_tasks: list[int], size: int, start: int, device: torch.device) -> _Part:
    """Tasks with that many rows each, at least one, which begin at `start`."""
    consecutive = tasks[-1] - tasks[0] == len(tasks) - 1
    own = slice(tasks[0], tasks[-1] + 1) if consecutive else torch.tensor(tasks, device=device)
    end = start + sum(of_tasks)
    if min(of_tasks) == size:
        return _Part(own, len(tasks), size, start, end, None, None, None)
    lengths = torch.tensor(of_tasks, device=device)[:, None]
    offsets = torch.arange(size, device=device)
    is_real = offsets < lengths
    places = start + lengths.cumsum(0) - lengths + offsets.where(is_real, 0)
    real, padding = (mask.flatten().nonzero()[:, 0] for mask in (is_real, ~is_real))
    return _Part(own, len(tasks), size, start, end, places.flatten(), padding, real)


def _padded_size(of_tasks: list[int]) -> int:
    """The size up to which tasks are padded to one another: that which takes the least time, counted in rows."""
    present = sorted(n for n in of_tasks if n)
    best, least = 0, sum(n + _ROWS_OF_A_CALL for n in present)
    above = least
    for count, n in enumerate(present, 1):
        above -= n + _ROWS_OF_A_CALL
        if n <= _LARGEST and count > 1 and above + count * n < least:
            best, least = n, above + count * n
    return best


def _of(part: _Part, weights: Weights, dtype: torch.dtype) -> Weights:
    """The parameters of a part's tasks, those of the products in `dtype`. A scale is [tasks, 1, 1] or [tasks, 1, D]."""
    *parameters, scale = (None if t is None else part.own(t) for t in weights)
    w_down, b_down, w_up, b_up = (None if t is None else t.to(dtype) for t in parameters)
    assert w_down is not None and w_up is not None
    return Weights(w_down, b_down, w_up, b_up, None if scale is None else scale.reshape(part.n_tasks, 1, -1))


def _single(part: _Part, weights: Weights) -> Weights:
    """The parameters of a part's only task; a scale is then one element or D."""
    assert isinstance(part.tasks, slice)
    of_task = [None if t is None else t[part.tasks.start] for t in weights]
    return Weights(*(t.reshape(1) if t is not None and t.dim() == 0 else t for t in of_task))  # type: ignore[arg-type]


def _order(task_ids: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
    """The order that sorts rows by task, and how many rows have no task, task 0, task 1 and so on."""
    return task_ids.argsort(stable=True), torch.bincount(task_ids + 1, minlength=tasks + 1)


def _needed(order: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The order and the one that undoes it, or None for both where rows are sorted already."""
    numbers = torch.arange(len(order), device=order.device)
    if torch.equal(order, numbers):
        return None, None
    return order, torch.empty_like(order).scatter_(0, order, numbers)


def forward(
    x, task_ids, residual, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, save_z
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; z [M, R] of the rows by task (empty unless `save_z`); the order that sorts rows by task [M]; and how many rows
    have no task, task 0, task 1 and so on [T + 1]."""
    weights, options = dense(Weights(w_down, b_down, w_up, b_up, scale_tensor)), Options(activation, scale, dtype)
    x_rows = rows(x)
    added_to = x_rows if residual is None else rows(residual)
    order, counts = _order(task_ids, len(w_down))
    lengths, (by_task, back) = counts.tolist(), _needed(order)
    y = x.new_empty(x.shape, dtype=torch.promote_types(added_to.dtype, dtype))
    z = x.new_zeros((len(x_rows), w_down.shape[1]) if save_z else (0,), dtype=dtype)
    y_rows = y.view(x_rows.shape)
    y_by_task = y_rows if back is None else torch.empty_like(y_rows)
    y_by_task[: lengths[0]] = added_to.index_select(0, order[: lengths[0]])
    for part in _parts(lengths, x.device):
        x_part = part.gather(x_rows, by_task)
        r_part = x_part if residual is None else part.gather(added_to, by_task)
        y_part = part.place(y_by_task)
        if part.n_tasks == 1:
            found, z_part = cpu.forward(x_part[0], r_part[0], _single(part, weights), options, save_z)
            y_part[0].copy_(found)
        else:
            z_part = _forward(x_part.to(dtype), r_part, _of(part, weights, dtype), options, y_part)
        part.put(y_by_task, y_part)
        if z_part is not None and save_z:
            z_place = part.place(z)
            z_place.copy_(z_part.view(z_place.shape))
            part.put(z, z_place)
    if back is not None:
        torch.index_select(y_by_task, 0, back, out=y_rows)
    return y, z, order, counts


def _forward(x: Tensor, residual: Tensor, weights: Weights, options: Options, y: Tensor) -> Tensor:
    """Writes y [tasks, rows, D] and returns z [tasks, rows, R], from x in `options.dtype`."""
    w_down, b_down, w_up, b_up, scale = weights
    z = _products(x, w_down.transpose(1, 2), None if b_down is None else b_down[:, None])
    h = find_activation(options.activation).eager(z)
    factor: float | Tensor = options.scale if scale is None else scale
    if isinstance(factor, Tensor) and factor.shape[2] > 1:
        u = _products(h, w_up.transpose(1, 2), None if b_up is None else b_up[:, None])
        torch.add(residual, (u * factor).to(u.dtype), out=y)
        return z
    if isinstance(factor, Tensor) or factor != 1.0:
        h = (h * factor).to(h.dtype)
        b_up = None if b_up is None else (b_up[:, None] * factor)[:, 0]
    if y.dtype != x.dtype:
        u = _products(h, w_up.transpose(1, 2), None if b_up is None else b_up[:, None].to(h.dtype))
        torch.add(residual, u, out=y)
        return z
    if b_up is not None:
        residual = torch.add(residual, b_up[:, None], out=y)
    torch.baddbmm(residual, h, w_up.transpose(1, 2), out=y)
    return z


def _products(a: Tensor, b: Tensor, add: Tensor | None) -> Tensor:
    """add + a · b for each task."""
    return torch.bmm(a, b) if add is None else torch.baddbmm(add, a, b)


def backward(
    dy, x, z, order, counts, w_down, b_down, w_up, b_up, scale_tensor, activation, scale, dtype, needs, residual_is_x
) -> list[Tensor]:
    """The gradients asked for, in the order of `Needs`, without the gaps."""
    weights, options = dense(Weights(w_down, b_down, w_up, b_up, scale_tensor)), Options(activation, scale, dtype)
    asked, lengths, (by_task, back) = Needs(*needs), counts.tolist(), _needed(order)
    x_rows, dy_rows = rows(x), rows(dy)
    dx = x.new_empty(x.shape) if asked.x else None
    dx_rows = None if dx is None else dx.view(x_rows.shape)
    dx_by_task = None if dx_rows is None else dx_rows if back is None else torch.empty_like(dx_rows)
    made = [
        (torch.zeros_like(t) if 0 in lengths[1:] else torch.empty_like(t)) if need and t is not None else None
        for need, t in zip(needs[1:], weights)
    ]
    if dx_by_task is not None:
        taskless = order[: lengths[0]]
        dx_by_task[: lengths[0]] = dy_rows.index_select(0, taskless) if residual_is_x else 0
    for part in _parts(lengths, x.device):
        x_part, dy_part = part.gather(x_rows, by_task), part.gather(dy_rows, by_task)
        z_part = part.gather(z, None)
        dx_part = None if dx_by_task is None else part.place(dx_by_task)
        if part.n_tasks == 1:
            one = _single(part, weights)
            dx_found, *found = cpu.backward(dy_part[0], x_part[0], z_part[0], one, options, asked, residual_is_x)
            if dx_part is not None and dx_found is not None:
                dx_part[0].copy_(dx_found)
        else:
            added_to = dy_part if residual_is_x else None
            found = _backward(dy_part, x_part, z_part, _of(part, weights, dtype), options, asked, added_to, dx_part)
        if dx_by_task is not None and dx_part is not None:
            part.put(dx_by_task, dx_part)
        for total, of_part in zip(made, found):
            if total is not None and of_part is not None:
                total[part.tasks] = of_part.view(part.n_tasks, *total.shape[1:]).to(total.dtype)
    if back is not None and dx_rows is not None and dx_by_task is not None:
        torch.index_select(dx_by_task, 0, back, out=dx_rows)
    return [t for t in (dx, *made) if t is not None]


def _backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weights: Weights,
    options: Options,
    needs: Needs,
    added_to: Tensor | None,
    dx: Tensor | None,
) -> list[Tensor | None]:
    """Writes dx and returns the gradients of the five parameters [tasks, ...]; None where not asked for."""
    w_down, _, w_up, b_up, scale = weights
    act, dtype = find_activation(options.activation), options.dtype
    wide = torch.promote_types(dtype, torch.float32)
    factor: float | Tensor = options.scale if scale is None else scale
    channel = isinstance(factor, Tensor) and factor.shape[2] > 1
    g = dy.to(dtype)
    dw_down = db_down = dw_up = sum_dy = dscale = None
    if needs.b_up or (needs.scale and b_up is not None):
        # What dscale adds to may cancel it, so it is not rounded to 16 bits there.
        sum_dy = g.sum(1, dtype=wide if needs.scale else None)
    if channel:
        assert isinstance(factor, Tensor)
        if needs.w_up or needs.scale:
            outer = torch.bmm(g.transpose(1, 2), act.eager(z))
            dscale = (outer.to(wide) * w_up).sum(2) if needs.scale else None
            dw_up = outer * factor.transpose(1, 2) if needs.w_up else None
        g = (g * factor).to(dtype)
    elif needs.w_up:
        h = act.eager(z)
        dw_up = torch.bmm(g.transpose(1, 2), h if scale is None and factor == 1.0 else (h * factor).to(dtype))
    sum_by_dh = needs.scale and not channel
    if needs.x or needs.w_down or needs.b_down or sum_by_dh:
        dh = torch.bmm(g, w_up)
        if sum_by_dh:
            dscale = (dh.to(wide) * act.eager(z)).sum((1, 2))  # Σ dy ⊙ (h · W_upᵀ) over a task's rows and channels
        if not channel and (scale is not None or factor != 1.0):
            dh *= factor
        dz = act.eager_backward(z, dh)
        if needs.w_down:
            dw_down = torch.bmm(dz.transpose(1, 2), x.to(dtype))
        if needs.b_down:
            db_down = dz.sum(1)
        if dx is not None and added_to is not None and added_to.dtype == dx.dtype == dtype:
            torch.baddbmm(added_to, dz, w_down, out=dx)
        elif dx is not None:
            product = torch.bmm(dz, w_down).to(dx.dtype)
            dx.copy_(product if added_to is None else product.add_(added_to))
    if dscale is not None and sum_dy is not None and b_up is not None:
        summed = sum_dy * b_up
        dscale = dscale + (summed if channel else summed.sum(1))
    if sum_dy is not None and (scale is not None or factor != 1.0):
        sum_dy = sum_dy * (factor[:, 0] if isinstance(factor, Tensor) else factor)
    return [dw_down, db_down, dw_up, sum_dy if needs.b_up else None, dscale]
