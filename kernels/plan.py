"""Plan: what a problem's launches are, as a value; and the way they are made, first by Triton and then without it.

A plan says which form was chosen and why, which kernels run in which order with which arguments, and which tensors they
need. Tensors stand in it by name, so that a plan can be made, printed, compiled and counted where there is no card and
no tensor. `Plan.run` takes the tensors.

The first run goes through Triton's dispatcher, which compiles the kernels. `replay.py` makes the later ones.
"""

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import replay
from .problem import Problem, Target

TL_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# The inputs of a run, in order.
FORWARD = ("x", "residual", "w_down", "b_down", "w_up", "b_up", "scale")
BACKWARD = ("dy", "x", "z", "w_down", "b_down", "w_up", "b_up", "scale")
# What follows them where each row has a task (grouped.py): which row has each position, and how many rows a task has.
INDEX = ("order", "counts")


@triton.jit
def _probe():
    pass


# TRITON_INTERPRET is read by @triton.jit when the kernels are defined, so what it made of them is the truth.
INTERPRETED = not isinstance(_probe, triton.JITFunction)

UNMEASURED = "ADAPTER_OPS_UNMEASURED"


@functools.cache
def target(device: torch.device) -> Target:
    """The card of a device. The environment variable ADAPTER_OPS_UNMEASURED is read once, here.

    The interpreter takes the configs of Hopper, with few multiprocessors.
    """
    if INTERPRETED:
        return Target((9, 0), 4, interpreted=True)
    properties = torch.cuda.get_device_properties(device)
    # ROCm counts its cards otherwise: gfx942 is no Hopper.
    capability = (8, 0) if torch.version.hip else (properties.major, properties.minor)
    unmeasured = os.environ.get(UNMEASURED, "0") not in ("", "0")
    return Target(capability, properties.multi_processor_count, unmeasured=unmeasured)


