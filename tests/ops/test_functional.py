"""Bad input: a clear error that names both sides, before anything runs."""

import pytest
import torch

from adapter_ops import bottleneck_adapter


def arguments(**changes):
    """A good call (hidden size 768, bottleneck 64), with changes."""
    t = {
        "x": torch.zeros(2, 3, 768),
        "w_down": torch.zeros(64, 768),
        "b_down": torch.zeros(64),
        "w_up": torch.zeros(768, 64),
        "b_up": torch.zeros(768),
    }
    return t | changes


BAD = [
    ({"x": torch.zeros(2, 700)}, ValueError, "x has hidden size 700, w_down expects 768"),
    ({"w_up": torch.zeros(64, 768)}, ValueError, r"w_up has shape \(64, 768\), w_down \(64, 768\) expects \(768, 64\)"),
    ({"w_up": torch.zeros(768, 32)}, ValueError, r"w_up has shape \(768, 32\), w_down \(64, 768\) expects \(768, 64\)"),
    ({"w_down": torch.zeros(768)}, ValueError, r"w_down has shape \(768,\), expected \[bottleneck, hidden size\]"),
    ({"w_down": torch.zeros(0, 768)}, ValueError, r"w_down has shape \(0, 768\).*at least 1"),
    ({"b_down": torch.zeros(768)}, ValueError, r"b_down has shape \(768,\), w_down \(64, 768\) expects \(64,\)"),
    ({"b_up": torch.zeros(64)}, ValueError, r"b_up has shape \(64,\), w_down \(64, 768\) expects \(768,\)"),
    ({"residual": torch.zeros(2, 768)}, ValueError, r"residual has shape \(2, 768\), x \(2, 3, 768\) expects"),
    ({"scale": torch.zeros(5)}, ValueError, r"scale has shape \(5,\), expected one element or \(768,\)"),
    ({"x": torch.tensor(1.0)}, ValueError, "x has no dimensions"),
    ({"activation": "gelo"}, ValueError, r"unknown activation 'gelo'; known: gelu, .*quick_gelu.*gelu_new"),
    ({"x": torch.zeros(2, 768, dtype=torch.int64)}, TypeError, "x has dtype torch.int64, expected one of"),
    ({"w_down": torch.zeros(64, 768, dtype=torch.int8)}, TypeError, "w_down has dtype torch.int8"),
    ({"residual": torch.zeros(2, 3, 768, dtype=torch.complex64)}, TypeError, "residual has dtype torch.complex64"),
    ({"b_up": torch.zeros(768).half()}, TypeError, "b_up has dtype torch.float16, w_down has torch.float32"),
    ({"w_up": None}, TypeError, "w_up must be a tensor, not NoneType"),
    ({"scale": float("nan")}, ValueError, "scale is nan, must be finite"),
    ({"scale": float("inf")}, ValueError, "scale is inf, must be finite"),
    ({"scale": "learned"}, TypeError, "scale must be a number or a tensor, not str"),
    ({"scale": None}, TypeError, "scale must be a number or a tensor, not NoneType"),
    ({"x": [1.0]}, TypeError, "x must be a tensor, not list"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        bottleneck_adapter(**arguments(**changes))


def test_devices_that_differ():
    with pytest.raises(ValueError, match="w_down is on meta, x is on"):
        bottleneck_adapter(**arguments(w_down=torch.zeros(64, 768, device="meta")))
    with pytest.raises(ValueError, match="scale is on meta, x is on"):
        bottleneck_adapter(**arguments(scale=torch.zeros(768, device="meta")))


def test_a_good_call_passes():
    assert bottleneck_adapter(**arguments(scale=torch.ones(()))).shape == (2, 3, 768)
    assert bottleneck_adapter(**arguments(b_down=None, b_up=None)).shape == (2, 3, 768)


def test_numbers_that_are_no_python_floats(path):
    numpy = pytest.importorskip("numpy")
    t = arguments(x=torch.randn(3, 768), w_down=torch.randn(64, 768) / 28, w_up=torch.randn(768, 64) / 8)
    expected = bottleneck_adapter(**t, scale=2.0)
    for scale in (2, numpy.float32(2), numpy.float64(2), numpy.int64(2)):
        assert torch.equal(bottleneck_adapter(**t, scale=scale), expected)
