"""python -m adapter_ops: versions, devices, the backends of typical calls and why, and a self-check of these calls."""

import argparse
import importlib
import importlib.metadata
import logging
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import __version__, reference
from .functional import bottleneck_adapter, explain
from .reference import relative_error

DESCRIPTION = """\
Prints the versions and the devices of this machine, which backend typical adapter calls take on each device and why,
and checks the results of these calls: y and every gradient are compared with float64 eager PyTorch on the CPU, and
their error may be at most twice that of eager PyTorch in the same dtype, plus 8 roundings of the accumulator.
Exit status: 0 if every result is right, 1 if one is not, 2 if the arguments are wrong. Send the output with a bug
report. It uses no network and writes no file, but for the kernels that Triton compiles into its cache on a GPU."""
REPORT = """\
With a bug report send this output, the sizes, dtypes and devices of all arguments of the call, and what
print(adapter_ops.explain(x, w_down, ...)) or print(adapter.explain(x)) shows for it."""
SETTINGS = ("ADAPTER_OPS_REQUIRE", "ADAPTER_OPS_UNMEASURED", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
DRIVER = Path("/proc/driver/nvidia/version")

Results = dict[str, Any]  # tensors by name: inputs, or "y" and the gradients, which have a d before the input's name


class Call(NamedTuple):
    """A typical call. `full` calls also have a residual of their own and a learned scale [D]."""

    M: int
    D: int
    R: int
    dtype: torch.dtype
    full: bool = False

    def __str__(self) -> str:
        name = f"{self.M}x{self.D}x{self.R} {str(self.dtype).removeprefix('torch.')}"
        return name + ", residual, scale" * self.full

    def inputs(self) -> Results:
        """Random arguments of `bottleneck_adapter` on the CPU, the same in each run."""
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        M, D, R = self[:3]
        found = {"x": random(M, D), "w_down": random(R, D) / D**0.5, "b_down": random(R)}
        found |= {"w_up": random(D, R) / R**0.5, "b_up": random(D)}
        if self.full:
            found |= {"residual": random(M, D), "scale": 0.5 + random(D).abs()}
        return {name: t.to(self.dtype) for name, t in found.items()}


CALLS = (
    Call(4096, 768, 64, torch.float32),
    Call(4096, 768, 64, torch.bfloat16),
    Call(4096, 384, 64, torch.bfloat16, full=True),
    Call(1, 768, 64, torch.bfloat16),  # a step of decoding
)
# The interpreter is slow, and it truncates to bf16 where hardware rounds, which breaks the rule.
INTERPRETED = (Call(16, 768, 64, torch.float32), Call(16, 384, 64, torch.float32, full=True))


class Verdict(NamedTuple):
    """How far one result is from float64, and how far it may be."""

    name: str
    found: float
    eager: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.found <= self.allowed  # False for NaN


def errors(found: Results, eager: Results, oracle: Results) -> list[Verdict]:
    """The rule of this project: ‖found − oracle‖ is at most twice ‖eager − oracle‖, give or take a few roundings.

    Errors are relative to ‖oracle‖. The allowance is eight roundings in the dtype of the sums, for sums of few terms
    that cancel, where either side may be lucky. A result of another shape or dtype than eager's is infinitely wrong.

    Args:
        found, eager, oracle: results under equal names: those to judge, eager PyTorch's of the same inputs, and
            float64's.
    """
    rows = []
    for name, expected in oracle.items():
        f, e = found[name], eager[name]
        epsilon = 8 * torch.finfo(torch.promote_types(e.dtype, torch.float32)).eps
        off = relative_error(f, expected) if (f.shape, f.dtype) == (e.shape, e.dtype) else float("inf")
        eager_off = relative_error(e, expected)
        rows.append(Verdict(name, off, eager_off, 2 * eager_off + epsilon))
    return rows


def results(function: Callable[..., Tensor], inputs: Results, dy: Tensor | None) -> Results:
    """y, and where dy is given the gradients of all inputs."""
    if dy is None:
        with torch.no_grad():
            return {"y": function(**inputs)}
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    return _with_gradients(function(**inputs), inputs, dy)


def _with_gradients(y: Tensor, inputs: Results, dy: Tensor) -> Results:
    found = torch.autograd.grad(y, list(inputs.values()), dy.to(y.device, y.dtype))
    return {"y": y.detach(), **{f"d{name}": t for name, t in zip(inputs, found)}}


def oracle(given: Results) -> tuple[Results, Tensor]:
    """Results in float64 on the CPU, and the dy in the dtype of x that they are for."""
    inputs = {name: t.double().requires_grad_() for name, t in given.items()}
    y = reference.bottleneck_adapter(**inputs)
    # A part of dy lies along the adapter's own output. The gradient of the scale would else be a sum that cancels.
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    dy = (noise + y.detach() - inputs.get("residual", inputs["x"]).detach()).to(given["x"].dtype)
    return _with_gradients(y, inputs, dy), dy


def check(call: Call, device: str) -> tuple[list[str], list[str], bool]:
    """Lines of the table, for the call in inference and in training; which backends and why; whether all is right."""
    lines: list[str] = []
    reasons: list[str] = []
    right = True
    try:
        given = call.inputs()
        expected, dy = oracle(given)
        inputs = {name: t.to(device) for name, t in given.items()}
        eager = results(reference.bottleneck_adapter, inputs, dy)
        for mode, gradient in (("forward", None), ("training", dy)):
            with torch.set_grad_enabled(gradient is not None):
                backend = explain(**inputs)
            reasons.append(f"{backend.name}: {backend.reason}")
            found = results(bottleneck_adapter, inputs, gradient)
            rows = errors(found, eager, {name: expected[name] for name in found})
            # Of all results the one that is wrong, or nearest to it; a NaN is the worst.
            worst = max(rows, key=lambda row: (not row.right, row.found != row.found, row.found / row.allowed))
            verdict = "right" if worst.right else "WRONG: " + ", ".join(row.name for row in rows if not row.right)
            form = f" ({backend.plan.form})" if backend.plan is not None and backend.name == "triton" else ""
            lines.append(_line(call, mode, backend.name + form, worst.name, worst.found, worst.eager, verdict))
            right &= worst.right
    except Exception as error:  # a call of the user would raise it as well
        traceback.print_exc()
        first = f"{error}".partition("\n")[0]
        lines.append(f"  {call!s:38} WRONG: {type(error).__name__}: {first}")
        right = False
    return lines, reasons, right


def _line(call: Any, mode: str, backend: str, name: str, found: Any, eager: Any, verdict: str) -> str:
    found, eager = (f"{n:.1e}" if isinstance(n, float) else n for n in (found, eager))
    return f"  {call!s:38} {mode:8} {backend:18} {name:9} {found:>8} {eager:>8}  {verdict}"


def typical(device: str) -> tuple[Call, ...]:
    """The calls to try on a device. Triton's interpreter runs them where the kernels run on the CPU."""
    interpreted = device == "cpu" and explain(torch.zeros(1, 1), torch.zeros(1, 1)).name == "triton"
    return INTERPRETED if interpreted else CALLS


def devices() -> dict[str, str]:
    """A device of each kind, and what it is: the GPUs or other accelerators, or the CPU where PyTorch finds none."""
    found: dict[str, list[str]] = {}
    for device in _accelerators():
        found.setdefault(_describe(device), []).append(device)
    if not found:
        return {"cpu": _cpu()}
    return {first: f"{name}; {', '.join(rest)} the same" if rest else name for name, (first, *rest) in found.items()}


def _accelerators() -> list[str]:
    if torch.cuda.is_available():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.accelerator.is_available():
        return [f"{torch.accelerator.current_accelerator()}:{i}" for i in range(torch.accelerator.device_count())]
    return []


def _describe(device: str) -> str:
    if not device.startswith("cuda"):
        return f"an accelerator that the kernels do not run on, in {platform.machine()}"
    p = torch.cuda.get_device_properties(device)
    return f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    name = model[1] if model else platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def versions() -> list[str]:
    """Lines of versions and settings."""
    try:
        triton = f"Triton {importlib.import_module('triton').__version__}"
    except ImportError:
        triton = "Triton is missing, so no kernel can run"
    try:
        transformers = f"transformers {importlib.metadata.version('transformers')}"  # an import would take a second
    except importlib.metadata.PackageNotFoundError:
        transformers = "transformers is not installed"
    lines = [
        f"adapter_ops {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}, {triton}, "
        f"{transformers}",
        f"{platform.system()} {platform.release()} on {platform.machine()}; {_gpu_software()}",
    ]
    if settings := [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]:
        lines.append("environment: " + ", ".join(settings))
    return lines


def _gpu_software() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "this PyTorch is built without CUDA"
    driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
    return f"{built}, NVIDIA driver {driver[1]}" if driver else f"{built}, no NVIDIA driver found"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(argv: list[str] | None = None) -> int:
    """Prints the report; returns 0 if the self-check holds, else 1."""
    _Parser(prog="python -m adapter_ops", description=DESCRIPTION).parse_args(argv)
    print(*versions(), sep="\n")
    wrong = total = 0
    for device, name in devices().items():
        print(f"\n{device}: {name}")
        print(_line("call, M x D x R", "", "backend", "worst", "error", "eager's", "check"))
        why: list[str] = []
        for call in typical(device):
            total += 1
            lines, reasons, right = check(call, device)
            print(*lines, sep="\n", flush=True)
            why += reasons
            wrong += not right
        for reason in dict.fromkeys(why):
            print(f"  {reason}")
    print(f"\nself-check: {wrong} of {total} calls are WRONG" if wrong else f"\nself-check: {total} calls are right")
    print(REPORT)
    return 1 if wrong else 0


if __name__ == "__main__":
    logging.getLogger("adapter_ops").setLevel(logging.ERROR)  # the report itself says which backend runs
    sys.exit(main())
