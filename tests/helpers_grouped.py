"""A batch of several tasks with its parameters, its oracle, and its gradients."""

import torch

from adapter_ops import reference

NAMES = ("w_down", "b_down", "w_up", "b_up")


def batch(M=37, T=5, D=12, R=4, dtype=torch.float64, scale=None, ids=None, **shapes):
    """Arguments of a call, by name; task 1 has no rows unless ids are given."""
    ids = torch.randint(-1, T, (M,)) if ids is None else torch.as_tensor(ids)
    if len(ids) == 37:
        ids[ids == 1] = 0
    made = {"w_down": torch.randn(T, R, D), "b_down": torch.randn(T, R), "w_up": torch.randn(T, D, R)}
    made |= {"b_up": torch.randn(T, D), "x": torch.randn(len(ids), D)}
    if scale is not None:
        made["scale"] = torch.rand(T, D) if scale == "channel" else torch.rand(T)
    return {n: t.to(dtype) for n, t in made.items()} | {"task_ids": ids}


def loop(x, task_ids, w_down, b_down, w_up, b_up, scale=1.0, residual=None, function=reference.bottleneck_adapter, **o):
    """One row after the other."""
    added_to = x if residual is None else residual
    out = []
    for m, t in enumerate(task_ids.tolist()):
        row = slice(m, m + 1)
        if t < 0:
            out.append(added_to[row])
            continue
        own = [None if w is None else w[t] for w in (w_down, b_down, w_up, b_up)]
        factor = scale[t] if isinstance(scale, torch.Tensor) else scale
        y = function(x[row], *own, scale=factor, residual=None if residual is None else residual[row], **o)
        out.append(y)
    return torch.cat([t.to(max((o.dtype for o in out), key=lambda d: d.itemsize)) for t in out])


def results(function, given, dy, **options):
    inputs = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in given.items()}
    y = function(**inputs, **options)
    wanted = [n for n, t in inputs.items() if t.requires_grad]
    found = torch.autograd.grad(y, [inputs[n] for n in wanted], dy.to(y.dtype), materialize_grads=True)
    return {"y": y.detach(), **dict(zip(wanted, found))}


def by_task(x, task_ids, w_down, b_down, w_up, b_up, scale=1.0, residual=None, **options):
    """All rows of a task at once, one task after the other."""
    added_to = x if residual is None else residual
    y = torch.zeros_like(added_to)
    for t in range(-1, len(w_down)):
        own_rows = (task_ids == t).nonzero()[:, 0]
        part = added_to[own_rows]
        if t >= 0:
            own = [None if w is None else w[t] for w in (w_down, b_down, w_up, b_up)]
            factor = scale[t] if isinstance(scale, torch.Tensor) else scale
            own_residual = None if residual is None else part
            part = reference.bottleneck_adapter(x[own_rows], *own, scale=factor, residual=own_residual, **options)
        y = y.index_copy(0, own_rows, part.to(y.dtype))
    return y
