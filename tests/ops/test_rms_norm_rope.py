"""rms_norm_rope against a rotation written out pair by pair in fp64."""

import pytest
import torch
from torch import Tensor

from anyflow.ops import rms_norm_rope


def formula(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, eps: float = 1e-6
) -> Tensor:
    n = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight
    heads = n.reshape(*x.shape[:2], num_heads, -1)
    if cos is None or sin is None:
        return heads
    even, odd = heads[..., 0::2], heads[..., 1::2]
    c, s = cos[None, :, None], sin[None, :, None]
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)


def inputs(g: torch.Generator, b: int, length: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    x = torch.randn(b, length, heads * head_dim, generator=g, dtype=torch.float64)
    weight = 1 + 0.2 * torch.randn(heads * head_dim, generator=g, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (x, weight)]


def tables(g: torch.Generator, length: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = 10 * torch.rand(length, head_dim // 2, generator=g, dtype=torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("b", "length", "heads", "head_dim"), [(2, 6, 3, 8), (1, 5, 1, 14), (3, 1, 4, 2)])
def test_values_and_gradients(
    b, length, heads, head_dim, rotate, dtype, generator, assert_matches, assert_gradients
) -> None:
    args = inputs(generator, b, length, heads, head_dim, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = tables(generator, length, head_dim, wide) if rotate else (None, None)
    args64 = doubled(args)
    out = rms_norm_rope(*args, cos, sin, num_heads=heads)
    expected = formula(*args64, *(None if t is None else t.double() for t in (cos, sin)), num_heads=heads)
    assert out.dtype == dtype and out.shape == (b, length, heads, head_dim)
    # A rotation mixes two numbers: the error of a pair scales with its length, not with each of the two.
    error = (out.double() - expected).unflatten(-1, (-1, 2)).norm(dim=-1)
    length_of_pair = expected.unflatten(-1, (-1, 2)).norm(dim=-1)
    limit = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 2**-10, torch.bfloat16: 2**-8}[dtype]
    assert (error <= limit * length_of_pair).all()
    assert_gradients([out], args, [expected], args64)


def test_x_in_bf16_weight_in_fp32(generator, assert_matches, assert_gradients) -> None:
    x, weight = inputs(generator, 2, 6, 2, 8, torch.float32)
    args = [x.detach().bfloat16().requires_grad_(), weight]
    args64 = doubled(args)
    cos, sin = tables(generator, 6, 8, torch.float32)
    out = rms_norm_rope(*args, cos, sin, num_heads=2)
    expected = formula(*args64, cos.double(), sin.double(), num_heads=2)
    assert out.dtype == torch.bfloat16
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


def test_statistics_are_of_the_full_width(generator) -> None:
    """Scaling one head changes the other: the norm is taken before the split."""
    x, weight = (t.detach() for t in inputs(generator, 1, 3, 2, 4, torch.float64))
    louder = x.clone()
    louder[..., :4] *= 10
    other = [rms_norm_rope(v, weight, num_heads=2)[:, :, 1] for v in (x, louder)]
    assert (other[1].abs() < 0.9 * other[0].abs()).all()


def test_rotation_keeps_lengths_and_relative_positions(generator) -> None:
    """q(l) . k(m) depends on l - m only, which is the point of a rotary embedding."""
    frequency = torch.rand(4, generator=generator, dtype=torch.float64)
    angle = torch.outer(torch.arange(9, dtype=torch.float64), frequency)
    q, k = torch.randn(2, 1, 1, 8, generator=generator, dtype=torch.float64).expand(2, 1, 9, 8).unbind(0)
    one = torch.ones(8, dtype=torch.float64)
    rq, rk = (rms_norm_rope(v, one, angle.cos(), angle.sin(), num_heads=1)[0, :, 0] for v in (q, k))
    scores = rq @ rk.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    torch.testing.assert_close(rq.norm(dim=-1), torch.full((9,), 8**0.5, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_extreme_magnitudes(scale, generator) -> None:
    x, weight = (t.detach() for t in inputs(generator, 2, 3, 2, 8, torch.float32))
    out = rms_norm_rope(x * scale, weight, num_heads=2, eps=1e-26)
    torch.testing.assert_close(
        out.double(), formula(x.double(), weight.double(), None, None, 2, 0), rtol=1e-5, atol=1e-6
    )


def test_zero_input_has_finite_gradient() -> None:
    x = torch.zeros(1, 2, 8, requires_grad=True)
    out = rms_norm_rope(x, torch.ones(8), num_heads=2)
    out.sum().backward()
    assert not out.any() and torch.isfinite(x.grad).all()


def test_empty_batch(generator) -> None:
    x, weight = inputs(generator, 0, 6, 2, 8, torch.float32)
    out = rms_norm_rope(x, weight, *tables(generator, 6, 8, torch.float32), num_heads=2)
    assert out.shape == (0, 6, 2, 8)
    out.sum().backward()
    assert x.grad.shape == x.shape and not weight.grad.any()


def test_non_contiguous(generator) -> None:
    x, weight = inputs(generator, 2, 6, 2, 8, torch.float32)
    cos, sin = tables(generator, 6, 8, torch.float32)
    plain = rms_norm_rope(x, weight, cos, sin, num_heads=2)
    wide = torch.cat([x, x + 1], dim=-1)[..., :16]  # a slice of a fused projection
    columns = [t.T.contiguous().T for t in (cos, sin)]
    assert not wide.is_contiguous() and not columns[0].is_contiguous()
    torch.testing.assert_close(rms_norm_rope(wide, weight, *columns, num_heads=2), plain)


def test_gradcheck(generator) -> None:
    x, weight = inputs(generator, 2, 3, 2, 4, torch.float64)
    cos, sin = tables(generator, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm_rope(a, b, cos, sin, num_heads=2), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm_rope(a, b, num_heads=2), (x, weight))


X, W, T = torch.zeros(2, 6, 8), torch.zeros(8), torch.zeros(6, 2)


@pytest.mark.parametrize(
    ("args", "num_heads", "message"),
    [
        ((X[0], W), 2, "x must be"),
        ((X.int(), W), 2, "x must be"),
        ((X, W[:4]), 2, "weight must be"),
        ((X, W.to("meta")), 2, "weight is on meta"),
        ((X, W), 3, "num_heads=3 must divide"),
        ((X, W), 0, "num_heads=0 must divide"),
        ((X, W, T), 2, "given together"),
        ((X, W, None, T), 2, "given together"),
        ((X, W, T[:5], T[:5]), 2, "cos must be"),
        ((X, W, T, T[:, :1]), 2, "sin must be"),
        ((X, W, T, T.to("meta")), 2, "sin is on meta"),
        ((torch.zeros(2, 6, 6), torch.zeros(6), T[:, :1], T[:, :1]), 2, "Dh/2=1.5"),
    ],
)
def test_bad_input(args, num_heads, message) -> None:
    with pytest.raises(ValueError, match=f"rms_norm_rope: .*{message}"):
        rms_norm_rope(*args, num_heads=num_heads)
