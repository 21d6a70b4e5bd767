"""A plan's launches as one call into C (launch.c), which takes less time than Triton's launcher.

The C is compiled at the first recording of a process by the function that compiles Triton's own launcher, and kept in
Triton's cache. Where that fails, and for kernels that take more than addresses and numbers, a recording calls Triton's
launcher.
"""

import functools
import logging
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from triton.runtime.build import compile_module_from_src

if TYPE_CHECKING:
    from .plan import Plan

logger = logging.getLogger(__name__)

_INTEGERS = {"i32": 4, "u32": 4, "i64": 8, "u64": 8}  # Triton's names of types, and bytes
_MOST_SHARED = 228 << 10  # bytes; a launch with more shared memory needs an attribute


@functools.cache
def _module() -> Any:
    """The compiled launch.c, or None."""
    if torch.version.cuda is None:
        return None
    try:
        return compile_module_from_src(Path(__file__).with_name("launch.c").read_text(), "adapter_ops_launch")
    except Exception as error:  # no compiler, no headers, no place to write, an old driver
        logger.info("launches go through Triton's launcher, as launch.c was not compiled: %s", error)
        return None


def prepare(plan: "Plan", compiled: list[Any], tensors: list[str], inputs: int) -> tuple[Any, Any] | None:
    """The function that launches, and what it takes before the stream and the tensors; None where it cannot be used.

    `tensors` are the names of those it will be given, the inputs first and at the end "scratch", if the plan needs any,
    for all tensors in its scratch memory.
    """
    module = _module()
    if module is None or not all(_is_plain(kernel) for kernel in compiled):
        return None
    slots = {name: (slot, 0) for slot, name in enumerate(tensors)}
    slots |= {name: (slots.get("scratch", (-1, 0))[0], offset) for name, offset in zip(plan.scratch, plan.offsets)}
    kernels = []
    for launch, kernel in zip(plan.launches, compiled):
        parameters = _parameters(launch, kernel.src.signature, slots)
        if parameters is None:
            return None
        threads = 32 * kernel.metadata.num_warps
        grid = (*launch.grid, 1, 1)[:3]
        kernels.append((kernel.function, *grid, threads, kernel.metadata.shared, parameters))
    try:
        return module.launch, module.prepare(torch.Tensor.data_ptr, inputs, len(tensors), tuple(kernels))
    except ValueError as error:  # a version of Triton that gives its kernels other parameters
        logger.info("launches go through Triton's launcher: %s", error)
        return None


def _is_plain(kernel: Any) -> bool:
    """Whether a kernel is launched without attributes and has no memory of its own."""
    metadata = kernel.metadata
    asked = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size", "gsan_enabled")
    return (
        metadata.num_ctas == 1
        and metadata.shared <= _MOST_SHARED
        and not any(getattr(metadata, name, 0) or getattr(kernel.run, name, 0) for name in asked)
    )


def _parameters(
    launch: Any, signature: dict[str, str], slots: dict[str, tuple[int, int]]
) -> tuple[tuple[int, int, int], ...] | None:
    """(slot, bytes, value) of each parameter of a compiled kernel; None if one is no address and no number."""
    found = []
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        value = launch.arguments.get(name, launch.constants.get(name))
        if kind.startswith("*") and isinstance(value, str):
            slot, offset = slots[value]
            found.append((slot, 8, offset))
        elif kind in _INTEGERS and isinstance(value, int):
            found.append((-1, _INTEGERS[kind], value & (1 << 64) - 1))
        elif kind == "fp32" and isinstance(value, (int, float)):
            found.append((-1, 4, int.from_bytes(struct.pack("<f", value), "little")))
        else:
            return None
    return (*found, (-1, 8, 0), (-1, 8, 0))  # Triton's global and profile scratch memory, which these kernels lack
