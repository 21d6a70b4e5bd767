"""Any call, however its tensors lie in memory, gives eager's values and gradients: hypothesis draws the calls.

The other tests take one oddity at a time; here they meet.
"""

import functools

import pytest
import torch
from helpers import Call, Named, Wrapper, bare, check_with_neighbors, slack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter_ops import bottleneck_adapter, reference
from adapter_ops.kernels.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [(torch.float32, None), (torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]


def wider(t, columns, offset):
    """In the middle of wider rows, from an address that need not be a multiple of 16."""
    wide = t.new_zeros(t.shape[0], t.shape[1] + columns)
    wide[:, offset : offset + t.shape[1]] = t
    return wide[:, offset : offset + t.shape[1]]


LAYOUTS = {
    "dense": lambda t: t,
    "row-strided": lambda t: wider(t, 8, 0),
    "row-strided, misaligned": lambda t: wider(t, 5, 3),
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "columns first": lambda t: t.t().contiguous().t(),
    "every other column": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "one row": lambda t: t[:1].expand_as(t),
    "one number": lambda t: t[:1, :1].expand_as(t),
    "overlapping rows": lambda t: torch.cat([t.flatten(), t[0]])[: 3 * len(t) + t.shape[1]].unfold(0, t.shape[1], 3)[
        : len(t)
    ],
}

WRITES = {
    "nothing": lambda y, h: y * 1,
    "y += h": lambda y, h: y.add_(h),
    "tanh_": lambda y, h: y.tanh_(),  # smooth: a rounding across the kink of relu_ would be no error of ours
    "h += y": lambda y, h: (h + 0).add_(y),
    "a view of y": lambda y, h: (y[..., :1].mul_(2), y)[1],
}


@st.composite
def calls(draw):
    dtype, parameter_dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 99)))
    call = Call(
        M=draw(st.sampled_from([1, 2, 6, 17, 40, 66])),
        D=draw(st.sampled_from([8, 20, 33])),  # below, a gradient is few sums that may cancel, where eager has luck
        R=draw(st.sampled_from([4, 7, 18])),
        dtype=dtype,
        parameter_dtype=parameter_dtype,
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        scale=draw(st.sampled_from([1.0, 0.5, "one", "channel"])),
        own_residual=draw(st.booleans()),
        bias=draw(st.booleans()),
    )
    for name in ("x", "residual", "w_down", "w_up"):
        if name in call.inputs and call.inputs[name].shape[0] > (name.startswith("w")):
            layouts = list(LAYOUTS) if name in ("x", "residual") else list(LAYOUTS)[:6]
            call.inputs[name] = LAYOUTS[draw(st.sampled_from(layouts))](call.inputs[name])
    call.dy = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](call.dy)
    return call


def run(call, function, wanted, dtype, lead, write, kind):
    """y and the gradients, in `dtype` or each tensor's own; x, residual and dy with the leading dimensions `lead`."""
    inputs = {n: t.detach() if dtype is None else t.detach().to(dtype) for n, t in call.inputs.items()}
    if kind is not None:
        inputs["x"] = kind(inputs["x"]) if kind is Wrapper else inputs["x"].as_subclass(Named)
    leaves = {n: t.requires_grad_(n in wanted) for n, t in inputs.items()}
    shaped = {n: t.view(*lead, -1, t.shape[-1]) if n in ("x", "residual") else t for n, t in leaves.items()}
    y = WRITES[write](call(function, **shaped), shaped["x"].detach().cos())
    dy = call.dy.to(dtype or y.dtype).view(y.shape)
    found = (
        torch.autograd.grad(y, [leaves[n] for n in wanted], Wrapper(dy) if kind is Wrapper else dy) if wanted else ()
    )
    return {n: bare(t.detach()) for n, t in zip(("y", *wanted), (y, *found))}


@pytest.mark.parametrize("which", ["interpreter", "cpu"])
def test_any_call(request, use_path, which):
    use_path({"interpreter": "triton"}.get(which, which))

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        call = data.draw(calls())
        wanted = [n for n in call.inputs if data.draw(st.booleans())]
        lead = data.draw(st.sampled_from([(), (1,), (len(call.dy),)]))
        write = data.draw(st.sampled_from(list(WRITES)))
        kind = data.draw(st.sampled_from([None, None, None, Named, Wrapper]))
        formula = functools.partial(reference.bottleneck_adapter, compute_dtype=call.dtype)

        def results(call):
            return (
                run(call, bottleneck_adapter, wanted, None, lead, write, kind),
                run(call, formula, wanted, None, lead, write, kind),
                run(call, reference.bottleneck_adapter, wanted, torch.float64, lead, write, None),
            )

        check_with_neighbors(call, results, slack(which, call.dtype))

    check()
