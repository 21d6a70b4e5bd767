"""Batches whose examples have different tasks, and what each example gets alone."""

import torch
from helpers_families import build, forward

from adapter_ops import add_adapter, list_adapters, set_active_adapter, using_adapter


def add_tasks(model, configs):
    """Adds a task t0, t1, ... of each config, with random parameters, frozen, and leaves the base active."""
    for config in configs:
        name = f"t{len(list_adapters(model))}"
        torch.manual_seed(100 + len(name) + int(name[1:]))
        add_adapter(model, name, config)
        with torch.no_grad():
            for p in model.adapter_ops.task(name).parameters():
                p.add_(torch.randn_like(p) * 0.2)
    set_active_adapter(model, None)
    model.requires_grad_(False)
    return model


def model_of(name, configs):
    """A model of a family with a task of each config that it takes, and inputs of one example more than it has tasks.
    Neighbouring examples differ."""
    torch.manual_seed(0)
    model, inputs, _ = build(name)
    for config in configs:
        try:
            add_tasks(model, [config])
        except ValueError as error:
            assert "has no entry, and this config" in str(error)
    n = len(list_adapters(model)) + 1
    return model, {key: rows_of(t, n) for key, t in inputs.items()}


def rows_of(t, n):
    """n different rows, made of the two that an input of helpers_families has."""
    t = torch.cat([t] * n)[:n]
    number = torch.arange(n).view(-1, *[1] * (t.dim() - 1))
    if t.is_floating_point():
        return t * (1 + number / 10)
    return t if (t == 49).any() else t + number  # 49 stands for an image


def row(inputs, i):
    return {key: t[i : i + 1] for key, t in inputs.items()}


@torch.no_grad()
def alone(model, names, inputs):
    """The first output of each example with its task alone, as the rows of one tensor."""
    found = []
    for i, name in enumerate(names):
        with using_adapter(model, name):
            found.append(forward(model, row(inputs, i))[0])
    return torch.cat(found)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
