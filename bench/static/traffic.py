"""python -m bench traffic: the bytes that every kernel moves, counted in Triton's interpreter and held to formulas.

Logical bytes are those asked for: what crosses from L2 to the multiprocessors. Compulsory bytes are the distinct ones,
read and written: what must cross from memory even if L2 catches every re-use within a kernel. A masked-off lane asks
for nothing; lanes that ask for one address count each. Counted is the source as written, before a compiler merges or
drops a load, and kernels only, not PyTorch's calls around them.

Small shapes are counted, and must equal the formulas to the byte (exit status 1 otherwise). Then the formulas, with
the plans for a Hopper card, give a model at real sizes; nothing runs there. The kernel
of resident.py, which no interpreter runs, has a formula only.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from adapter_ops.kernels import backward, forward
from adapter_ops.kernels.plan import INTERPRETED, Boxes, Plan
from adapter_ops.kernels.problem import (
    UNTUNED,
    Needs,
    Options,
    Target,
    Tuning,
    Weights,
    backward_problem,
    forward_problem,
)

from ..cli import Parser
from ..shape import SHAPES_HELP, Shape
from .formulas import FORMULAS, NOT_COUNTED, Part

SIZES = ((768, 8), (768, 64), (768, 256), (1024, 64), (4096, 64), (4096, 256))
SHAPES = [*(Shape(65536, *size) for size in SIZES), Shape(16, 4096, 64)]
HOPPER = Target((9, 0), 132, unmeasured=True)
INTERPRETER = Target((9, 0), 4, interpreted=True)
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
    # The pair of split.py, with D in splits.
    ("13x300x11", {}),
    ("13x300x11", {"save_z": False}),
    ("13x300x11", {"bias": False}),
    ("13x300x11", {"own_residual": True, "scale": "one"}),
    ("13x300x21", {"scale": "channel", "needs": "x w_down b_down w_up b_up scale"}),
    ("77x300x40", {"dtype": torch.float32}),
    ("13x300x11", {"tuning": Tuning(form="split", splits=3)}),
    ("13x300x21", {"tuning": Tuning(form="split", splits=2), "save_z": False, "bias": False}),
    ("77x300x40", {"tuning": Tuning(form="split", splits=2), "dtype": torch.float32, "scale": "channel"}),
    # The pair with D in one piece, and backward with R in blocks.
    ("13x50x14", {}),
    ("13x50x21", {"parameter_dtype": torch.float32}),
    ("301x130x300", {}),
    ("140x36x140", {"save_z": False, "bias": False}),
    ("140x36x140", {"own_residual": True, "needs": "x"}),
    ("140x36x140", {"scale": "one", "needs": "x w_down b_down w_up b_up scale"}),
    ("140x36x140", {"scale": "channel", "needs": "x w_down b_down w_up b_up scale"}),
    ("140x36x140", {"needs": "w_down b_up"}),
    # Rows of several tasks, some without one: fused, the pair, and R in blocks.
    ("301x130x70", {"counts": (9, 130, 0, 1, 161)}),
    ("301x130x70", {"counts": (70, 0, 231), "own_residual": True, "scale": "channel", "needs": "x w_up scale"}),
    ("43x50x14", {"counts": (3, 17, 0, 22, 1)}),
    ("43x50x14", {"counts": (0, 20, 23), "scale": "one", "needs": "w_down b_down w_up b_up scale"}),
    ("140x36x140", {"counts": (7, 66, 1, 66)}),
    ("140x36x140", {"counts": (1, 0, 139), "own_residual": True, "bias": False, "needs": "x w_down"}),
]


class Bytes(NamedTuple):
    logical: int
    compulsory: int


Traffic = dict[str, Bytes]  # "read x_ptr" and so on; arguments that are one tensor count under the first's name


@dataclass
class Counted:
    """A launch: the kernel, its arguments and constants (and `grid`) by name, and what was counted if it ran."""

    kernel: str
    arguments: dict[str, Any]
    counted: Traffic

    def formula(self) -> Traffic:
        """What the formulas say. KeyError if the kernel has none, or if one names an argument that is not there."""
        traffic: Traffic = {}
        first = {id(value): name for name, value in reversed(self.arguments.items())}
        for action, times in zip(("read", "write"), FORMULAS[self.kernel](SimpleNamespace(**self.arguments))):
            for name, count in times.items():
                part = count if isinstance(count, Part) else Part(Fraction(count), Fraction(1))
                if (tensor := self.arguments[name]) is not None and part.times:
                    key = f"{action} {first[id(tensor)]}"
                    seen = traffic.get(key, Bytes(0, 0))
                    logical, touched = (share * tensor.nbytes for share in part)
                    traffic[key] = Bytes(seen.logical + int(logical), max(seen.compulsory, int(touched)))
        return traffic


@contextlib.contextmanager
def counting() -> Iterator[dict[str, list[np.ndarray]]]:
    """Addresses of the elements that kernels read and write inside, in the interpreter."""
    accesses: dict[str, list[np.ndarray]] = {"read": [], "write": []}
    builder: Any = InterpreterBuilder
    original_load, original_store = builder.create_masked_load, builder.create_masked_store

    # tl.load and tl.store without a mask, and those of tensor descriptors, come through these two as well.
    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        accesses["read"].append(pointers.data[mask.data])
        return original_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        accesses["write"].append(pointers.data[mask.data])
        return original_store(self, pointers, value, mask, *rest)

    with patch.multiple(builder, create_masked_load=load, create_masked_store=store):
        yield accesses


def traced(plan: Plan, tensors: dict[str, Any], run: bool, counts: Sequence[int] | None = None) -> list[Counted]:
    """The launches of a plan, in order: run and counted, or neither, so that meta tensors will do.

    `counts`: how many rows have no task, task 0 and so on, where rows have tasks.

    Running raises RuntimeError unless TRITON_INTERPRET was set when the kernels were defined.
    """
    if run and not INTERPRETED:
        raise RuntimeError("the kernels are compiled: nothing can be counted without TRITON_INTERPRET=1")
    found = []
    sides = {one.arguments["ends_ptr"]: one.arguments["side"] for one in plan.launches if "ends_ptr" in one.arguments}
    for launch in plan.launches:
        values = {n: v.tensor if isinstance(v, Boxes) else v for n, v in launch.arguments.items()}
        named = {n: tensors[v] if isinstance(v, str) else v for n, v in values.items()}
        accesses: dict[str, list[np.ndarray]] = {}
        if run:
            with counting() as accesses:
                launch(tensors)
        arguments = named | launch.constants | {"grid": launch.grid, "counts": counts}
        arguments["sides"] = {n: sides[v] for n, v in launch.arguments.items() if v in sides}
        found.append(Counted(launch.kernel.__name__, arguments, attributed(accesses, named)))
    return found


def attributed(accesses: dict[str, list[np.ndarray]], arguments: dict[str, Any]) -> Traffic:
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
    target: Target,
    *,
    dtype: torch.dtype = torch.bfloat16,  # of x and the products
    parameter_dtype: torch.dtype | None = None,  # as `dtype` by default
    save_z: bool = True,  # without z there is no backward
    needs: str = "x w_down b_down w_up b_up",  # the gradients asked for
    own_residual: bool = False,  # rather than x; its rows have stride 2·D
    bias: bool = True,
    scale: str = "number",  # or "one", a tensor [1], or "channel", a tensor [D]
    tuning: Tuning = UNTUNED,
    counts: Sequence[int] | None = None,  # rows without a task, of task 0 and so on, in an order that is none
) -> dict[str, list[Counted]]:
    """The launches of "forward" and "backward", on zeros; they run where the target is interpreted."""
    run = target.interpreted

    def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device="cpu" if run else "meta")

    def parameter(*size: int, wanted: bool = True) -> Any:
        return zeros(*each, *size, dtype=parameter_dtype or dtype) if wanted else None

    M, D, R = shape.M, shape.D, shape.R
    each = () if counts is None else (len(counts) - 1,)
    index: list[Tensor] = []
    if counts is not None:
        assert sum(counts) == M
        order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
        index = [t if run else t.to("meta") for t in (order, torch.tensor(counts))]
    x, dy, options = zeros(M, D), zeros(M, D), Options("gelu", 1.0, dtype)
    residual = zeros(M, 2 * D)[:, :D] if own_residual else None
    b_down, b_up = parameter(R, wanted=bias), parameter(D, wanted=bias)
    scales = parameter(D if scale == "channel" else 1, wanted=scale != "number")
    weights = Weights(parameter(R, D), b_down, parameter(D, R), b_up, scales)
    before = forward.plan(forward_problem(x, residual, weights, options, save_z, target, tuning))
    tensors = before.tensors((x, residual, *weights, *index))
    found = {"forward": traced(before, tensors, run, counts), "backward": []}
    if save_z:
        z, wanted = tensors["z"], Needs(**{name: name in needs.split() for name in Needs._fields})
        described = backward_problem(dy, x, z, weights, options, wanted, residual is None, target, tuning)
        after = backward.plan(described)
        found["backward"] = traced(after, after.tensors((dy, x, z, *weights, *index)), run, counts)
    return found


def total(traffics: Iterable[Traffic]) -> Bytes:
    """The sum over launches and tensors."""
    every = [moved for traffic in traffics for moved in traffic.values()]
    return Bytes(sum(b.logical for b in every), sum(b.compulsory for b in every))


def printattributed() -> bool:
    """Count COUNTED and print it beside the formulas; are all equal?"""
    print(f"{'bytes counted = by formula':<28} {'logical':>21} {'compulsory':>21}")
    equal = True
    for shape, arguments in COUNTED:
        print(shape, *(f"{name}={value}" for name, value in arguments.items()))
        for one in itertools.chain(*step(Shape.parse(shape), INTERPRETER, **arguments).values()):
            formula = one.formula()
            signs = (f"{c:>10} = {f:<8}" for c, f in zip(total([one.counted]), total([formula])))
            print(f"{one.kernel:>28}", *signs, "OK" if one.counted == formula else "MISMATCH")
            for tensor in sorted({t for t, _ in one.counted.items() ^ formula.items()}):
                print(f"  {tensor}: counted {one.counted.get(tensor)}, by formula {formula.get(tensor)}")
                equal = False
    return equal


def print_model(shapes: list[Shape]) -> None:
    """The formulas at real sizes, z saved and all gradients but the scale's, as ratios to the floors and to eager."""
    print(f"\nmodel, not measured: bf16, launch configs of compute capability 9.0, {HOPPER.multiprocessors} SMs")
    print("floor: 4Md forward, 6Md backward; eager: 10Md and 16Md; Md stands for M·D elements; neither has the weights")
    print(f"{'':>26}  {'× floor':>20} {'× eager':>20}")
    print(f"{'M×D×R':>16} {'pass':>10}" + f" {'logical':>9} {'compulsory':>10}" * 2 + "  kernels (*: not counted)")
    for shape in shapes:
        for phase, launches in step(shape, HOPPER).items():
            moved = total(one.formula() for one in launches)
            names = (one.kernel.removesuffix("_kernel") + "*" * (one.kernel in NOT_COUNTED) for one in launches)
            units = (2 * shape.M * shape.D * tensors[phase] for tensors in (FLOOR, EAGER))
            ratios = (f"{moved.logical / unit:>9.3f} {moved.compulsory / unit:>10.3f}" for unit in units)
            print(f"{f'{shape.M}×{shape.D}×{shape.R}':>16} {phase:>10}", *ratios, "", *names)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench traffic", description=__doc__)
    parser.add_list("--shapes", Shape.parse, SHAPES, f"of the model: {SHAPES_HELP}")
    args = parser.parse_args(argv)
    equal = printattributed()
    print_model(args.shapes)
    return 0 if equal else 1
