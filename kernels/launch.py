"""What every launcher needs: the arguments all of them take, and the facts of the device."""

import contextlib
import functools
import operator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs


class Weights(NamedTuple):
    """The tensors of one adapter, laid out as nn.Linear has them."""

    w_down: Tensor  # [R, D]
    b_down: Tensor | None  # [R]
    w_up: Tensor  # [D, R]
    b_up: Tensor | None  # [D]
    scale: Tensor | None  # [1] or [D]; takes the place of Options.scale


class Options(NamedTuple):
    activation: str
    scale: float
    dtype: torch.dtype  # of both products' operands, and of z


class Needs(NamedTuple):
    """Which gradients are asked for; backward returns them in this order.

    The gradient of a residual of its own is dy itself, so it is not among them.
    """

    x: bool
    w_down: bool
    b_down: bool
    w_up: bool
    b_up: bool
    scale: bool


TL_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _probe():
    pass


# TRITON_INTERPRET is read by @triton.jit when the kernels are defined, so what it made of them is the truth.
INTERPRETED = not isinstance(_probe, triton.JITFunction)


class Facts(NamedTuple):
    """What the configs depend on."""

    capability: tuple[int, int]
    multiprocessors: int


@functools.cache
def facts(device: torch.device) -> Facts:
    """Facts of a GPU; the interpreter takes the configs of Hopper, with few multiprocessors."""
    if INTERPRETED:
        return Facts((9, 0), 4)
    properties = torch.cuda.get_device_properties(device)
    # ROCm counts its cards otherwise: gfx942 is no Hopper.
    capability = (8, 0) if torch.version.hip else (properties.major, properties.minor)
    return Facts(capability, properties.multi_processor_count)


_itemsize = operator.attrgetter("itemsize")


def device_guard(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be x's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def scale_stride(scale: Tensor | None) -> int:
    """0 for one value, 1 for one per channel."""
    return int(scale is not None and scale.numel() > 1)


def stride_unit(*tensors: Tensor) -> int:
    """A number of elements that all the row strides are multiples of, for loads of 16 bytes: 8, else 1.

    Triton by itself only looks for multiples of 16.
    """
    return 8 if all(t.stride(0) % 8 == 0 for t in tensors) else 1


def dot_options(compute_dtype: torch.dtype) -> dict[str, Any]:
    """DOT, ACC and PRECISION.

    The interpreter multiplies the bit patterns of bf16, so operands are upcast to fp32 there.
    fp32 follows PyTorch's setting, whichever of its two interfaces made it; Triton's own default would be tf32.
    """
    tf32 = compute_dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "DOT": TL_DTYPE[torch.promote_types(compute_dtype, torch.float32) if INTERPRETED else compute_dtype],
        "ACC": tl.float64 if compute_dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
        "enable_fp_fusion": True,
    }


def widest(tensors: tuple[Tensor, ...]) -> torch.dtype:
    """The dtype that decides which tiles fit."""
    return max([t.dtype for t in tensors], key=_itemsize)


def tile_options(
    kernel: str, M: int, D: int, R: int, tensors: tuple[Tensor, ...], device: torch.device
) -> dict[str, int]:
    """BLOCK_M, BLOCK_D, BLOCK_R, num_warps and num_stages for a kernel that reads tiles of `tensors`."""
    return {**vars(configs.choose(kernel, M, D, R, widest(tensors), facts(device).capability))}
