"""Replay: the launches of a plan, made again without Triton's dispatcher.

Triton's dispatcher looks at every argument of every launch to find the compiled kernel, which takes 10 µs and more. The
kernel follows from the plan, unless something has changed that the dispatcher would see: an input starts elsewhere than
at a multiple of 16 bytes, the current device is another one, or somebody listens to launches or instruments them. A
recording asks for that, and otherwise gives the addresses of the tensors to a function in C that launches: ours
(launcher.py), or else Triton's.

Each recording is a function of its own, written out as source (`Recording.source`), in which nothing is left to loop
over. Every number in it has a name, so recordings that differ in their numbers alone share what Python makes of the
source.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton import knobs

from . import launcher

if TYPE_CHECKING:
    from .plan import Memory, Plan

# From the first version of Triton that was tried to the last; `CompiledKernel.run` has one signature in all of them.
# With any other version each launch goes through the dispatcher.
VERSIONS = (3, 6), (3, 9)
KNOWN = VERSIONS[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= VERSIONS[1]

# What the source of a recording refers to, besides its own constants. The first two are not in a build without CUDA.
NAMES: dict[str, Any] = {
    "current_device": getattr(torch._C, "_cuda_getDevice", None),
    "current_stream": getattr(torch._C, "_cuda_getCurrentRawStream", None),
    "empty_like": torch.empty_like,
    "runtime": knobs.runtime,
    "compilation": knobs.compilation,
}


class Switch:
    """How launches are made."""

    off = False  # through Triton's dispatcher
    python = False  # recordings made from now on call Triton's launcher, as they do where launch.c cannot be compiled


@contextlib.contextmanager
def dispatching() -> Iterator[None]:
    """Every launch of this process goes through Triton's dispatcher, for tests and benchmarks to compare with."""
    before, Switch.off = Switch.off, True
    try:
        yield
    finally:
        Switch.off = before


@functools.lru_cache(maxsize=1024)
def _code(source: str) -> Any:
    return compile(source, "<recording>", "exec")


def is_like(memory: "Memory", tensors: dict[str, Any]) -> bool:
    """Whether an output can be made like an input."""
    t = tensors[memory.like] if memory.like else None
    # A single row is dense whatever its stride says, and `empty_like` would copy the stride.
    return t is not None and t.dtype == memory.dtype and t.is_contiguous() and t.stride(0) * len(t) == t.numel()


def _launcher(compiled: Any, grid: tuple[int, ...], arguments: list[Any]) -> tuple[Any, tuple[Any, ...], bool]:
    """The function in C that launches a kernel, and what it takes between the function's handle and the arguments.

    `CompiledKernel.run` is an object in Python that works these out at every launch. They are the same each time for a
    kernel without scratch memory of its own, so they are taken down once, from a copy of the object, which is kept from
    launching. The flag says whether the arguments come as one tuple, as in newer versions. Where anything is
    unexpected, the result is `run` itself.
    """
    run, head = compiled.run, (*grid, 0, compiled.function)
    between = (compiled.packed_metadata, None, None, None)
    as_it_is = run, between, False
    own_memory = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    if not hasattr(run, "launch") or any(getattr(run, name, 0) for name in own_memory):
        return as_it_is
    seen: list[tuple[Any, ...]] = []
    observed = copy.copy(run)
    observed.launch = lambda *taken: seen.append(taken)
    observed(*head, *between, *arguments)
    if len(seen) != 1 or seen[0][:5] != head:
        return as_it_is
    taken, n = seen[0], len(arguments)
    if isinstance(taken[-1], tuple) and len(taken[-1]) == n and all(a is b for a, b in zip(taken[-1], arguments)):
        return run.launch, taken[5:-1], True
    if len(taken) >= 5 + n and all(a is b for a, b in zip(taken[len(taken) - n :], arguments)):
        return run.launch, taken[5 : len(taken) - n], False
    return as_it_is


