"""Forward with x resident in shared memory. Gluon has no interpreter, so these need the card; its choice does not."""

import dataclasses

import pytest
import torch
from helpers import Call, check

from adapter_ops import bottleneck_adapter, explain
from adapter_ops.kernels import configs, forward
from adapter_ops.kernels.activations import ACTIVATIONS
from adapter_ops.kernels.problem import Problem, Rows, Target, Tuning

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
card = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="there is no Hopper GPU here")]


@pytest.fixture
def small(monkeypatch):
    """The form for any number of elements, with three programs so that each walks over tiles."""

    def tuning(call):
        row = next(v for (d, r), v in configs.RESIDENT.items() if d >= call.D and r >= call.R)
        config = configs.resident_config(call.D, call.R, *row, multiprocessors=1)
        return Tuning("resident", (("resident", dataclasses.replace(config, programs=3)),))

    monkeypatch.setattr(Call, "tuning", property(tuning))
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


class TestCard:
    pytestmark = card

    @pytest.mark.parametrize("M", [1, 63, 129, 1000])
    @pytest.mark.parametrize("D, R", [(8, 8), (392, 24), (512, 64), (768, 8), (768, 32), (768, 64), (1024, 128)])
    def test_sizes(self, small, M, D, R):
        check(Call(M, D, R, torch.bfloat16), "gpu")

    @pytest.mark.parametrize("scale", [0.3, "one", "channel"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_scale_bias_dtype(self, small, scale, bias, dtype):
        check(Call(500, 264, 40, dtype, scale=scale, bias=bias), "gpu")

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, small, activation):
        check(Call(300, 136, 16, torch.bfloat16, activation=activation), "gpu")

    def test_strided_rows(self, small):
        call = Call(300, 136, 16, torch.bfloat16)
        wide = torch.randn(300, 160, dtype=torch.bfloat16)
        wide[:, :136] = call.inputs["x"]
        strided = call(x=wide[:, :136])
        assert torch.equal(strided, call())

    def test_exact_products_and_equal_bits(self, small):
        call = Call(700, 264, 24, torch.bfloat16, activation="relu")
        for name, t in call.inputs.items():
            call.inputs[name] = torch.randint_like(t, -1, 2)
        y = call()
        z = call.inputs["x"].double() @ call.inputs["w_down"].double().T + call.inputs["b_down"]
        expected = call.inputs["x"] + z.relu() @ call.inputs["w_up"].double().T + call.inputs["b_up"]
        assert torch.equal(y, expected.to(torch.bfloat16)) and torch.equal(y, call())

    def test_infinity_stays_in_its_row(self, small):
        call = Call(300, 136, 24, torch.bfloat16, activation="relu")
        call.inputs["x"][7, 3] = float("inf")
        y = call()
        assert y[:7].isfinite().all() and y[8:].isfinite().all() and not y[7, 3].isfinite()

    def test_the_public_call_takes_it(self):
        """At a real size, by the real table."""
        x, w = torch.randn(32768, 768, device="cuda", dtype=torch.bfloat16), torch.randn(64, 768, device="cuda") / 28
        w_down, w_up = w.bfloat16(), w.T.contiguous().bfloat16()
        assert explain(x, w_down, None, w_up).plan.form == "resident"
        y = bottleneck_adapter(x, w_down, None, w_up, None)
        h = torch.nn.functional.gelu(x.double() @ w_down.double().T)
        assert ((y - (x + h @ w_up.double().T)).norm() / y.norm()).item() < 4e-3


def problem(M=65536, D=768, R=64, capability=(9, 0), **rest):
    rows = Rows(D, torch.bfloat16)
    common = dict(x=rows, residual=None, parameter_dtype=torch.bfloat16, b_down=True, b_up=True, activation="gelu")
    common |= dict(scale=1.0, scale_size=0, dtype=torch.bfloat16, tf32=False, aligned=True)
    return Problem(M, D, R, **common | rest, target=Target(capability, 132, unmeasured=True))


@pytest.mark.parametrize(
    "M, D, R, capability, chosen",
    [
        (65536, 768, 64, (9, 0), True),
        (65536, 776, 64, (9, 0), True),
        (65536, 768, 64, (8, 0), False),  # another card
        (65536, 768, 64, (10, 0), False),
        (1024, 768, 64, (9, 0), False),  # too little work to pay for descriptors
        (65536, 1032, 64, (9, 0), False),  # rows too long
        (65536, 768, 129, (9, 0), False),
        (65536, 770, 64, (9, 0), False),  # rows not at multiples of 16 bytes
        (65536, 768, 60, (9, 0), False),
    ],
)
def test_choice(M, D, R, capability, chosen):
    assert (forward.plan(problem(M, D, R, capability)).form == "resident") == chosen


@pytest.mark.parametrize(
    "changed",
    [
        dict(residual=Rows(768, torch.bfloat16)),
        dict(aligned=False),
        dict(x=Rows(772, torch.bfloat16)),
        dict(parameter_dtype=torch.float32),
        dict(dtype=torch.float16),
        dict(x=Rows(768, torch.float32), parameter_dtype=torch.float32, dtype=torch.float32),
    ],
    ids=str,
)
def test_others_take_another_form(changed):
    assert forward.plan(problem()).form == "resident"
    assert forward.plan(problem(**changed)).form == "fused"
    assert forward.plan(problem()._replace(target=Target((9, 0), 132))).form == "fused"  # no card has measured it


@pytest.mark.parametrize("D", range(8, 1025, 8))
@pytest.mark.parametrize("R", [8, 16, 32, 64, 128])
def test_fits_shared_memory(D, R):
    config = configs.resident(problem(1 << 24, D, R))
    chunks, programs = -(-D // config.BLOCK_D), config.programs // 132
    x, ring = chunks * config.BLOCK_M * config.BLOCK_D, config.STAGES * config.BLOCK_D * configs.side(R)
    assert config.STAGES >= 2
    assert programs * (2 * (x + ring) + 8 * (chunks + config.STAGES) + 1024) <= 228 * 1024