class Memory(NamedTuple):
    """A tensor that a plan allocates. With `like`, it takes the shape [..., D] of that input, where this is dense."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    like: str | None = None

    def allocate(self, tensors: dict[str, Any], device: torch.device) -> Tensor:
        if replay.is_like(self, tensors):
            return torch.empty_like(tensors[self.like])  # type: ignore[index]
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class Boxes(NamedTuple):
    """A tensor that the copy engine reads or writes in boxes of rows by columns."""

    tensor: str
    rows: int
    columns: int


class Launch(NamedTuple):
    """One launch. An argument is a tensor's name, `Boxes` of it, a number, or None, by the kernel's own names."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]  # of the kernel's source, and Triton's options

    def values(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The arguments with tensors in the place of their names."""
        return {name: self._value(value, tensors) for name, value in self.arguments.items()}

    def __call__(self, tensors: dict[str, Any]) -> Any:
        """Through Triton's dispatcher, which returns the compiled kernel."""
        return self.kernel[self.grid](**self.values(tensors), **self.constants)

    def _value(self, value: Any, tensors: dict[str, Any]) -> Any:
        if isinstance(value, str):
            return tensors[value]
        return _descriptor(tensors[value.tensor], value) if isinstance(value, Boxes) else value

    def __str__(self) -> str:
        tiles = {name: v for name, v in self.constants.items() if name.startswith(("BLOCK", "STAGES", "num_"))}
        return f"{self.kernel.__name__}{list(self.grid)} " + " ".join(f"{name}={v}" for name, v in tiles.items())


def _descriptor(tensor: Tensor, boxes: Boxes) -> Any:
    from .resident import descriptor  # Gluon is experimental, so it is imported where a plan needs it

    return descriptor(tensor, boxes.rows, boxes.columns)


def dots(p: Problem) -> dict[str, Any]:
    """DOT, ACC and PRECISION, which every kernel with a product takes.

    The interpreter multiplies the bit patterns of bf16, so operands are upcast to fp32 there. Triton's own default for
    fp32 would be TF32.
    """
    dot = torch.promote_types(p.dtype, torch.float32) if p.target.interpreted else p.dtype
    return {
        "DOT": TL_DTYPE[dot],
        "ACC": TL_DTYPE[p.acc_dtype],
        "PRECISION": "tf32" if p.tf32 else "ieee",
        "enable_fp_fusion": True,
    }


def stride_unit(*strides: int) -> int:
    """A number of elements that all the row strides are multiples of, for loads of 16 bytes: 8, else 1.

    Triton by itself only looks for multiples of 16.
    """
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


class Plan:
    """What one problem launches.

    Args:
        problem: what it follows from.
        form: name of the kernels that run, "pytorch" where none do.
        reason: why it is this form.
        launches: in order.
        outputs: what a run returns, in order, by name; None for what is not asked for.
        scratch: what a run needs besides, by name.
    """

    def __init__(
        self,
        problem: Problem,
        form: str,
        reason: str,
        launches: Sequence[Launch] = (),
        outputs: dict[str, Memory | None] | None = None,
        scratch: dict[str, Memory] | None = None,
    ) -> None:
        self.problem: Problem = problem
        self.form: str = form
        self.reason: str = reason
        self.launches: tuple[Launch, ...] = tuple(launches)
        self.outputs: dict[str, Memory | None] = outputs or {}
        self.scratch: dict[str, Memory] = scratch or {}
        inputs = FORWARD if problem.needs is None else BACKWARD
        self.inputs: tuple[str, ...] = inputs + INDEX if problem.tasks else inputs
        self.offsets: list[int]
        self.bytes: int
        self.offsets, self.bytes = _layout(self.scratch)
        self.recording: replay.Recording | None = None
        self.dispatched: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and (self.problem, self.form) == (other.problem, other.form)

    def __hash__(self) -> int:
        return hash(self.problem)

    def __str__(self) -> str:
        p = self.problem
        tasks = f", T={p.tasks}" if p.tasks else ""
        lines = [f"{self.form} at M={p.M}, D={p.D}, R={p.R}{tasks}: {self.reason}", *map(str, self.launches)]
        return "\n  ".join(lines)

    def tensors(self, inputs: Sequence[Tensor | None]) -> dict[str, Any]:
        """By name: the inputs, and outputs and scratch tensors that are allocated here."""
        device = next(t.device for t in inputs if t is not None)
        given = dict(zip(self.inputs, inputs))
        made = {n: None if memory is None else memory.allocate(given, device) for n, memory in self.outputs.items()}
        buffer = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        for (name, memory), start in zip(self.scratch.items(), self.offsets):
            made[name] = buffer[start : start + _size(memory)].view(memory.dtype).view(memory.shape)
        return given | made

    def run(self, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Launches all kernels, and returns the outputs.

        Args:
            inputs: in the order of FORWARD or BACKWARD, and of INDEX where the problem has tasks, as the problem
                describes them, on one device. x, dy and the residual may have any number of dimensions where they are
                dense.
        """
        if self.recording is not None:
            found = self.recording.play(*inputs)
            if found is not None:
                return list(found)
        return self.dispatch(inputs)

    def dispatch(self, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """`run` through Triton's dispatcher, which compiles what it has not compiled yet."""
        tensors = self.tensors(inputs)
        with _on(next(t.device for t in inputs if t is not None)):
            compiled = [launch(tensors) for launch in self.launches]
        # A size that comes once is not worth a recording.
        if self.dispatched and self.recording is None and self.problem.aligned and not self.problem.target.interpreted:
            self.recording = replay.record(self, compiled, inputs)
        self.dispatched = True
        return [tensors[name] for name in self.outputs]


def _size(memory: Memory) -> int:
    return math.prod(memory.shape) * memory.dtype.itemsize


def _layout(scratch: dict[str, Memory]) -> tuple[list[int], int]:
    """Where each tensor starts in one piece of memory, at multiples of 256 bytes, and the size of that piece."""
    offsets, end = [], 0
    for memory in scratch.values():
        offsets.append(end)
        end += -(-_size(memory) // 256) * 256
    return offsets, end


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
