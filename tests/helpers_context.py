"""A model of any family with tasks, and what must not be left of a call that has ended."""

import torch
from helpers_families import build, forward

from adapter_ops import add_adapter, set_active_adapter
from adapter_ops.models import hooks
from adapter_ops.models.context import _NOTHING

PRESETS = ["houlsby", "pfeiffer", "parallel", "adapter_plus"]
TASKS = ("a", "b", None)


def two_tasks(family, preset):
    """A model of a family with the tasks "a" and "b" of a preset, whose parameters are random."""
    return with_tasks(("a", "b"), family, preset)


def with_tasks(names, family, preset):
    """A model of a family with tasks of a preset whose parameters are random."""
    model, inputs, _ = build(family)
    for name in names:
        add_adapter(model, name, preset)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.2)
    return model, inputs


@torch.no_grad()
def outputs_of(model, inputs):
    """The first output of each task and of the base. The base is left active."""
    found = {}
    for name in TASKS:
        set_active_adapter(model, name)
        found[name] = forward(model, inputs)[0]
    return found


def nothing_left(model):
    """Whether no choice is open here and no tensor hangs on what the library has put on the model."""
    things = [*model.adapter_ops.machinery, *model.adapter_ops.tasks.values()]
    held = [v for thing in things for v in vars(thing).values() if isinstance(v, torch.Tensor)]
    open_here = any(choice.live for choice in _NOTHING.current.choices.values())
    kept = [r for r in hooks._FRAMES.loose.values() if r() is not None]
    return not held and not kept and hooks._FRAMES.inputs is None and not open_here
