"""python -m bench.traffic: the bytes that every kernel moves, counted in Triton's interpreter and held to formulas.

Logical bytes are those asked for: what crosses from L2 to the multiprocessors. Compulsory bytes are the distinct ones,
read and written: what must cross from memory even if L2 catches every re-use within a kernel. A masked-off lane asks
for nothing; lanes that ask for one address count each. Counted is the source as written, before a compiler merges or
drops a load, and kernels only, not the launchers' PyTorch calls.

Small shapes are counted, and must equal the formulas to the byte (exit status 1 otherwise). Then the formulas, with
the tiles and slices that the launchers choose on Hopper, give a model at real sizes; nothing runs there.
"""

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, so before the imports

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton import cdiv
from triton.runtime.interpreter import InterpreterBuilder

from adapter_ops.kernels import backward, configs, forward, launch
from adapter_ops.kernels.launch import Facts, Needs, Options, Weights

from .cases import Shape

SHAPES = ",".join(f"65536x{D}x{R}" for D in (768, 1024, 4096) for R in (8, 64, 256))
HOPPER = Facts((9, 0), 132)
FLOOR = {"forward": 2, "backward": 3}  # tensors [M, D] moved: x, y; dy, x, dx
EAGER = {"forward": 5, "backward": 8}  # by the unfused PyTorch module
COUNTED: list[tuple[str, dict[str, Any]]] = [  # sizes that divide by no tile, and what to pass to `step`
    ("77x52x11", {"dtype": torch.float32}),
    ("301x150x11", {"dtype": torch.float32}),
    ("301x150x11", {"parameter_dtype": torch.float32}),
    ("301x130x70", {}),
    ("301x130x70", {"save_z": False}),
    ("301x130x70", {"bias": False}),
    ("301x130x70", {"own_residual": True}),
    ("301x130x70", {"scale": "one", "needs": "x w_down b_down w_up b_up scale"}),
    ("301x130x70", {"scale": "channel", "needs": "x w_down b_down w_up b_up scale"}),
    ("301x130x70", {"needs": "x"}),
    ("301x130x70", {"needs": "w_down b_up"}),
]

Times = dict[str, int]  # argument -> how often each of its elements is asked for; a tensor that is None moves nothing
PARTIALS: Times = dict.fromkeys(("up_partial_ptr", "b_up_partial_ptr", "down_partial_ptr", "b_down_partial_ptr"), 1)


# The formulas: of a launch's arguments and grid, (times read, times written). kernels/README.md has their sums.
def forward_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """A program reads its rows of x, as x and as the residual, and all weights."""
    programs = cdiv(a.M, a.BLOCK_M)
    weights = dict.fromkeys(("w_down_ptr", "b_down_ptr", "w_up_ptr", "b_up_ptr"), programs)
    scale = programs * (1 if a.SCALE_STRIDE else a.D)
    return {"x_ptr": 1, "residual_ptr": 1, "scale_ptr": scale} | weights, {"y_ptr": 1, "z_ptr": 1}


def dz_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """A program reads its rows of dy and z, and all of W_up; where only h is wanted, just z."""
    need_dz = a.dz_ptr is not None
    programs = need_dz * cdiv(a.M, a.BLOCK_M)
    return {"dy_ptr": need_dz, "z_ptr": 1, "w_up_ptr": programs, "scale_ptr": programs}, {"dz_ptr": 1, "h_ptr": 1}


def weights_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every block of columns reads dz and h; every slice reads W_down and writes partial sums."""
    columns, slices = cdiv(a.D, a.BLOCK_D), a.grid[1]
    dx, up, down = (p is not None for p in (a.dx_ptr, a.up_partial_ptr, a.down_partial_ptr))
    need_dy = up or a.b_up_partial_ptr is not None or (dx and a.ADD_DY)
    need_dz = dx or down or a.b_down_partial_ptr is not None
    reads = {"dy_ptr": need_dy, "x_ptr": down, "h_ptr": up * columns, "dz_ptr": need_dz * columns}
    return reads | {"w_down_ptr": dx * slices}, {"dx_ptr": 1} | PARTIALS


def reduce_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every partial sum is read once, and every gradient written once."""
    dscale, scale = a.dscale_ptr is not None, 1 if a.SCALE_STRIDE else a.D
    gradients = ("dw_up_ptr", "db_up_ptr", "dw_down_ptr", "db_down_ptr", "dscale_ptr")
    return PARTIALS | {"w_up_ptr": dscale, "b_up_ptr": dscale, "scale_ptr": scale}, dict.fromkeys(gradients, 1)


