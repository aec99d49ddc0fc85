"""layer_norm_modulate against the textbook formula in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.ops import layer_norm_modulate, use_backend


def formula(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Token by token: token l reads row l // (L // R)."""
    length, rows = x.shape[1], shift.shape[1]
    row = torch.arange(length, device=x.device) // max(length // rows, 1)
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * (1 + scale[:, row]) + shift[:, row]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def inputs(
    draw, b: int, length: int, d: int, r: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    return [draw(b, length, d, dtype=dtype), draw(b, r, d, dtype=dtype), draw(b, r, d, dtype=dtype)]


@pytest.mark.parametrize(
    ("b", "length", "d", "r"), [(2, 12, 16, 3), (1, 7, 96, 1), (3, 1, 8, 1), (1, 74, 40, 2)]
)
def test_values_and_gradients(
    b, length, d, r, backend, dtype, draw, assert_matches, assert_gradients
) -> None:
    args = inputs(draw, b, length, d, r, dtype)
    args64 = doubled(args)
    out, expected = layer_norm_modulate(*args), formula(*args64)
    assert out.dtype == dtype and out.shape == (b, length, d)
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


@pytest.mark.parametrize(
    ("length", "d", "r"),
    [
        pytest.param(1023, 96, 31, marks=pytest.mark.slow),
        (6, 1536, 2),
        (7, 2048, 7),
        (3, 3072, 1),
        (4, 5120, 2),
        (1, 8192, 1),
    ],
)
def test_real_sizes(length, d, r, backend, draw, assert_matches, assert_gradients) -> None:
    """The widths of the models and beyond, and lengths that no run of tokens divides, as the model
    calls it in bf16.
    """
    args = [draw(1, length, d, dtype=torch.bfloat16), draw(1, r, d), draw(1, r, d)]
    args64 = doubled(args)
    out, expected = layer_norm_modulate(*args), formula(*args64)
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


def test_registered_operator(backend, draw, assert_matches, assert_gradients) -> None:
    """``torch.ops.anyflow.layer_norm_modulate``: on the eager backend too it has a backward formula
    of its own.
    """
    operator, gradient = (
        torch.ops.anyflow.layer_norm_modulate,
        torch.ops.anyflow.layer_norm_modulate_backward,
    )
    args = inputs(draw, 2, 12, 16, 3)
    args64 = doubled(args)
    out, expected = operator(*args), formula(*args64)
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)
    torch.library.opcheck(operator.default, (*args, 1e-6))
    torch.library.opcheck(gradient.default, (out.detach(), *(a.detach() for a in args), 1e-6))


def test_compiles_in_one_graph(backend, draw) -> None:
    compiled = torch.compile(layer_norm_modulate, fullgraph=True, backend="aot_eager")
    args = inputs(draw, 2, 12, 16, 3)
    outputs = compiled(*args), layer_norm_modulate(*args)
    gradients = [torch.autograd.grad(o.square().sum(), args) for o in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("d", "r"), [(7, 5), (33, 1)])