class Recording:
    """A plan's launches with the kernels that Triton has compiled for them.

    `play` takes the plan's inputs and returns its outputs, or None where Triton's dispatcher has to be asked; nothing
    has then been done.
    """

    play: Callable[..., tuple[Tensor | None, ...] | None]

    def __init__(self, plan: "Plan", compiled: list[Any], inputs: Sequence[Tensor | None]) -> None:
        # The function holds the compiled kernels, because Triton 3.9 unloads one that nobody holds.
        self.names: dict[str, Any] = NAMES | {"compiled": compiled}
        given = dict(zip(plan.inputs, inputs))
        present = [name for name, t in given.items() if t is not None]
        index = self._name(given[present[0]].device.index)  # type: ignore[union-attr]
        made = [f"{name} = {memory and self._made(memory, given)}" for name, memory in plan.outputs.items()]
        if plan.bytes:  # freed at the end, in the stream's order
            elements = -(-plan.bytes // given[present[0]].element_size())  # type: ignore[union-attr]
            made.append(f"scratch = {present[0]}.new_empty({self._name(elements)})")
        outputs = [name for name, memory in plan.outputs.items() if memory is not None]
        tensors = [*present, *outputs, *(["scratch"] if plan.bytes else [])]
        changed = f"current_device() != {index} or {self._changed(plan)}"
        prepared = None if Switch.python else launcher.prepare(plan, compiled, tensors, len(present))
        if prepared is not None:
            launch, launches = map(self._name, prepared)
            lines = [
                f"if {changed}:",
                "    return None",
                *made,
                f"if not {launch}({launches}, current_stream({index}), {', '.join(tensors)}):",
                "    return None",
            ]
        else:
            lines = [f"{name}_ = {name}.data_ptr()" for name in present]
            lines += [f"if ({' | '.join(name + '_' for name in present)}) & 15 or {changed}:", "    return None", *made]
            lines += [f"{name}_ = {name}.data_ptr()" for name in tensors[len(present) :]]
            start = "scratch_" if plan.bytes else "0"
            lines += [f"{name}_ = {start} + {self._name(offset)}" for name, offset in zip(plan.scratch, plan.offsets)]
            lines.append(f"stream = current_stream({index})")
            lines += [self._launch(launch, kernel) for launch, kernel in zip(plan.launches, compiled)]
        lines.append(f"return {', '.join(plan.outputs)},")
        self.source: str = "\n    ".join([f"def play({', '.join(plan.inputs)}):", *lines])
        made_here: dict[str, Any] = {}
        exec(_code(self.source), self.names, made_here)
        self.play = made_here["play"]

    def _made(self, memory: "Memory", given: dict[str, Any]) -> str:
        """An expression for an uninitialised output, of those that are right the one that takes the least time."""
        if is_like(memory, given):
            return f"empty_like({memory.like})"
        shape = [self._name(size) for size in memory.shape]
        for name, t in given.items():
            if t is not None and t.dtype == memory.dtype:
                return f"{name}.new_empty({', '.join(shape)})"
        first = next(name for name, t in given.items() if t is not None)
        return f"{first}.new_empty(({', '.join(shape)},), dtype={self._name(memory.dtype)})"

    def _name(self, value: Any) -> str:
        """A name for a value in the source."""
        if value is None or type(value) is bool:
            return repr(value)
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    def _changed(self, plan: "Plan") -> str:
        """Whether the dispatcher would see something else than when this was recorded, or someone listens."""
        runtime, compilation = knobs.runtime, knobs.compilation
        parts = ["switch.off"]
        self.names["switch"] = Switch
        for hook in ("launch_enter_hook", "launch_exit_hook"):
            chain = self._name(getattr(runtime, hook))
            parts += [f"runtime.{hook} is not {chain}", f"{chain}.calls"]
        parts.append(f"runtime.debug is not {self._name(runtime.debug)}")
        parts.append(f"runtime.add_stages_inspection_hook is not {self._name(runtime.add_stages_inspection_hook)}")
        parts.append(f"compilation.instrumentation_mode is not {self._name(compilation.instrumentation_mode)}")
        parts += [f"{self._name(launch.kernel)}.pre_run_hooks" for launch in plan.launches]
        return " or ".join(parts)

    def _launch(self, launch: Any, compiled: Any) -> str:
        grid = (*launch.grid, 1, 1)[:3]
        values, written = [], []
        for name in launch.kernel.arg_names:
            value = launch.arguments.get(name, launch.constants.get(name))
            if name in launch.arguments and isinstance(value, str):
                written.append(f"{value}_")
                value = object()  # of which `_launcher` sees where it goes
            elif name in launch.arguments and isinstance(value, tuple):
                from .resident import descriptor

                tensor, *sides = value  # Boxes
                written.append(f"{self._name(descriptor)}({tensor}, {', '.join(map(self._name, sides))})")
                value = object()
            else:
                written.append(self._name(value))
            values.append(value)
        function, between, packed = _launcher(compiled, grid, values)
        arguments = f"({', '.join(written)},)" if packed else ", ".join(written)
        head = [*map(self._name, grid), "stream", self._name(compiled.function), *map(self._name, between)]
        return f"{self._name(function)}({', '.join(head)}, {arguments})"


def record(plan: "Plan", compiled: list[Any], inputs: Sequence[Tensor | None]) -> Recording | None:
    """A recording of what Triton's dispatcher has just launched, where replaying it is known to work."""
    listeners = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    if not KNOWN or Switch.off or any(kernel is None for kernel in compiled):
        return None
    return Recording(plan, compiled, inputs) if all(hasattr(hook, "calls") for hook in listeners) else None