FORMULAS = {f.__name__: f for f in (forward_kernel, dz_kernel, weights_kernel, reduce_kernel)}


class Bytes(NamedTuple):
    logical: int
    compulsory: int


Traffic = dict[str, Bytes]  # "read x_ptr" and so on; arguments that are one tensor count under the first's name


@dataclass
class Launch:
    """A launch: forward or backward, the kernel, its arguments (and `grid`) by name, and what was counted if it ran."""

    phase: str
    kernel: str
    arguments: dict[str, Any]
    counted: Traffic

    def formula(self) -> Traffic:
        """What the formulas say. KeyError if the kernel has none, or if one names an argument that is not there."""
        traffic: Traffic = {}
        first = {id(value): name for name, value in reversed(self.arguments.items())}
        for action, times in zip(("read", "write"), FORMULAS[self.kernel](SimpleNamespace(**self.arguments))):
            for name, count in times.items():
                if (tensor := self.arguments[name]) is not None and count:
                    key = f"{action} {first[id(tensor)]}"
                    seen = traffic.get(key, Bytes(0, 0)).logical
                    traffic[key] = Bytes(seen + count * tensor.nbytes, tensor.nbytes)
        return traffic


@contextlib.contextmanager
def recorded(run: bool) -> Iterator[list[Launch]]:
    """The launches made inside, in order: run and counted, or neither, so that meta tensors will do.

    Running raises RuntimeError unless TRITON_INTERPRET was set when the kernels were defined.
    """
    if run and not launch.INTERPRETED:
        raise RuntimeError("the kernels are compiled: nothing can be counted without TRITON_INTERPRET=1")
    launches: list[Launch] = []
    accesses: dict[str, list[np.ndarray]] = {"read": [], "write": []}  # addresses of elements, of one launch
    function: Any = type(forward.forward_kernel)
    builder: Any = InterpreterBuilder
    original_run, original_load = function.run, builder.create_masked_load
    original_store = builder.create_masked_store

    def run_kernel(kernel: Any, *args: Any, **options: Any) -> None:
        names = (*kernel.arg_names, "grid")
        arguments = dict(zip(names, args)) | {name: v for name, v in options.items() if name in names}
        if run:
            original_run(kernel, *args, **options)
        phase = kernel.fn.__module__.rpartition(".")[2]
        launches.append(Launch(phase, kernel.__name__, arguments, _counted(accesses, arguments)))
        accesses.update(read=[], write=[])

    # tl.load and tl.store without a mask, and those of tensor descriptors, come through these two as well.
    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        accesses["read"].append(pointers.data[mask.data])
        return original_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        accesses["write"].append(pointers.data[mask.data])
        return original_store(self, pointers, value, mask, *rest)

    with (
        patch.object(function, "run", run_kernel),
        patch.multiple(builder, create_masked_load=load, create_masked_store=store),
    ):
        yield launches


def _counted(accesses: dict[str, list[np.ndarray]], arguments: dict[str, Any]) -> Traffic:
    """Each address belongs to the tensor that starts last before it."""
    named = {t.data_ptr(): (name, t.itemsize) for name, t in reversed(arguments.items()) if isinstance(t, Tensor)}
    starts = np.array(sorted(named), dtype=np.uint64)
    traffic: Traffic = {}
    for action, arrays in accesses.items():
        addresses = np.concatenate([np.empty(0, np.uint64), *arrays])
        owners = np.searchsorted(starts, addresses, side="right") - 1
        for owner in np.unique(owners):
            name, itemsize = named[int(starts[owner])]
            own = addresses[owners == owner]
            traffic[f"{action} {name}"] = Bytes(own.size * itemsize, np.unique(own).size * itemsize)
    return traffic


