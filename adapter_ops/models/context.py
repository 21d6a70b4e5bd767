"""Which task a call runs: the model's default, or what the current thread or async task has chosen instead.

A choice lives in a `contextvars.ContextVar`, so threads and async tasks do not see each other's. torch.compile does not
trace `ContextVar.get`, but it reads a property whose getter is a builtin function without tracing it, and its guards
read that property again in the thread that calls. Hence `Scope.current`.
"""

import contextlib
import itertools
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

_SCOPE: ContextVar["Scope"] = ContextVar("adapter_ops")
_keys = itertools.count()
_NO_LAYERS: frozenset[int] = frozenset()


class Choice:
    """What one `with` block, or one call of the model, says of which task runs."""

    def __init__(
        self, outer: "Choice | None", decides: bool, task: Any, skipped: frozenset[int], follows: bool
    ) -> None:
        self.outer = outer
        self.live = True  # False after the block, which a generator may leave in another context than it entered
        self.decides = decides  # whether `task` counts; a block of `skip_layers` leaves the task as it is
        self.task = task
        self.skipped = skipped
        self.follows = follows  # holds the default for the time of a call, and follows a change made within that call


def _live(choice: Choice | None) -> Choice | None:
    """The innermost choice, of this one and those around it, whose block has not been left."""
    while choice is not None and not choice.live:
        choice = choice.outer
    return choice


class Scope:
    """The innermost choice for each model, by `Selection.key`."""

    # _SCOPE.get(self): the scope of the context, or `self` where the context has none.
    current: Any = property(_SCOPE.get)

    def __init__(self, choices: dict[int, Choice]) -> None:
        self.choices = choices


_NOTHING = Scope({})


class Selection:
    """Which task of one model runs. A copy of the model makes choices of its own."""

    def __init__(self) -> None:
        self.key = next(_keys)
        self.default: Any = None  # a Task, or None for the bare base
        self.blocks: dict[int, Choice] = {}  # choices of `with` blocks that are open, in whichever thread

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.key = next(_keys)
        self.default = state["default"]
        self.blocks = {}

    def _innermost(self) -> Choice | None:
        choice = _NOTHING.current.choices.get(self.key)
        if choice is not None or torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
            return choice
        # A checkpointed layer runs again in backward: on a GPU in a thread of autograd's, where PyTorch keeps the
        # context of the thread that called backward. Before 2.12 it did not.
        if not torch._C._is_key_in_tls("context"):
            if self.blocks and isinstance(threading.current_thread(), threading._DummyThread):
                raise RuntimeError(
                    f"PyTorch {torch.__version__} runs a checkpointed layer again in a thread that does not know which "
                    "task using_adapter has chosen for the caller of backward: train with set_active_adapter or "
                    "train_adapter instead of using_adapter, or with PyTorch 2.12 or later"
                )
            return None
        scope = torch._C._get_obj_in_tls("context").get(_SCOPE)
        return None if scope is None else scope.choices.get(self.key)

    def task(self) -> Any:
        """The task that a call made here and now runs, or None."""
        choice = self._innermost()
        while choice is not None:
            task = choice.task  # before `live`, since another thread may leave the block meanwhile
            if choice.live and choice.decides:
                return task
            choice = choice.outer
        return self.default

    def skipped(self) -> frozenset[int]:
        """Numbers of the layers whose adapters are left out."""
        choice = self._innermost()
        layers = _NO_LAYERS
        while choice is not None:
            if choice.skipped and choice.live:
                layers = layers | choice.skipped
            choice = choice.outer
        return layers

    def set_default(self, task: Any) -> None:
        """Changes the default. A call in progress goes on as it is, unless it is the one that makes the change."""
        self.default = task
        choice = _NOTHING.current.choices.get(self.key)
        while choice is not None:
            if choice.live and choice.follows:
                choice.task = task
            elif choice.live and choice.decides:
                return
            choice = choice.outer

    def enter(self, decides: bool, task: Any, skipped: frozenset[int] = _NO_LAYERS, follows: bool = False) -> Choice:
        """Makes a choice for the current context; `leave` takes it back."""
        choices = {key: outer for key, c in _NOTHING.current.choices.items() if (outer := _live(c)) is not None}
        choice = Choice(choices.get(self.key), decides, task, skipped, follows)
        _SCOPE.set(Scope({**choices, self.key: choice}))
        return choice

    def hold(self) -> Choice:
        """Keeps for the current context the task that is active now, whatever others do to the default."""
        choice = _NOTHING.current.choices.get(self.key)
        while choice is not None:
            task = choice.task
            if choice.live and choice.decides:
                return self.enter(True, task, follows=choice.follows)
            choice = choice.outer
        return self.enter(True, self.default, follows=True)

    def leave(self, choice: Choice) -> None:
        choice.live = False
        choice.task = None  # the context that entered it may keep it for long
        choices = _NOTHING.current.choices
        innermost = choices.get(self.key)
        if innermost is None or innermost.live:
            return  # another context's choice, or one that a block inside has yet to leave
        innermost = _live(innermost)
        rest = {key: other for key, other in choices.items() if key != self.key}
        _SCOPE.set(Scope(rest if innermost is None else {**rest, self.key: innermost}))

    @contextlib.contextmanager
    def choose(self, decides: bool, task: Any, skipped: frozenset[int] = _NO_LAYERS) -> Iterator[None]:
        choice = self.enter(decides, task, skipped)
        self.blocks[id(choice)] = choice
        try:
            yield
        finally:
            self.blocks.pop(id(choice), None)
            self.leave(choice)
