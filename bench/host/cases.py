"""Calls of every kind, and a check that the first and the fourth of a kind launch what Triton's dispatcher would.

Between them inputs, results and parameters move to other addresses. Afterwards every kind is called once more, in
reverse order, so that each comes after another that it shares an adapter with. Nothing runs, so the kernels are
compiled without their bodies, in a fifth of the time: what is launched depends on their arguments alone.
"""

import ast
import contextlib
import functools
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import JITFunction

from adapter_ops import BottleneckAdapter
from adapter_ops.kernels.replay import dispatching

from .launches import Log, differences, extent, live, log, record

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A kind of call. Layouts are keys of LAYOUTS."""

    name: str
    shape: Sizes = (64,)
    D: int = 768
    R: int = 64
    dtype: torch.dtype = torch.bfloat16
    parameters: torch.dtype | None = None  # as dtype, where None
    x: str = "dense"
    residual: str | None = None
    residual_dtype: torch.dtype | None = None
    dy: str = "dense"
    weights: str = "dense"
    bias: bool = True
    scale: Any = 1.0
    activation: str = "gelu"
    frozen: tuple[str, ...] = ()
    dx: bool = True
    autocast: torch.dtype | None = None
    tf32: bool = False
    device: int = 0

    def tensor(self, layout: str, shape: Sizes, dtype: torch.dtype) -> Tensor:
        with torch.device("cuda", self.device):
            return LAYOUTS[layout](shape, dtype)


LAYOUTS: dict[str, Callable[[Sizes, torch.dtype], Tensor]] = {
    "dense": lambda shape, dtype: torch.empty(shape, dtype=dtype),
    "strided": lambda shape, dtype: torch.empty((*shape[:-1], 2 * shape[-1]), dtype=dtype)[..., : shape[-1]],
    "odd rows": lambda shape, dtype: torch.empty((*shape[:-1], shape[-1] + 3), dtype=dtype)[..., : shape[-1]],
    # One element behind an address that Triton takes for aligned.
    "offset": lambda shape, dtype: torch.empty(math.prod(shape) + 1, dtype=dtype)[1:].view(shape),
    "transposed": lambda shape, dtype: torch.empty((*shape[:-2], shape[-1], shape[-2]), dtype=dtype).mT,
    "cut": lambda shape, dtype: torch.empty((*shape[:-2], shape[-2] + 5, shape[-1]), dtype=dtype)[..., :-5, :],
    "expanded": lambda shape, dtype: torch.empty(shape[-1:], dtype=dtype).expand(shape),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BIASES, DOWN, UP = ("down.bias", "up.bias"), ("down.weight", "down.bias"), ("up.weight", "up.bias")
CASES = [
    Case("64 rows"),
    *[Case(f"{M} rows", (M,)) for M in (1, 2, 16, 65, 200, 1024, 4096, 65536)],
    Case("no rows", (0,)),
    Case("one dimension", ()),
    Case("3-D", (4, 16)),
    Case("4-D", (2, 4, 8)),
    Case("3-D, transposed", (4, 16), x="transposed"),
    Case("3-D, residual in fp32", (2, 8), residual="dense", residual_dtype=FP32),
    Case("3-D, autocast to fp16", (2, 8), parameters=FP32, autocast=FP16),
    Case("3-D, no rows, strided", (2, 0), x="strided"),
    Case("the first token of a sequence", (1, 1), x="cut"),
    Case("the first tokens of a sequence", (1, 4), x="cut"),
    Case("one dimension, residual in fp32", (), residual="dense", residual_dtype=FP32),
    Case("fp16", dtype=FP16),
    Case("fp32", dtype=FP32),
    Case("fp32, 4096 rows", (4096,), dtype=FP32),
    Case("fp32 parameters", parameters=FP32),
    Case("fp32 parameters, 8192 rows", (8192,), parameters=FP32),
    Case("bf16 parameters under fp32", dtype=FP32, parameters=BF16),
    Case("odd sizes", (37,), 100, 12),
    Case("odd sizes, fp32", (37,), 101, 7, FP32),
    Case("R = 8", (3, 7), 384, 8),
    Case("R = 256", (100,), 768, 256),
    Case("R = 256, 8192 rows", (8192,), 768, 256),
    Case("D = 4096", (64,), 4096),
    Case("D = 4096, R = 256, 4096 rows", (4096,), 4096, 256),
    Case("D = R", (64,), 64, 64),
    Case("one tensor for both weights", (64,), 64, 64, weights="tied"),
    Case("x strided", x="strided"),
    Case("1 row, strided", (1,), x="strided"),
    Case("x with odd rows", x="odd rows"),
    Case("x misaligned", x="offset"),
    Case("x misaligned, 4096 rows", (4096,), x="offset"),
    Case("x misaligned, 65536 rows", (65536,), x="offset"),
    Case("x transposed", x="transposed"),
    Case("x expanded", x="expanded"),
    Case("residual", residual="dense"),
    Case("residual, 65536 rows", (65536,), residual="dense"),
    Case("residual strided", residual="strided"),
    Case("residual misaligned", residual="offset"),
    Case("residual in fp32", residual="dense", residual_dtype=FP32),
    Case("residual is x", residual="x"),
    Case("weights misaligned", weights="offset"),
    Case("weights misaligned, 65536 rows", (65536,), weights="offset"),
    Case("weights strided", weights="strided"),
    Case("weights transposed", weights="transposed"),
    Case("no bias", bias=False),
    Case("no bias, 65536 rows", (65536,), bias=False),
    Case("frozen", frozen=(*DOWN, *UP)),
    Case("frozen, no dx", frozen=(*DOWN, *UP), dx=False),
    Case("frozen down", frozen=DOWN),
    Case("frozen up, no dx", frozen=UP, dx=False),
    Case("frozen biases", frozen=BIASES),
    Case("frozen but for a bias", frozen=(*DOWN, "up.weight")),
    Case("no dx", dx=False),
    Case("no dx, residual", dx=False, residual="dense"),
    Case("scale 0.5", scale=0.5),
    Case("scale 2", scale=2),
    Case("learned scale", scale="learned"),
    Case("learned scale, frozen", scale="learned", frozen=("scale",)),
    Case("channel scale", scale="channel"),
    Case("channel scale, 65536 rows", (65536,), scale="channel"),
    *[Case(name, activation=name) for name in ("relu", "silu", "gelu_tanh", "identity")],
    Case("dy strided", dy="strided"),
    Case("dy misaligned", dy="offset"),
    Case("dy transposed", dy="transposed"),
    Case("dy of a sum", dy="sum"),
    Case("autocast", dtype=FP32, autocast=BF16),
    Case("autocast to fp16, bf16 x", parameters=FP32, autocast=FP16),
    Case("other device", device=1),
    Case("other device, 65536 rows", (65536,), device=1),
    Case("tf32", dtype=FP32, tf32=True),
    Case("tf32, 4096 rows", (4096,), dtype=FP32, tf32=True),
]


def hollow() -> None:
    """Takes the bodies of the library's kernels away, and gives each an amount of shared memory to be told apart by."""
    with contextlib.suppress(ImportError, AttributeError):  # in Gluon, whose names change
        import adapter_ops.kernels.resident  # noqa: F401
    for module in [m for name, m in sys.modules.items() if name.startswith("adapter_ops.kernels.")]:
        for name, kernel in vars(module).items():
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                tree = ast.parse(kernel.src)
                tree.body[0].body = [ast.Pass()]  # type: ignore[attr-defined]
                kernel._unsafe_update_src(ast.unparse(tree))
    make = CUDABackend.make_llir

    def make_llir(self: Any, source: Any, metadata: dict[str, Any], *rest: Any) -> Any:
        text = str(source)
        made = make(self, source, metadata, *rest)
        metadata["shared"] = 16 * (1 + zlib.crc32(text.encode()) % 4096)
        return made

    CUDABackend.make_llir = make_llir


