"""The forms of forward, in order: the first one that fits is the one that runs. Nothing else chooses a form.

    resident  x stays in shared memory between its two uses (sm_90, many tokens)
    fused     one kernel, a program for each block of rows
    split     two kernels or three, which divide rows, columns and the bottleneck among programs

On a card a form runs only where MEASURED of configs.py says that such a card found it faster than PyTorch's own
operations, which run everywhere else; ADAPTER_OPS_UNMEASURED=1 lets every form run.
"""

import functools
from types import ModuleType

from . import configs, fused, replay, split
from .plan import UNMEASURED, Launch, Memory, Plan
from .problem import Problem


def plan(p: Problem) -> Plan:
    """What forward launches for a problem; a plan of the form "pytorch" launches nothing.

    Raises ValueError if `p.tuning` asks for a form that does not fit.
    """
    if p.M == 0:
        return _plan(p, "empty", "x has no rows", [])
    for form, make in FORMS.items():
        reason = _reason(p, form)
        if reason and (found := make(p, reason)):
            return found
    if p.tuning.form:
        raise ValueError(f"the form {p.tuning.form!r} does not fit {p}; forms: {', '.join(FORMS)}")
    return Plan(p, "pytorch", _no_form(p))


def _reason(p: Problem, form: str) -> str | None:
    """Why a form may run; None if it may not."""
    if p.tuning.form:
        return "asked for" if p.tuning.form == form else None
    if p.target.interpreted:
        return "TRITON_INTERPRET=1 runs the kernels on the CPU"
    for row in () if p.tasks else configs.measured(form, p.target):
        wide = row.columns < p.D or row.bottleneck < p.R
        if p.dtype.itemsize == row.itemsize and row.rows <= p.M and not wide:
            return f"faster than PyTorch on {row.card} (commit {row.commit}, {row.date})"
    return f"the first form that fits, as {UNMEASURED} is set" if p.target.unmeasured else None


def _no_form(p: Problem) -> str:
    """Why PyTorch's own operations run."""
    if p.tasks:
        return f"no card has run the kernels for the tasks of a batch; {UNMEASURED}=1 runs them all the same"
    rows = [row for form in FORMS for row in configs.measured(form, p.target)]
    if not rows:
        card = "compute capability {}.{}".format(*p.target.capability)
        return f"no kernel has been measured on {card}; {UNMEASURED}=1 runs them all the same"
    limits = (
        f"{r.form!r} with {r.itemsize}-byte operands from M={r.rows}, up to D={r.columns} and R={r.bottleneck}"
        for r in rows
    )
    return (
        f"M={p.M}, D={p.D}, R={p.R} in {p.dtype} is not among what {rows[0].card} found faster than PyTorch: "
        f"{'; '.join(limits)}. {UNMEASURED}=1 runs kernels all the same"
    )


@functools.cache
def _resident() -> ModuleType | None:
    """resident.py, where Triton is of a version that it was tried with: Gluon is experimental, and its names change."""
    if not replay.KNOWN:
        return None
    from . import resident

    return resident


def _resident_form(p: Problem, reason: str) -> Plan | None:
    """The copy engine takes 16-bit tensors of one dtype whose rows and starts are at multiples of 16 bytes."""
    one_dtype = p.x.dtype == p.parameter_dtype == p.dtype and p.dtype.itemsize == 2
    multiples = p.aligned and p.x.stride % 8 == p.D % 8 == p.R % 8 == 0
    if p.tasks or p.residual or p.target.interpreted or not (one_dtype and multiples):
        return None
    config, module = configs.resident(p), _resident()
    return _plan(p, "resident", reason, [module.launch(p, config)]) if config and module else None


def _fused_form(p: Problem, reason: str) -> Plan | None:
    """A tile holds all of R. With few or long rows the pair is faster, but it has not been measured on a card."""
    if not p.tuning.form:
        others_run = p.target.unmeasured or p.target.interpreted
        better_split = p.D > configs.FUSED_COLUMNS or not configs.fills_card(p)
        if not configs.holds_bottleneck(p) or (others_run and better_split):
            return None
    return _plan(p, "fused", reason, *fused.launches(p))


def _split_form(p: Problem, reason: str) -> Plan | None:
    """Any size."""
    return _plan(p, "split", reason, *split.launches(p))


FORMS = {"resident": _resident_form, "fused": _fused_form, "split": _split_form}


def _plan(p: Problem, form: str, reason: str, launches: list[Launch], scratch: dict[str, Memory] | None = None) -> Plan:
    outputs = {"y": Memory((p.M, p.D), p.y_dtype, like="x"), "z": Memory((p.M, p.R), p.dtype) if p.save_z else None}
    return Plan(p, form, reason, launches, outputs, scratch)
