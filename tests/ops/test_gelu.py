"""gelu against ``x sigmoid(2 u)`` in fp64, where ``0.5 x (1 + tanh(u))`` would cancel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.ops import backend_report, gelu, use_backend


def formula(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def doubled(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def units(actual: Tensor, expected: Tensor) -> Tensor:
    """The errors in units of fp32's last place, which below 2^-126 is 2^-149."""
    exponent = torch.frexp(expected.abs().clamp_min(2.0**-126)).exponent
    return (actual.double() - expected).abs() / torch.ldexp(
        torch.ones_like(expected), exponent - 24
    )


@pytest.fixture
def native(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the native kernel is for the CPU")


@pytest.mark.parametrize("shape", [(2, 5, 16), (7,), (), (3, 1, 2, 33), (1, 1280, 24)])
def test_values_and_gradients(
    shape, backend, dtype, draw, assert_matches, assert_gradients
) -> None:
    x = draw(*shape, dtype=dtype)
    x64 = doubled(x)
    out, expected = gelu(x), formula(x64)
    assert out.dtype == dtype and out.shape == shape
    assert_matches(out, expected)
    assert_gradients([out], [x], [expected], [x64])


def test_registered_operator(backend, draw, assert_matches, assert_gradients) -> None:
    """``torch.ops.anyflow.gelu``: on the eager backend too it has a backward formula of its own."""
    operator, backward = torch.ops.anyflow.gelu, torch.ops.anyflow.gelu_backward
    x = draw(3, 17)
    x64 = doubled(x)
    out, expected = operator(x), formula(x64)
    assert_matches(out, expected)
    assert_gradients([out], [x], [expected], [x64])
    torch.library.opcheck(operator.default, (x,))
    torch.library.opcheck(backward.default, (out.detach(), x.detach()))


def test_compiles_in_one_graph(backend, draw) -> None:
    compiled = torch.compile(gelu, fullgraph=True, backend="aot_eager")
    x = draw(3, 17)
    outputs = compiled(x), gelu(x)
    gradients = [torch.autograd.grad(o.square().sum(), x) for o in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(kernel, device, data: st.DataObject) -> None:
    """Sizes around the kernel's blocks of 1024 elements and its threads' shares, and their offsets
    in memory.
    """
    size, offset, seed = (data.draw(st.integers(0, high)) for high in (40000, 20, 99))
    x = torch.randn(size + offset, generator=torch.Generator().manual_seed(seed)).to(device)[
        offset:
    ]
    with use_backend(kernel):
        torch.testing.assert_close(gelu(x).double(), formula(x.double()), rtol=2e-6, atol=1e-6)


def test_values_are_good_to_the_last_places_everywhere(native) -> None:
    """Also where they are subnormal, around x = -10, where an error of 2 u counts 90 times."""
    bits = torch.arange(0, 2**31, 9973)
    # of every sign and exponent
    numbers = torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32)
    x = torch.cat([numbers[numbers.isfinite()], torch.linspace(-11, 7, 200_000)])
    with use_backend("native"):
        assert units(gelu(x), formula(x.double().clamp(min=-30))).max() < 4


def test_derivative_is_good_to_the_last_places(native) -> None:
    """Relative to its terms: it has a zero, near -0.75."""
    x = torch.linspace(-11, 7, 200_000).requires_grad_()
    x64 = doubled(x)
    (expected,) = torch.autograd.grad(formula(x64).sum(), x64)
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


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_empty(shape, backend, device) -> None:
    x = torch.empty(shape, requires_grad=True, device=device)
    out = gelu(x)
    out.sum().backward()
    assert out.shape == shape and x.grad is not None and x.grad.shape == shape


def test_non_contiguous(backend, draw, assert_matches, assert_gradients) -> None:
    x = draw(6, 5, 8)
    x64 = doubled(x)
    for view in (
        lambda t: t.transpose(0, 2),
        lambda t: t[:, ::2, 1:],
        lambda t: t[:1].expand(4, -1, -1),
    ):
        out, expected = gelu(view(x)), formula(view(x64))
        assert_matches(out, expected)
        assert_gradients([out.transpose(0, 1)], [x], [expected.transpose(0, 1)], [x64])
        assert torch.ops.anyflow.gelu(view(x)).is_contiguous()


def test_gradcheck(draw) -> None:
    assert torch.autograd.gradcheck(gelu, [draw(3, 5, dtype=torch.float64)])


def test_second_derivative(backend, draw) -> None:
    """The reference has one; the kernel says that it has none."""
    x = draw(2, 3)
    (gradient,) = torch.autograd.grad(gelu(x).sum(), x, create_graph=True)
    if backend != "native":
        assert torch.autograd.grad(gradient.sum(), x)[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="gelu: a fused kernel has no second derivative"):
            torch.autograd.grad(gradient.sum(), x)


def test_without_a_triton_kernel_the_reference_runs(draw) -> None:
    """Under ``use_backend("triton")`` a whole model runs, so this is no error; the report says what
    happens.
    """
    x = draw(3, 5).detach()
    with use_backend("eager"):
        expected = gelu(x)
    with use_backend("triton"):
        assert torch.equal(gelu(x), expected) and torch.equal(torch.ops.anyflow.gelu(x), expected)
        choice = backend_report(x.device)["gelu"]
    assert choice.backend == "eager" and "gelu has no Triton kernel" in choice.reason


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="gelu: x must be a floating-point tensor, got .* int64"):
        gelu(torch.zeros(2, dtype=torch.long))


def test_forced_kernel_refuses_fp64(native, draw) -> None:
    with (
        use_backend("native"),
        pytest.raises(ValueError, match=r"gelu: .* does not support \(2,\) float64"),
    ):
        gelu(draw(2, dtype=torch.float64))
