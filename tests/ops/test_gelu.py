"""gelu: precision to the last places where the textbook formula cancels, and limits."""

import math

import torch
from formulas import gelu as formula
from torch import Tensor

from anyflow.ops import gelu, use_backend


def units(actual: Tensor, expected: Tensor) -> Tensor:
    """Return the errors in units of fp32's last place, which below 2^-126 is 2^-149."""
    exponent = torch.frexp(expected.abs().clamp_min(2.0**-126)).exponent
    last_place = torch.ldexp(torch.ones_like(expected), exponent - 24)
    return (actual.double() - expected).abs() / last_place


def test_values_are_good_to_the_last_places_everywhere(native) -> None:
    """Also where they are subnormal, around x = -10, where an error of 2 u counts 90 times."""
    bits = torch.arange(0, 2**31, 9973)
    # of every sign and exponent
    numbers = torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32)
    x = torch.cat([numbers[numbers.isfinite()], torch.linspace(-11, 7, 200_000)])
    with use_backend("native"):
        assert units(gelu(x), formula(x.double().clamp(min=-30))[0]).max() < 4


def test_derivative_is_good_to_the_last_places(native) -> None:
    """Relative to its terms: the derivative has a zero, near -0.75."""
    x = torch.linspace(-11, 7, 200_000).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(formula(x64)[0].sum(), x64)
    with use_backend("native"):
        (actual,) = torch.autograd.grad(gelu(x).sum(), x)
    assert (actual.double() - expected).abs().max() < 4e-7
    steep = x.detach() < -1.5
    assert units(actual, expected)[steep].max() < 8


def test_limits(native) -> None:
    """torch gives NaN at -inf: 0 times infinity."""
    x = torch.tensor(
        [math.inf, -math.inf, 0.0, -0.0, 3e38, -3e38, 1e-40, math.nan], requires_grad=True
    )
    with use_backend("native"):
        out = gelu(x)
        out.sum().backward()
    expected = torch.tensor([math.inf, -0.0, 0.0, -0.0, 3e38, -0.0, 5e-41, math.nan])
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[:-1], expected.signbit()[:-1])
    slope = torch.tensor([1, 0, 0.5, 0.5, 1, 0, 0.5, math.nan])
    torch.testing.assert_close(x.grad, slope, rtol=0, atol=0, equal_nan=True)
