"""What runs a task inside a base model whose modules stay as they are.

Hooks at a site (`Slot`) run the task's adapter there. Where a task may have a copy of a LayerNorm or of a head, or
where a sublayer's input has to reach its output, a callable stands as the `forward` of one module (`Bound`). Each asks
its `Selection` which task this call runs. What a call has to remember is kept in a frame of that call and thread
(`_FRAMES`), never on a module.
"""

import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .context import Selection
from .layers import AdapterLayer
from .mixed import GroupedLayer, TaskBatch
from .sites import Site


class _Frames(threading.local):
    """Inputs of sublayers that wait for their sublayer's output, by site: of the innermost `Frame` of this thread.

    transformers checkpoints the forward of a layer's class, so what runs again in backward is in no frame. The input is
    held weakly then: the layer keeps it for its skip connection, and if the layer fails nothing else does.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] | None = None
        self.loose: dict[str, Any] = {}

    def keep(self, site: str, r: Tensor) -> None:
        if self.inputs is not None:
            self.inputs[site] = r
        else:
            self.loose[site] = r if torch.compiler.is_compiling() else weakref.ref(r)

    def take(self, site: str) -> Tensor | None:
        if self.inputs is not None:
            return self.inputs.pop(site, None)
        r = self.loose.pop(site, None)
        return r() if isinstance(r, weakref.ref) else r


_FRAMES = _Frames()


class Slot:
    """One site of the model, with the hooks that run there the adapter of whichever task is active."""

    def __init__(self, site: Site, selection: Selection) -> None:
        self.site = site
        self.selection = selection

    def running(self) -> tuple[AdapterLayer | GroupedLayer, ...]:
        """What the active task has here, or the tasks of a batch, whose adapters may be of several kinds."""
        task = self.selection.task()
        if task is None:
            return ()
        layer = task.layer_at.get(self.site.name)
        if layer is None or self.site.layer in self.selection.skipped():
            return ()
        return layer if isinstance(layer, tuple) else (layer,)

    def on_entry(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the sublayer's input for adapters that read it."""
        if any(layer.reads_input for layer in self.running()):
            _FRAMES.keep(self.site.name, args[0] if args else kwargs["hidden_states"])

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Adds what the adapter makes of the sublayer's output or input."""
        layers = [layer for layer in self.running() if layer.reads != "norm"]
        if not layers:
            return None
        h = output[0] if isinstance(output, tuple) else output
        r = _FRAMES.take(self.site.name) if any(layer.reads_input for layer in layers) else None
        for layer in layers:
            x = h
            if layer.reads_input:
                if r is None:
                    raise RuntimeError(
                        f"the adapter at {self.site.name!r} reads the sublayer's input, but {self.site.entry!r} was "
                        f"not called before {self.site.output!r}"
                    )
                x = r if layer.reads == "input" else h + r
            h = layer.select(layer(x, h if layer.adds_to == "output" else x), h)
        return (h, *output[1:]) if isinstance(output, tuple) else h


class Bound:
    """Stands as the `forward` of one module, in front of the forward that was there."""

    method = "forward"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.base: Callable[..., Any] = getattr(module, self.method)
        self.had_its_own = self.method in module.__dict__
        setattr(module, self.method, self)

    def __getstate__(self) -> dict[str, Any]:
        # A bound method is pickled as the name of an attribute, and under that name the module has `self`.
        return self.__dict__ if self.had_its_own else {**self.__dict__, "base": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.base is None:
            self.base = getattr(type(self.module), self.method).__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the forward behind it: transformers' Trainer drops the columns that `model.forward` does not name."""
        return inspect.signature(self.base)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

    def remove(self) -> None:
        """Takes it off the module. Under another wrapper of `forward` it stays, and passes every call on."""
        for name in (self.method, "_old_forward"):  # the second is where accelerate's hooks keep what they wrap
            if self.module.__dict__.get(name) is self:
                if name == self.method and not self.had_its_own:
                    delattr(self.module, name)
                else:
                    setattr(self.module, name, self.base)


class Root(Bound):
    """Of the model: a call runs one task from its start to its end, even if the default changes meanwhile."""

    def __init__(self, module: nn.Module, selection: Selection, check: Callable[[Any], None]) -> None:
        super().__init__(module)
        self.selection = selection
        self.check = check

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # guards read the task once, when the compiled call starts
            task = self.selection.task()
            if isinstance(task, TaskBatch):
                task.check(args, kwargs)
            return self.base(*args, **kwargs)
        choice = self.selection.hold()
        try:
            self.check(choice.task)
            if isinstance(choice.task, TaskBatch):
                choice.task.check(args, kwargs)
            return self.base(*args, **kwargs)
        finally:
            self.selection.leave(choice)


class Generate(Bound):
    """Stands as `generate` of a transformers model: it makes several rows of each example of a batch of tasks."""

    method = "generate"

    def __init__(self, module: nn.Module, selection: Selection) -> None:
        super().__init__(module)
        self.selection = selection

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        task = self.selection.task()
        if not isinstance(task, TaskBatch):
            return self.base(*args, **kwargs)
        task.check(args[:1], kwargs)
        own: Any = getattr(self.module, "generation_config", None)
        configs = [args[1] if len(args) > 1 else kwargs.get("generation_config"), own]

        def setting(name: str) -> int:
            values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
            return next((value for value in values if value is not None), 1)

        beams = max(setting("num_beams"), setting("num_return_sequences"))
        with self.selection.choose(True, task.with_beams(beams)):
            return self.base(*args, **kwargs)


class Frame(Bound):
    """Of the module around a sublayer: gives each call a place for the sublayer's input."""

    def __init__(self, module: nn.Module, selection: Selection) -> None:
        super().__init__(module)
        self.selection = selection

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        task = self.selection.task()
        if task is None or not task.reads_input:
            return self.base(*args, **kwargs)
        outer = _FRAMES.inputs
        _FRAMES.inputs = {}
        try:
            return self.base(*args, **kwargs)
        finally:
            _FRAMES.inputs = outer


def _keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook that leaves the output as it is."""


class Switch(Bound):
    """Of a LayerNorm or a head: calls the active task's own copy, if it has one.

    Of the normalisation behind a site it is also where an adapter with `ln_before` stands.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        above: tuple[nn.Module, str],
        selection: Selection,
        slot: Slot | None = None,
    ) -> None:
        super().__init__(module)
        self.path = path
        self.above = above  # the module's parent, and its name there
        self.selection = selection
        self.slot = slot
        # In eval nn.TransformerEncoderLayer reads the weights of its norms and does not call them, unless it has hooks.
        in_encoder = isinstance(above[0], nn.TransformerEncoderLayer)
        self.handle = module.register_forward_hook(_keep) if in_encoder else None

    def remove(self) -> None:
        super().remove()
        if self.handle is not None:
            self.handle.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        task = self.selection.task()
        if task is None:
            return self.base(*args, **kwargs)
        call = task.copy_at.get(self.path)
        if call is None:
            call = self.base
        layers = () if self.slot is None else [layer for layer in self.slot.running() if layer.reads == "norm"]
        if not layers:
            return call(*args, **kwargs)
        total = args[0] if args else next(iter(kwargs.values()))  # h + r
        result = x = call(total)
        for layer in layers:
            y = layer(x, x if layer.adds_to == "norm" else total)
            result = layer.select(call(y) if layer.ln_after else y, result)
        return result