def test_any_width_runs_eagerly(d, r, draw, assert_matches, assert_gradients) -> None:
    args = inputs(draw, 2, 5, d, r, torch.float64)
    args64 = doubled(args)
    out, expected = layer_norm_modulate(*args), formula(*args64)
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(kernel, device, data: st.DataObject) -> None:
    b, r, tokens = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (1, 3), (0, 40)))
    d, seed = 8 * data.draw(st.integers(1, 20)), data.draw(st.integers(0, 99))
    g = torch.Generator().manual_seed(seed)
    args = [
        torch.randn(s, generator=g).to(device) for s in ((b, r * tokens, d), (b, r, d), (b, r, d))
    ]
    with use_backend(kernel):
        out = layer_norm_modulate(*args)
    torch.testing.assert_close(
        out.double(), formula(*(a.double() for a in args)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
def test_modulation_keeps_its_own_dtype(
    x_dtype, backend, draw, assert_matches, assert_gradients
) -> None:
    """The model modulates bf16 tokens with fp32 rows: the result has x's dtype, gradients each
    their own.
    """
    args = [draw(2, 6, 8, dtype=x_dtype), draw(2, 2, 8), draw(2, 2, 8)]
    args64 = doubled(args)
    out, expected = layer_norm_modulate(*args), formula(*args64)
    assert out.dtype == x_dtype
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


def test_eps_is_used(backend, draw, assert_matches) -> None:
    args = [a.detach() for a in inputs(draw, 1, 4, 8, 1)]
    assert_matches(layer_norm_modulate(*args, eps=0.5), formula(*doubled(args), eps=0.5).detach())
    assert not torch.allclose(layer_norm_modulate(*args, eps=0.5), layer_norm_modulate(*args))


def test_large_offset_does_not_cancel(backend, draw) -> None:
    """mean(x^2) - mean(x)^2 would be off by 100 % here; a centered variance is good to fp32's
    resolution at 1e4.
    """
    x = (1e4 + draw(2, 6, 64, dtype=torch.float64)).float().detach()
    zero = torch.zeros(2, 1, 64, device=x.device)
    out = layer_norm_modulate(x, zero, zero)
    expected = formula(x.double(), zero.double(), zero.double())
    assert (out.double() - expected).abs().max() < 2e-3


def test_constant_tokens_give_the_shift(backend, draw) -> None:
    _, shift, scale = inputs(draw, 2, 4, 8, 2)
    out = layer_norm_modulate(torch.full((2, 4, 8), 3.0, device=shift.device), shift, scale)
    torch.testing.assert_close(out, shift.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("shape", [(0, 6, 8), (2, 0, 8)])
def test_empty(shape, backend, device) -> None:
    x = torch.empty(shape, requires_grad=True, device=device)
    shift, scale = (
        torch.zeros(shape[0], 2, 8, requires_grad=True, device=device) for _ in range(2)
    )
    out = layer_norm_modulate(x, shift, scale)
    assert out.shape == shape
    out.sum().backward()
    assert (
        x.grad is not None
        and x.grad.shape == shape
        and not shift.grad.any()
        and not scale.grad.any()
    )


@pytest.mark.parametrize("r", [1, 3])
def test_non_contiguous(r, backend, draw, assert_gradients) -> None:
    x, shift, scale = inputs(draw, 2, 6, 8, r)
    plain = layer_norm_modulate(x, shift, scale)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, shift, scale)]
    assert r == 1 or not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(layer_norm_modulate(*strided), plain)
    # the model passes views of one [B, R, 6, D] tensor
    modulation = torch.stack([shift, scale], dim=2)
    torch.testing.assert_close(layer_norm_modulate(x, *modulation.unbind(2)), plain)
    batch_of_one = layer_norm_modulate(x, shift[:1].expand(2, -1, -1), scale[:1].expand(2, -1, -1))
    torch.testing.assert_close(batch_of_one[:1], plain[:1])
    # a slice: rows of D are contiguous, samples are not adjacent
    padded = torch.cat([x, x], dim=1)[:, :6]
    out64 = formula(*(a64 := doubled([x, shift, scale])))
    assert_gradients([layer_norm_modulate(padded, shift, scale)], [x, shift, scale], [out64], a64)


def test_rows_of_memory_with_gaps(backend, draw, assert_matches) -> None:
    """x and the gradient that arrives are slices of wider tensors: their tokens are not D apart."""
    x, shift, scale = inputs(draw, 2, 6, 8, 3)
    args64 = doubled([x, shift, scale])
    x = torch.cat([x, x + 1], dim=2)[..., :8].detach().requires_grad_()
    cotangent = draw(2, 6, 24).detach()[..., 8:16]
    out, out64 = layer_norm_modulate(x, shift, scale), formula(*args64)
    assert_matches(out, out64)
    for got, expected in zip(
        torch.autograd.grad(out, (x, shift, scale), cotangent),
        torch.autograd.grad(out64, args64, cotangent.double()),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_second_derivative(backend, draw) -> None:
    """The reference has one; a kernel says that it has none, instead of a wrong one."""
    args = inputs(draw, 1, 4, 8, 2)
    gradients = torch.autograd.grad(
        layer_norm_modulate(*args).square().sum(), args, create_graph=True
    )
    penalty = sum(g.square().sum() for g in gradients)
    if backend == "eager":
        assert all(g.isfinite().all() for g in torch.autograd.grad(penalty, args))
    else:
        with pytest.raises(
            RuntimeError, match="layer_norm_modulate: a fused kernel has no second derivative"
        ):
            torch.autograd.grad(penalty, args)


@pytest.mark.parametrize("r", [1, 2])
def test_gradcheck(r, draw) -> None:
    assert torch.autograd.gradcheck(layer_norm_modulate, inputs(draw, 2, 4, 3, r, torch.float64))


X, ROW = torch.zeros(2, 6, 4), torch.zeros(2, 1, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[0], ROW, ROW), "x must be"),
        ((X.long(), ROW, ROW), "x must be"),
        ((X, ROW[:, 0], ROW), "shift must be"),
        ((X, ROW.long(), ROW), "shift must be"),
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