def step(
    shape: Shape,
    *,
    dtype: torch.dtype = torch.bfloat16,  # of x and the products
    parameter_dtype: torch.dtype | None = None,  # as `dtype` by default
    save_z: bool = True,  # without z there is no backward
    needs: str = "x w_down b_down w_up b_up",  # the gradients asked for
    own_residual: bool = False,  # rather than x; its rows have stride 2·D
    bias: bool = True,
    scale: str = "number",  # or "one", a tensor [1], or "channel", a tensor [D]
    device: str = "cpu",
) -> None:
    """Forward's and backward's launchers, on zeros."""

    def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    def parameter(*size: int, wanted: bool = True) -> Any:
        return zeros(*size, dtype=parameter_dtype or dtype) if wanted else None

    M, D, R = shape.M, shape.D, shape.R
    x, options = zeros(M, D), Options("gelu", 1.0, dtype)
    residual = zeros(M, 2 * D)[:, :D] if own_residual else x
    b_down, b_up = parameter(R, wanted=bias), parameter(D, wanted=bias)
    scales = parameter(D if scale == "channel" else 1, wanted=scale != "number")
    weights = Weights(parameter(R, D), b_down, parameter(D, R), b_up, scales)
    z = forward.forward(x, residual, weights, options, save_z)[1]
    if z is not None:
        wanted = Needs(**{name: name in needs.split() for name in Needs._fields})
        backward.backward(zeros(M, D), x, z, weights, options, wanted, not own_residual)


def total(traffics: Iterable[Traffic]) -> Bytes:
    """The sum over launches and tensors."""
    every = [moved for traffic in traffics for moved in traffic.values()]
    return Bytes(sum(b.logical for b in every), sum(b.compulsory for b in every))


def planned(shape: Shape, **arguments: Any) -> list[Launch]:
    """The launches of `step` as HOPPER would have them; nothing runs."""
    with patch.object(launch, "facts", lambda device: HOPPER), recorded(run=False) as launches:
        step(shape, device="meta", **arguments)
    return launches


def model(shape: Shape) -> dict[str, Bytes]:
    """Bytes by formula of "forward" (z saved) and "backward" (all gradients but the scale's), bf16, on HOPPER."""
    launches = planned(shape)
    return {phase: total(one.formula() for one in launches if one.phase == phase) for phase in FLOOR}


def print_counted() -> bool:
    """Count COUNTED and print it beside the formulas; are all equal?"""
    print(f"{'bytes counted = by formula':<28} {'logical':>21} {'compulsory':>21}")
    equal = True
    for shape, arguments in COUNTED:
        print(shape, *(f"{name}={value}" for name, value in arguments.items()))
        with recorded(run=True) as launches:
            step(Shape.parse(shape), **arguments)
        for one in launches:
            formula = one.formula()
            signs = (f"{c:>10} = {f:<8}" for c, f in zip(total([one.counted]), total([formula])))
            print(f"{one.kernel:>28}", *signs, "OK" if one.counted == formula else "MISMATCH")
            for tensor in sorted({t for t, _ in one.counted.items() ^ formula.items()}):
                print(f"  {tensor}: counted {one.counted.get(tensor)}, by formula {formula.get(tensor)}")
                equal = False
    return equal


def print_model(shapes: list[Shape]) -> None:
    """The formulas at real sizes, as ratios to the floors and to eager's bytes."""
    print(f"\nmodel, not measured: bf16, launch configs of compute capability 9.0, {HOPPER.multiprocessors} SMs")
    print("floor: 4Md forward, 6Md backward; eager: 10Md and 16Md; Md stands for M·D elements")
    print(f"{'':>26}  {'× floor':>20} {'× eager':>20}")
    print(f"{'M×D×R':>16} {'pass':>10}" + f" {'logical':>9} {'compulsory':>10}" * 2)
    for shape in shapes:
        for phase, moved in model(shape).items():
            units = (2 * shape.M * shape.D * tensors[phase] for tensors in (FLOOR, EAGER))
            ratios = (f"{moved.logical / unit:>9.3f} {moved.compulsory / unit:>10.3f}" for unit in units)
            print(f"{f'{shape.M}×{shape.D}×{shape.R}':>16} {phase:>10}", *ratios)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="of the model: MxDxR, comma-separated (default: %(default)s)")
    shapes = [Shape.parse(s) for s in parser.parse_args(argv).shapes.split(",")]
    if any(shape.R > configs.MAX_BOTTLENECK for shape in shapes):
        parser.error(f"the kernels hold a bottleneck of at most {configs.MAX_BOTTLENECK}")
    equal = print_counted()
    print_model(shapes)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