class Trace(NamedTuple):
    """The logs of one call without gradients, with them, and backward; and what its results look like."""

    logs: dict[str, Log]
    results: dict[str, Any]
    dispatched: int  # launches that went through Triton's dispatcher


@functools.cache
def _adapter(D: int, R: int, dtype: torch.dtype, tied: bool, device: int, **options: Any) -> BottleneckAdapter:
    return BottleneckAdapter(D, R, dtype=dtype, device="meta", **options).to_empty(device=torch.device("cuda", device))


def adapter(case: Case) -> BottleneckAdapter:
    """The adapter of a case, which it shares with others; its parameters lie where none lay before."""
    tied, dtype = case.weights == "tied", case.parameters or case.dtype
    options = {"bias": case.bias, "scale": case.scale, "activation": case.activation}
    module = _adapter(case.D, case.R, dtype, tied, case.device, **options)
    for name, p in module.named_parameters():
        p.requires_grad_(name not in case.frozen)
        p.data = case.tensor("dense" if tied or p.dim() < 2 else case.weights, tuple(p.shape), p.dtype)
    if tied:
        module.up.weight = module.down.weight
    return module


@contextlib.contextmanager
def _counting(found: list[int]) -> Iterator[None]:
    """Counts the calls of Triton's dispatcher."""
    run = JITFunction.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        found[0] += 1
        return run(*args, **kwargs)

    JITFunction.run = counted
    try:
        yield
    finally:
        JITFunction.run = run


