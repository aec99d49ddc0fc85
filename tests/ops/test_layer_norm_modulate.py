"""layer_norm_modulate against the textbook formula in fp64."""

import pytest
import torch
from torch import Tensor

from anyflow.ops import layer_norm_modulate

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def formula(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Token by token: token l reads row l // (L // R)."""
    length, rows = x.shape[1], shift.shape[1]
    row = torch.arange(length) // max(length // rows, 1)
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * (1 + scale[:, row]) + shift[:, row]


def inputs(g: torch.Generator, b: int, length: int, d: int, r: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(b, length, d), (b, r, d), (b, r, d)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize(("b", "length", "d", "r"), [(2, 12, 16, 1), (2, 12, 16, 3), (1, 5, 7, 5), (3, 1, 33, 1)])
def test_values_and_gradients(b, length, d, r, dtype, generator, assert_matches, assert_gradients) -> None:
    args = inputs(generator, b, length, d, r, dtype)
    args64 = doubled(args)
    out, expected = layer_norm_modulate(*args), formula(*args64)
    assert out.dtype == dtype and out.shape == (b, length, d)
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_modulation_keeps_its_own_dtype(x_dtype, generator, assert_matches, assert_gradients) -> None:
    """The model modulates bf16 tokens with fp32 rows: the result has x's dtype, gradients each their own."""
    x = inputs(generator, 2, 6, 8, 2, x_dtype)[0]
    _, shift, scale = inputs(generator, 2, 6, 8, 2, torch.float32)
    args = [x, shift, scale]
    args64 = doubled(args)
    out, expected = layer_norm_modulate(*args), formula(*args64)
    assert out.dtype == x_dtype
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


def test_eps_is_used(generator, assert_matches) -> None:
    args = inputs(generator, 1, 4, 8, 1, torch.float64)
    assert_matches(layer_norm_modulate(*args, eps=0.5).detach(), formula(*args, eps=0.5).detach())
    assert not torch.allclose(layer_norm_modulate(*args, eps=0.5), layer_norm_modulate(*args))


def test_large_offset_does_not_cancel(generator) -> None:
    """mean(x^2) - mean(x)^2 would be off by 100 % here; a centered variance is good to fp32's resolution at 1e4."""
    x = (1e4 + torch.randn(2, 6, 64, generator=generator, dtype=torch.float64)).float()
    zero = torch.zeros(2, 1, 64)
    out = layer_norm_modulate(x, zero, zero)
    expected = formula(x.double(), zero.double(), zero.double())
    assert (out.double() - expected).abs().max() < 2e-3


def test_constant_tokens_give_the_shift(generator) -> None:
    _, shift, scale = inputs(generator, 2, 4, 8, 2, torch.float32)
    out = layer_norm_modulate(torch.full((2, 4, 8), 3.0), shift, scale)
    torch.testing.assert_close(out, shift.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("shape", [(0, 6, 8), (2, 0, 8)])
def test_empty(shape) -> None:
    x = torch.empty(shape, requires_grad=True)
    shift, scale = torch.zeros(shape[0], 2, 8, requires_grad=True), torch.zeros(shape[0], 2, 8)
    out = layer_norm_modulate(x, shift, scale)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == shape and not shift.grad.any()


@pytest.mark.parametrize("r", [1, 3])
def test_non_contiguous(r, generator) -> None:
    x, shift, scale = inputs(generator, 2, 6, 8, r, torch.float32)
    plain = layer_norm_modulate(x, shift, scale)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, shift, scale)]
    assert r == 1 or not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(layer_norm_modulate(*strided), plain)
    modulation = torch.stack([shift, scale], dim=2)  # the model passes views of one [B, R, 6, D] tensor
    torch.testing.assert_close(layer_norm_modulate(x, *modulation.unbind(2)), plain)


@pytest.mark.parametrize("r", [1, 2])
def test_gradcheck(r, generator) -> None:
    args = inputs(generator, 2, 4, 3, r, torch.float64)
    assert torch.autograd.gradcheck(layer_norm_modulate, args)


X, ROW = torch.zeros(2, 6, 4), torch.zeros(2, 1, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[0], ROW, ROW), "x must be"),
        ((X.long(), ROW, ROW), "x must be"),
        ((X, ROW[:, 0], ROW), "shift must be"),
        ((X, ROW[:1], ROW), "shift must be"),
        ((X, ROW[..., :3], ROW), "shift must be"),
        ((X, ROW, ROW[..., :3]), "scale must be"),
        ((X, torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)), "must divide the L=6"),
        ((X, torch.zeros(2, 0, 4), torch.zeros(2, 0, 4)), "must divide the L=6"),
        ((X, ROW, torch.zeros(2, 3, 4)), "one shape"),
        ((X, ROW.to("meta"), ROW), "shift is on meta"),
        ((X, ROW, ROW.to("meta")), "scale is on meta"),
    ],
)
def test_bad_input(args, message) -> None:
    with pytest.raises(ValueError, match=f"layer_norm_modulate: .*{message}"):
        layer_norm_modulate(*args)
