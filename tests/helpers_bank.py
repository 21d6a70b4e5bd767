"""Saved tasks for a bank, and what each example of X gets from each of them."""

import dataclasses

import torch
from helpers_mixed import add_tasks, close
from helpers_tasks import bert

from adapter_ops import AdapterConfig, list_adapters, save_adapter, using_adapter

X = torch.arange(35).view(5, 7)
CONFIG = AdapterConfig(bottleneck=4, init_std=0.3)


def fresh(**fields):
    torch.manual_seed(0)
    return bert(num_hidden_layers=2, **fields)


@torch.no_grad()
def saved(folder, configs, base=fresh, x=X):
    """Saves a task of each config for the same base, and returns what each of them, and the base, makes of x."""
    model, outputs = add_tasks(base(), configs), {}
    for name in (*list_adapters(model), None):
        if name is not None:
            save_adapter(model, folder / name, name)
        with using_adapter(model, name):
            outputs[name] = model(x)[0]
    return outputs


def want(outputs, names):
    return torch.stack([outputs[name][i] for i, name in enumerate(names)])


@torch.no_grad()
def check(model, bank, outputs, names):
    with bank.using(names):
        close(model(X).logits, want(outputs, names))


def six_tasks(folder):
    """Saves six tasks of different bottlenecks, and returns the folder and their outputs."""
    return folder, saved(folder, [dataclasses.replace(CONFIG, bottleneck=2 + i) for i in range(6)])
