"""rms_norm_rope against a rotation written out pair by pair in fp64."""

import mmap
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.ops import rms_norm_rope, use_backend


def formula(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    n = x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight
    heads = n.unflatten(-1, (num_heads, x.shape[-1] // num_heads))
    if cos is None or sin is None:
        return heads
    even, odd = heads[..., 0::2], heads[..., 1::2]
    c, s = cos.double()[None, :, None], sin.double()[None, :, None]
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def inputs(
    draw,
    b: int,
    length: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """x and a weight about 1, in x's dtype unless told otherwise; both are leaves."""
    x, weight = (
        draw(b, length, heads * head_dim, dtype=dtype),
        draw(heads * head_dim, dtype=torch.float64),
    )
    weight = (1 + 0.2 * weight.detach()).to(dtype if weight_dtype is None else weight_dtype)
    return [x, weight.requires_grad_()]


def tables(
    draw, length: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    angle = 10 * draw(length, head_dim // 2, dtype=torch.float64).detach()
    return angle.cos().to(dtype), angle.sin().to(dtype)


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(
    ("b", "length", "heads", "head_dim"),
    [(2, 6, 3, 8), (1, 35, 4, 14), (3, 1, 4, 2), (1, 7, 12, 6), (2, 17, 1, 24)],
)
def test_values_and_gradients(
    b, length, heads, head_dim, rotate, backend, dtype, draw, assert_gradients, approximation
) -> None:
    args = inputs(draw, b, length, heads, head_dim, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = tables(draw, length, head_dim, wide) if rotate else (None, None)
    args64 = doubled(args)
    out, expected = (
        rms_norm_rope(*args, cos, sin, num_heads=heads),
        formula(*args64, cos, sin, heads),
    )
    assert out.dtype == dtype and out.shape == (b, length, heads, head_dim)
    # A rotation mixes two numbers: the error of a pair scales with its length, not with each of the
    # two.
    error = (out.double() - expected).unflatten(-1, (-1, 2)).norm(dim=-1)
    length_of_pair = expected.unflatten(-1, (-1, 2)).norm(dim=-1)
    limit = {
        torch.float64: 1e-14,
        torch.float32: 5e-7,
        torch.float16: 2**-10,
        torch.bfloat16: 2**-8,
    }[dtype]
    if dtype != torch.float64:  # the root of a mean, which halves what its division is off by
        limit += approximation("rsqrt") + approximation("division") / 2
    assert (error <= limit * length_of_pair).all()
    assert_gradients([out], args, [expected], args64)


@pytest.mark.parametrize(
    ("length", "heads", "head_dim", "rotate"),
    [
        pytest.param(1023, 2, 48, False, marks=pytest.mark.slow),  # the interpreter is
        (34, 12, 128, True),
        (7, 16, 128, True),
        (3, 24, 128, True),
        (2, 40, 128, True),
        (1, 64, 128, True),
        (3, 1, 8, True),
    ],
)
def test_real_sizes(
    length, heads, head_dim, rotate, backend, draw, assert_matches, assert_gradients
) -> None:
    """The widths of the models and beyond, and lengths that no run of tokens divides, as the model
    calls it in bf16.
    """
    args = inputs(draw, 1, length, heads, head_dim, torch.bfloat16, torch.float32)
    args64 = doubled(args)
    cos, sin = tables(draw, length, head_dim) if rotate else (None, None)
    out, expected = (
        rms_norm_rope(*args, cos, sin, num_heads=heads),
        formula(*args64, cos, sin, heads),
    )
    assert out.dtype == torch.bfloat16
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


def test_odd_heads_without_rotation(backend, draw, assert_matches, assert_gradients) -> None:
    args = inputs(draw, 2, 5, 8, 3)
    args64 = doubled(args)
    out, expected = rms_norm_rope(*args, num_heads=8), formula(*args64, None, None, 8)
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


@pytest.mark.parametrize("rotate", [True, False])
def test_registered_operator(rotate, backend, draw, assert_matches, assert_gradients) -> None:
    """``torch.ops.anyflow.rms_norm_rope``: on the eager backend too it has a backward formula of
    its own.
    """
    operator, backward = torch.ops.anyflow.rms_norm_rope, torch.ops.anyflow.rms_norm_rope_backward
    args = inputs(draw, 2, 6, 3, 8)
    cos, sin = tables(draw, 6, 8) if rotate else (None, None)
    args64 = doubled(args)
    out, expected = operator(*args, cos, sin, 3), formula(*args64, cos, sin, 3)
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)
    torch.library.opcheck(operator.default, (*args, cos, sin, 3, 1e-6))
    torch.library.opcheck(
        backward.default, (out.detach(), *(a.detach() for a in args), cos, sin, 3, 1e-6)
    )


@pytest.mark.parametrize("rotate", [True, False])
def test_compiles_in_one_graph(rotate, backend, draw) -> None:
    compiled = torch.compile(rms_norm_rope, fullgraph=True, backend="aot_eager")
    args = inputs(draw, 2, 6, 3, 8)
    cos, sin = tables(draw, 6, 8) if rotate else (None, None)
    outputs = [f(*args, cos, sin, num_heads=3) for f in (compiled, rms_norm_rope)]
    gradients = [torch.autograd.grad(o.square().sum(), args) for o in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 14), (3, 2)])
def test_any_width_runs_eagerly(heads, head_dim, draw, assert_matches, assert_gradients) -> None:
    args = inputs(draw, 2, 5, heads, head_dim)
    args64 = doubled(args)
    cos, sin = tables(draw, 5, head_dim)
    out, expected = (
        rms_norm_rope(*args, cos, sin, num_heads=heads),
        formula(*args64, cos, sin, heads),
    )
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(kernel, device, data: st.DataObject) -> None:
    b, length, seed = (data.draw(st.integers(0, high)) for high in (3, 40, 99))
    heads, half = data.draw(
        st.sampled_from([(4, 1), (8, 5), (1, 4), (4, 7), (3, 8), (2, 6), (5, 20)])
    )
    rotate = data.draw(st.booleans())
    d = 2 * heads * half
    g = torch.Generator().manual_seed(seed)
    x, weight, angle = (
        torch.randn(s, generator=g).to(device) for s in ((b, length, d), (d,), (length, half))
    )
    cos, sin = (angle.cos(), angle.sin()) if rotate else (None, None)
    with use_backend(kernel):
        out = rms_norm_rope(x, weight, cos, sin, num_heads=heads)
    expected = formula(x.double(), weight.double(), cos, sin, heads)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_each_tensor_keeps_its_own_dtype(
    x_dtype, table_dtype, backend, draw, assert_matches, assert_gradients
) -> None:
    """The model normalizes bf16 tokens with an fp32 weight, and its tables are fp32."""
    args = inputs(draw, 2, 6, 2, 8, x_dtype, torch.float32)
    args64 = doubled(args)
    cos, sin = tables(draw, 6, 8, table_dtype)
    out, expected = rms_norm_rope(*args, cos, sin, num_heads=2), formula(*args64, cos, sin, 2)
    assert out.dtype == x_dtype
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


def test_tables_are_constants(backend, draw) -> None:
    """No gradient on any backend, through the function or the operator."""
    x, weight = inputs(draw, 2, 6, 2, 8)
    cos, sin = (t.requires_grad_() for t in tables(draw, 6, 8))
    out = rms_norm_rope(x, weight, cos, sin, num_heads=2)
    registered = torch.ops.anyflow.rms_norm_rope(x, weight, cos, sin, 2)
    (out.square().sum() + registered.square().sum()).backward()
    assert cos.grad is None and sin.grad is None and x.grad is not None and weight.grad is not None
    assert not rms_norm_rope(x.detach(), weight.detach(), cos, sin, num_heads=2).requires_grad


def test_eps_is_used(backend, draw, assert_matches, assert_gradients) -> None:
    args = inputs(draw, 1, 4, 2, 4)
    args64 = doubled(args)
    out, expected = rms_norm_rope(*args, num_heads=2, eps=0.5), formula(*args64, None, None, 2, 0.5)
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)
    assert not torch.allclose(out, rms_norm_rope(*args, num_heads=2))


def test_statistics_are_of_the_full_width(backend, draw) -> None:
    """Scaling one head changes the other: the norm is taken before the split."""
    x, weight = (t.detach() for t in inputs(draw, 1, 3, 2, 4))
    louder = x.clone()
    louder[..., :4] *= 10
    other = [rms_norm_rope(v, weight, num_heads=2)[:, :, 1] for v in (x, louder)]
    assert (other[1].abs() < 0.9 * other[0].abs()).all()


def test_rotation_keeps_lengths_and_relative_positions(backend, generator, device) -> None:
    """q(l) . k(m) depends on l - m only, which is the point of a rotary embedding."""
    frequency = torch.rand(4, generator=generator)
    angle = torch.outer(torch.arange(9.0), frequency)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    q, k = torch.randn(2, 1, 1, 8, generator=generator).expand(2, 1, 9, 8).to(device).unbind(0)
    one = torch.ones(8, device=device)
    rq, rk = (rms_norm_rope(v, one, cos, sin, num_heads=1)[0, :, 0] for v in (q, k))
    scores = rq @ rk.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=1e-5)
    lengths = torch.full((9,), 8**0.5, device=device)
    torch.testing.assert_close(rq.norm(dim=-1), lengths, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_extreme_magnitudes(scale, backend, draw) -> None:
    x, weight = (t.detach() for t in inputs(draw, 2, 3, 2, 8))
    out = rms_norm_rope(x * scale, weight, num_heads=2, eps=1e-26)
    expected = formula(x.double(), weight.double(), None, None, 2, 0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_large_offset(backend, draw, assert_matches) -> None:
    x, weight = (t.detach() for t in inputs(draw, 2, 3, 2, 8))
    x = x + 1e4
    cos, sin = tables(draw, 3, 8)
    assert_matches(
        rms_norm_rope(x, weight, cos, sin, num_heads=2), formula(*doubled([x, weight]), cos, sin, 2)
    )


def test_zero_input_has_finite_gradient(backend, device) -> None:
    x = torch.zeros(1, 2, 8, requires_grad=True, device=device)
    out = rms_norm_rope(x, torch.ones(8, device=device), num_heads=2)
    out.sum().backward()
    assert not out.any() and x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e3))


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
def test_empty(shape, rotate, backend, draw) -> None:
    x, weight = inputs(draw, *shape, 2, 8)
    cos, sin = tables(draw, shape[1], 8) if rotate else (None, None)
    out = rms_norm_rope(x, weight, cos, sin, num_heads=2)
    assert out.shape == (*shape, 2, 8)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.shape == weight.shape and not weight.grad.any()


def test_non_contiguous(backend, draw, assert_gradients) -> None:
    x, weight = inputs(draw, 2, 6, 2, 8)
    cos, sin = tables(draw, 6, 8)
    plain = rms_norm_rope(x, weight, cos, sin, num_heads=2)
    wide = torch.cat([x, x + 1], dim=-1)[..., :16]  # a slice of a fused projection
    columns = [t.T.contiguous().T for t in (cos, sin)]
    slices = [torch.cat([t, t + 1], dim=1)[:, :4] for t in (cos, sin)]
    spread = torch.stack([weight, weight], dim=1)[:, 0]
    assert not any(t.is_contiguous() for t in (wide, *columns, *slices, spread))
    torch.testing.assert_close(rms_norm_rope(wide, spread, *columns, num_heads=2), plain)
    torch.testing.assert_close(rms_norm_rope(wide, weight, cos, slices[1], num_heads=2), plain)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(rms_norm_rope(turned, weight, cos, sin, num_heads=2), plain)
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)  # tokens of a sample are not adjacent
    torch.testing.assert_close(rms_norm_rope(swapped, weight, *slices, num_heads=2), plain)
    same = x[:1].expand(2, -1, -1)
    torch.testing.assert_close(rms_norm_rope(same, weight, cos, sin, num_heads=2)[1], plain[0])
    out64 = formula(*(a64 := doubled([x, weight])), cos, sin, 2)
    assert_gradients(
        [rms_norm_rope(wide, weight, *columns, num_heads=2)], [x, weight], [out64], a64
    )


@pytest.mark.parametrize("rotate", [True, False])
def test_gradient_arrives_as_a_view(rotate, backend, draw, generator, device) -> None:
    """Attention may hand back ``[B, H, L, Dh]`` transposed, a slice of a wider gradient, or one
    number for all.
    """
    args = inputs(draw, 2, 6, 2, 8)
    cos, sin = tables(draw, 6, 8) if rotate else (None, None)
    wide = torch.randn(2, 6, 4, 8, generator=generator).to(device)
    transposed = torch.randn(2, 2, 6, 8, generator=generator).to(device).transpose(1, 2)
    one = torch.ones(1, 1, 1, 1, device=device).expand(2, 6, 2, 8)
    for gradient in (wide[:, :, 1:3], transposed, one, wide[..., :2, :].flip(-1)):
        views = [torch.autograd.grad(f(*args), args, gradient) for f in _both(cos, sin)]
        plain = [
            torch.autograd.grad(f(*args), args, gradient.contiguous()) for f in _both(cos, sin)
        ]
        torch.testing.assert_close(views, plain, rtol=0, atol=0)


def _both(cos: Tensor | None, sin: Tensor | None) -> Iterator[Callable[..., Tensor]]:
    yield lambda x, weight: rms_norm_rope(x, weight, cos, sin, num_heads=2)
    yield lambda x, weight: torch.ops.anyflow.rms_norm_rope(x, weight, cos, sin, 2)


def test_no_index_overflows_32_bits(kernel, device) -> None:
    """Tokens 2^31 elements apart in a view of memory of which a few pages are touched."""
    if device.type != "cpu":
        pytest.skip("a GPU has no untouched memory")
    stride = 2**27
    memory = torch.frombuffer(_reserve(2 * (16 * stride + 8)), dtype=torch.bfloat16)
    x = memory.as_strided((1, 17, 8), (8, stride, 1))
    x.copy_(torch.arange(17.0)[:, None] - torch.arange(8.0))
    weight = torch.ones(8)
    with use_backend(kernel):
        gradient = torch.ops.anyflow.rms_norm_rope_backward(
            x.unflatten(2, (2, 4)), x, weight, None, None, 2, 1e-6
        )
        assert torch.equal(
            rms_norm_rope(x, weight, num_heads=2), rms_norm_rope(x.clone(), weight, num_heads=2)
        )
        plain = x.contiguous()
        expected = torch.ops.anyflow.rms_norm_rope_backward(
            plain.unflatten(2, (2, 4)), plain, weight, None, None, 2, 1e-6
        )
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def _reserve(size: int) -> mmap.mmap:
    return mmap.mmap(
        -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    )


def test_gradcheck(draw) -> None:
    args = inputs(draw, 2, 3, 2, 4, torch.float64)
    cos, sin = tables(draw, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, weight: rms_norm_rope(x, weight, cos, sin, num_heads=2), args
    )
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm_rope(x, weight, num_heads=2), args)


