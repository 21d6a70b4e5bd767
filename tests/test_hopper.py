"""Forward with x resident in shared memory. Gluon has no interpreter, so these need the card; its choice does not."""

import dataclasses

import pytest
import torch
from helpers import Call, check

from adapter_ops import bottleneck_adapter
from adapter_ops.kernels import configs
from adapter_ops.kernels.activations import ACTIVATIONS

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
card = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="there is no Hopper GPU here")]


@pytest.fixture
def launched(monkeypatch):
    """Configs for any number of elements, with three programs so that each walks over tiles; lists what was used."""
    from adapter_ops.kernels import hopper

    used, run, choose = [], hopper.forward, configs.resident.__wrapped__

    def resident(*arguments):
        config = choose(*arguments)
        return config and dataclasses.replace(config, programs=3)

    def spy(*arguments):
        used.append(arguments[-1])
        run(*arguments)

    monkeypatch.setattr(configs, "RESIDENT_ELEMENTS", 0)
    monkeypatch.setattr(configs, "resident", resident)
    monkeypatch.setattr(hopper, "forward", spy)
    torch.set_default_device("cuda")
    yield used
    torch.set_default_device(None)


class TestCard:
    pytestmark = card

    @pytest.mark.parametrize("M", [1, 63, 129, 1000])
    @pytest.mark.parametrize("D, R", [(8, 8), (392, 24), (512, 64), (768, 8), (768, 32), (768, 64), (1024, 128)])
    def test_sizes(self, launched, M, D, R):
        check(Call(M, D, R, torch.bfloat16), "gpu")
        assert len(launched) == 1

    @pytest.mark.parametrize("scale", [0.3, "one", "channel"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_scale_bias_dtype(self, launched, scale, bias, dtype):
        check(Call(500, 264, 40, dtype, scale=scale, bias=bias), "gpu")
        assert len(launched) == 1

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations(self, launched, activation):
        check(Call(300, 136, 16, torch.bfloat16, activation=activation), "gpu")

    def test_strided_rows(self, launched):
        call = Call(300, 136, 16, torch.bfloat16)
        wide = torch.randn(300, 160, dtype=torch.bfloat16)
        wide[:, :136] = call.inputs["x"]
        strided = call(x=wide[:, :136])
        assert torch.equal(strided, call()) and len(launched) == 2

    def test_exact_products_and_equal_bits(self, launched):
        call = Call(700, 264, 24, torch.bfloat16, activation="relu")
        for name, t in call.inputs.items():
            call.inputs[name] = torch.randint_like(t, -1, 2)
        y = call()
        z = call.inputs["x"].double() @ call.inputs["w_down"].double().T + call.inputs["b_down"]
        expected = call.inputs["x"] + z.relu() @ call.inputs["w_up"].double().T + call.inputs["b_up"]
        assert torch.equal(y, expected.to(torch.bfloat16)) and torch.equal(y, call())

    def test_infinity_stays_in_its_row(self, launched):
        call = Call(300, 136, 24, torch.bfloat16, activation="relu")
        call.inputs["x"][7, 3] = float("inf")
        y = call()
        assert y[:7].isfinite().all() and y[8:].isfinite().all() and not y[7, 3].isfinite()

    @pytest.mark.parametrize("why", ["residual", "alignment", "odd R", "dtypes"])
    def test_others_take_another_form(self, launched, why):
        own = why == "residual"
        parameter_dtype = torch.float32 if why == "dtypes" else None
        call = Call(300, 136, 20 if why == "odd R" else 16, torch.bfloat16, parameter_dtype, own_residual=own)
        if why == "alignment":
            call.inputs["x"] = torch.randn(300 * 136 + 1, dtype=torch.bfloat16)[1:].view(300, 136)
        check(call, "gpu")
        assert not launched

    def test_the_public_call_takes_it(self):
        """At a real size, by the real table."""
        x, w = torch.randn(32768, 768, device="cuda", dtype=torch.bfloat16), torch.randn(64, 768, device="cuda") / 28
        w_down, w_up = w.bfloat16(), w.T.contiguous().bfloat16()
        y = bottleneck_adapter(x, w_down, None, w_up, None)
        h = torch.nn.functional.gelu(x.double() @ w_down.double().T)
        assert ((y - (x + h @ w_up.double().T)).norm() / y.norm()).item() < 4e-3


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
    assert (configs.resident(M, D, R, capability, 132) is not None) == chosen


@pytest.mark.parametrize("D", range(8, 1025, 8))
@pytest.mark.parametrize("R", [8, 16, 32, 64, 128])
def test_fits_shared_memory(D, R):
    config = configs.resident(1 << 24, D, R, (9, 0), 132)
    chunks, programs = -(-D // config.BLOCK_D), config.programs // 132
    x, ring = chunks * config.BLOCK_M * config.BLOCK_D, config.STAGES * config.BLOCK_D * configs.side(R)
    assert config.STAGES >= 2
    assert programs * (2 * (x + ring) + 8 * (chunks + config.STAGES) + 1024) <= 228 * 1024
