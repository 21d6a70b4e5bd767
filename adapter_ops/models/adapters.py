"""What this library puts into a model: one child, named `adapter_ops`, with all tasks and what runs them."""

import threading
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..wrappers import around, holders, unwrap
from .context import Selection
from .families import SitePattern
from .hooks import Bound, Frame, Generate, Root, Slot, Switch
from .parameters import Task, key_of
from .sites import Site, find_models

LOCK = threading.RLock()  # of every change to which tasks a model has


class Adapters(nn.Module):
    """Everything this library puts into a model, as the child `adapter_ops`: the tasks, and what runs them."""

    def __init__(self, model: nn.Module, sites: list[Site], patterns: Mapping[str, str | SitePattern] | None) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict()
        self.serves_bank = False  # then it stays when the last task is deleted
        self.sites = sites
        self.patterns = None if patterns is None else dict(patterns)
        self.selection = Selection()
        self._model = (model,)  # in a tuple, or it would be a child of its own child
        self.slots = {site.name: Slot(site, self.selection) for site in sites}
        self.switches: dict[str, Switch] = {}  # by path
        self.bound: list[Bound] = [Root(model, self.selection, self.check)]
        generating = {id(m): m for m in (model, *find_models(model).values()) if callable(getattr(m, "generate", None))}
        self.bound += [Generate(module, self.selection) for module in generating.values()]
        self.handles = []
        frames: set[str] = set()
        hooked: dict[str, nn.Module] = {}
        for slot in self.slots.values():
            site = slot.site
            if site.entry is not None:
                hooked[site.entry] = entry = model.get_submodule(site.entry)
                self.handles.append(entry.register_forward_pre_hook(slot.on_entry, with_kwargs=True))
                frames.add(around(model, site.entry, site.output))
            hooked[site.output] = output = model.get_submodule(site.output)
            self.handles.append(output.register_forward_hook(slot.on_output))
        self.hooked = [(path, *_above(model, path), module) for path, module in hooked.items()]
        # torch.compile does not notice hooks on a module that it has compiled without any, but a forward it does.
        self.bound += [Bound(module) for module in hooked.values()]
        self.bound += [Frame(model.get_submodule(path), self.selection) for path in sorted(frames)]
        for slot in self.slots.values():
            if slot.site.norm is not None:
                self.switch(slot.site.norm, slot)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The identity: an nn.Sequential calls every child it has."""
        return args[0] if args else kwargs

    @property
    def model(self) -> nn.Module:
        """The model that the paths of sites, heads and norms start from."""
        return self._model[0]

    @property
    def machinery(self) -> list[Any]:
        """The objects on the base's modules that are not modules themselves."""
        return [*self.slots.values(), *self.bound, *self.switches.values(), self.selection]

    def task(self, name: str) -> Task:
        return self.tasks._modules[key_of(name)]  # type: ignore[return-value]

    @property
    def names(self) -> list[str]:
        return [key.replace("+", ".") for key in list(self.tasks._modules)]  # which other threads may add to

    def name_of(self, task: Task | None) -> str | None:
        """The name of a task that was read off `selection`; None for no task, and for one deleted since."""
        tasks = list(self.tasks._modules.items())
        return next((key.replace("+", ".") for key, other in tasks if other is task), None)

    def switch(self, path: str, slot: Slot | None = None) -> None:
        """Lets a module of the base give way to a task's copy of it."""
        module = self.model.get_submodule(path)
        known = self.switches.get(path)
        if known is None or known.module is not module:
            if known is not None:
                known.remove()  # of a module that was there before
            slot = slot or (known.slot if known else None)
            self.switches[path] = Switch(module, path, _above(self.model, path), self.selection, slot)

    def switches_of(self, task: Task) -> list[Switch]:
        """The switches that a task needs: of its copies, and where an adapter of its may read a normalisation."""
        switches = list(self.switches.items())  # which other threads may add to
        return [switch for path, switch in switches if switch.slot is not None or path in task.copy_at]

    def check(self, task: Task | None) -> None:
        """Raises RuntimeError if a module was replaced since, so that something of the task would not run."""
        if task is None:
            return
        for path, parent, leaf, module in self.hooked:
            now = parent._modules.get(leaf)
            if now is not module and (now is None or all(part is not module for part in now.modules())):
                raise RuntimeError(
                    f"the module {path!r} was replaced after the model's first task was added, so that its adapter "
                    "would not run: put the module back, or save the tasks, delete them and load them again"
                )
        for switch in self.switches_of(task):
            parent, leaf = _above(self.model, switch.path) if switch.path in task.heads else switch.above
            if parent._modules.get(leaf) is not switch.module:
                raise RuntimeError(
                    f"the module {switch.path!r} was replaced after the task {self.name_of(task)!r} got its own: "
                    "activate the task again (set_active_adapter) to run the task's own, or "
                    "set_active_adapter(model, None) and add a new task for the new module"
                )

    def detach(self) -> None:
        """Takes off the model all that this library put into it."""
        for handle in self.handles:
            handle.remove()
        for bound in reversed([*self.bound, *self.switches.values()]):
            bound.remove()
        for holder in holders(self.model).values():
            del holder.adapter_ops


def _above(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has the one at a path as a child, and the child's name there."""
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent), leaf


def adapters_of(model: nn.Module, name: str | None = None) -> Adapters:
    """The model's Adapters. Raises ValueError, with the names there are, where it has none or not `name`."""
    found = find_adapters(model)
    known = found.names if found is not None else []
    if found is None or (name is not None and name not in known):
        what = "adapters" if name is None else f"adapter {name!r}"
        raise ValueError(f"the model has no {what}; it has: {', '.join(known) or 'none'}")
    return found


def find_adapters(model: nn.Module) -> Adapters | None:
    """The model's Adapters, or None. Raises ValueError where several parts of it have adapters of their own."""
    found = holders(unwrap(model))
    if len(found) > 1:
        raise ValueError(
            f"several modules of {type(model).__name__} have adapters of their own: {', '.join(found)}; pass the one "
            "that is meant"
        )
    return next((module._modules["adapter_ops"] for module in found.values()), None)  # type: ignore[return-value]


def root_of(model: nn.Module) -> nn.Module:
    """The module that paths start from: that of the model's first adapter, else what is inside its wrappers."""
    found = find_adapters(model)
    return unwrap(model) if found is None else found.model