def trace(case: Case, module: nn.Module) -> Trace:
    """One call of a kind, on inputs of its own."""
    shape = (*case.shape, case.D)
    x = case.tensor(case.x, shape, case.dtype).requires_grad_(case.dx)
    residual = None
    if case.residual == "x":
        residual = x
    elif case.residual:
        residual = case.tensor(case.residual, shape, case.residual_dtype or case.dtype).requires_grad_()
    inputs = {"x": x, "residual": residual, **dict(module.named_parameters())}
    present = {name: t for name, t in inputs.items() if t is not None}
    wanted = {name: t for name, t in present.items() if t.requires_grad and not (name == "residual" and t is x)}
    names, dispatched = {name: extent(t) for name, t in present.items()}, [0]
    logs: dict[str, Log] = {}
    results: dict[str, Any] = {}
    context: Any = contextlib.nullcontext()
    if case.autocast is not None:
        context = torch.autocast("cuda", dtype=case.autocast)
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    matmul.fp32_precision = "tf32" if case.tf32 else before
    try:
        with _counting(dispatched):
            with context:
                with torch.no_grad():
                    launched, y = record(lambda: module(x, residual))
                logs["no_grad"], results["no_grad"] = log(launched, {**names, "y": extent(y)}), _look(y)
                launched, y = record(lambda: module(x, residual))
            names["y"] = extent(y)
            logs["forward"], results["forward"] = log(launched, names), _look(y)
            if wanted:
                # What forward keeps for backward has the same name there.
                kept = [p for p in logs["forward"].scratch.values() if live(p)]
                names |= {f"saved{i}": p for i, p in enumerate(kept)}
                dy = None if case.dy == "sum" else case.tensor(case.dy, shape, y.dtype)
                if dy is not None:
                    names["dy"] = extent(dy)
                root = y.sum() if dy is None else y
                launched, gradients = record(lambda: torch.autograd.grad(root, list(wanted.values()), dy))
                # A gradient that autograd summed may or may not lie where a kernel wrote its part.
                summed = {case.residual == "x" and "x", case.weights == "tied" and "down.weight"}
                names |= {f"d {name}": extent(t) for name, t in zip(wanted, gradients) if name not in summed}
                logs["backward"] = log(launched, names)
                results["backward"] = {name: _look(t) for name, t in zip(wanted, gradients)}
    finally:
        matmul.fp32_precision = before
    return Trace(logs, results, dispatched[0])


def _look(t: Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), t.dtype, t.stride(), t.requires_grad, t.data_ptr() % 16


def compare(expected: Trace, found: Trace) -> list[str]:
    """What differs, call by call."""
    wrong = []
    for part in expected.logs:
        wrong += [f"{part}: {each}" for each in differences(expected.logs[part], found.logs[part])]
        if (want := expected.results[part]) != (have := found.results[part]):
            wrong.append(f"{part}: the results are {have}, expected {want}")
    return wrong


def check(case: Case) -> tuple[Trace, list[str], int]:
    """The reference of a case, what differs from it in words, and how many launches the fourth call dispatched."""
    module = adapter(case)
    first, *_, fourth = trace(case, module), trace(case, module), trace(case, module), trace(case, adapter(case))
    with dispatching():
        reference = trace(case, adapter(case))
    wrong = [f"first call, {each}" for each in compare(reference, first)]
    wrong += [f"fourth call, {each}" for each in compare(reference, fourth)]
    for part in ("no_grad", "forward"):
        if math.prod(case.shape) and "'y'" not in repr(reference.logs[part].rows):
            wrong.append(f"{part}: no launch writes y")
    return reference, wrong, fourth.dispatched


def check_all() -> bool:
    """Prints what was found of every case; True where nothing differs."""
    hollow()
    references, right, total, dispatched = [], True, 0, 0
    for case in CASES:
        reference, wrong, count = check(case)
        references.append(reference)
        kernels = [row[0] for each in reference.logs.values() for row in each.rows]
        print(f"{case.name}: {', '.join(kernels)}; {count} dispatched by the fourth call", flush=True)
        print("".join(f"    {each}\n" for each in wrong), end="")
        right &= not wrong
        total, dispatched = total + len(kernels), dispatched + count
    for case, reference in reversed(list(zip(CASES, references))):
        wrong = compare(reference, trace(case, adapter(case)))
        print("".join(f"{case.name}: called again, {each}\n" for each in wrong), end="")
        right &= not wrong
    print(f"{len(CASES)} cases; the fourth calls dispatched {dispatched} of {total} launches")
    print("all launches are equal" if right else "launches differ")
    return right
