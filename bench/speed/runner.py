"""One case: every provider made, gated and measured, a row for each of its modes."""

import contextlib
from collections.abc import Iterable, Iterator

from adapter_ops import explain

from . import measure
from .cases import PROVIDERS, Call, Case, Errors, Gate, Module
from .rows import Row


def run_case(
    case: Case, names: Iterable[str], modes: Iterable[str], seconds: float, floors: measure.Floors
) -> Iterator[list[Row]]:
    """The rows of one mode after another. What goes wrong with a provider costs it its figures, not the run."""
    sizes, dtype = vars(case.shape).values(), str(case.dtype).removeprefix("torch.")
    rows = {
        (name, mode): Row(name, case.device, dtype, mode, *sizes)
        for mode in modes
        for name in names
        if mode in PROVIDERS[name].modes
    }
    modules: dict[str, Module | None] = {}
    gate = Gate(case)
    known: dict[tuple[str, bool], Errors] = {}
    for (name, mode), row in rows.items():
        with noted(row):
            if name not in modules:
                modules[name] = case.make(name)
            module, key = modules[name], (name, mode == "fwd")
            if module is not None:
                errors = known[key] = known.get(key) or gate.check(name, module, mode)
                row.error, row.eager_error = errors.error, errors.eager
                if not errors.right:
                    row.note = f"wrong: {errors.ratio:.3g} times eager's error, not timed"
    del gate  # its fp64 results are larger than all that follows
    for mode in modes:
        of_mode = {name: row for (name, m), row in rows.items() if m == mode}
        fill(case, {n: modules[n] for n, row in of_mode.items() if not row.note}, mode, of_mode, seconds)
        moved, flops = measure.work(case.shape, case.dtype, mode)
        for row in of_mode.values():
            row.bytes, row.flops, row.floor_ms = moved, flops, floors.seconds(moved, flops) * 1e3
            row.copy_bytes_per_second, row.matmul_flops_per_second = floors.bandwidth, floors.rate
            row.percent_of_floor = None if row.ms is None else 100 * row.floor_ms / row.ms
            eager = of_mode.get("eager")
            if eager is not None:
                row.user_speedup = ratio(eager.user_ms, row.user_ms)
                row.kernel_speedup = ratio(eager.kernel_ms, row.kernel_ms)
            if row.provider == "adapter_ops" and not row.note:
                row.note = f"path {explain(case.xs[0], case.adapter.down.weight).name}"
        yield list(of_mode.values())


def fill(case: Case, modules: dict[str, Module | None], mode: str, rows: dict[str, Row], seconds: float) -> None:
    """Measures one mode of the providers that are right."""
    runs: dict[str, list[Call]] = {}
    for name, module in modules.items():
        with noted(rows[name]):
            if module is not None:
                rows[name].peak_bytes = measure.peak_memory(case, module, mode)
                if mode != "fwd":
                    rows[name].saved_bytes = measure.saved_bytes(case, module)
            calls = case.calls(module, mode)
            for call in calls:
                call()
            runs[name] = calls
    cuda = case.device == "cuda"
    if cuda:
        kernels = measure.measure_kernels(runs, seconds / 2)
        for name, samples in kernels.times.items():
            row = rows[name]
            row.kernel_ms, row.kernel_p20_ms, row.kernel_p80_ms = measure.quantiles(samples)
            row.launches = kernels.launches.get(name)
        for name, text in kernels.failures.items():
            rows[name].note = f"no kernel time: {text}"
    seconds = seconds / 2 if cuda else seconds
    for name, samples in measure.user_times(runs, seconds, min(seconds / 10, 0.05)).items():
        rows[name].user_ms, rows[name].user_p20_ms, rows[name].user_p80_ms = measure.quantiles(samples)


@contextlib.contextmanager
def noted(row: Row) -> Iterator[None]:
    """An exception becomes the row's note: a compiler's bug or a lack of memory is one provider's loss."""
    try:
        yield
    except Exception as error:
        row.note = measure.message(error)


def ratio(eager: float | None, own: float | None) -> float | None:
    return None if eager is None or own is None else eager / own