X, W, T = torch.zeros(2, 6, 8), torch.zeros(8), torch.zeros(6, 2)


@pytest.mark.parametrize(
    ("args", "num_heads", "message"),
    [
        ((X[0], W), 2, "x must be"),
        ((X.int(), W), 2, "x must be"),
        ((X, W[:4]), 2, "weight must be"),
        ((X, W.int()), 2, "weight must be"),
        ((X, W.to("meta")), 2, "weight is on meta"),
        ((X, W), 3, "num_heads=3 must divide"),
        ((X, W), 0, "num_heads=0 must divide"),
        ((X, W), -2, "num_heads=-2 must divide"),
        ((X, W, T), 2, "given together"),
        ((X, W, None, T), 2, "given together"),
        ((X, W, T[:5], T[:5]), 2, "cos must be"),
        ((X, W, T[None], T[None]), 2, "cos must be"),
        ((X, W, T.int(), T), 2, "cos must be"),
        ((X, W, T, T[:, :1]), 2, "sin must be"),
        ((X, W, T.to("meta"), T), 2, "cos is on meta"),
        ((X, W, T, T.to("meta")), 2, "sin is on meta"),
        ((torch.zeros(2, 6, 6), torch.zeros(6), T[:, :1], T[:, :1]), 2, "Dh/2=1.5"),
    ],
)
def test_bad_input(args, num_heads, message) -> None:
    with pytest.raises(ValueError, match=f"rms_norm_rope: .*{message}"):
        rms_norm_rope(*args, num_heads=num_heads)


def test_forced_kernel_says_what_it_does_not_take(kernel, draw) -> None:
    x, weight = inputs(draw, 2, 6, 2, 8)
    with use_backend(kernel):
        with pytest.raises(ValueError, match=r"does not support D=12 "):
            rms_norm_rope(x[..., :12], weight[:12], num_heads=2)
        with pytest.raises(ValueError, match=r"does not support \(6, 4\) float64"):
            rms_norm_rope(x, weight, *tables(draw, 6, 8, torch.float64), num_heads=2)
