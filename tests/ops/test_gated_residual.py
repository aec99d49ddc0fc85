"""gated_residual against the textbook formula in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.ops import gated_residual, residual_layer_norm, use_backend


def formula(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Token by token: token l reads row l // (L // R)."""
    if gate is None:
        return x + y
    row = torch.arange(x.shape[1], device=x.device) // max(x.shape[1] // gate.shape[1], 1)
    return x + y * gate[:, row]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def inputs(
    draw, b: int, length: int, d: int, r: int | None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """x, y and, unless r is None, a gate."""
    shapes = [(b, length, d), (b, length, d)] + ([] if r is None else [(b, r, d)])
    return [draw(*shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("b", "length", "d", "r"),
    [(2, 12, 16, 3), (1, 7, 96, 1), (3, 1, 8, 1), (1, 74, 40, 2), (2, 6, 8, None)],
)
def test_values_and_gradients(
    b, length, d, r, backend, dtype, draw, assert_matches, assert_gradients
) -> None:
    args = inputs(draw, b, length, d, r, dtype)
    args64 = doubled(args)
    out, expected = gated_residual(*args), formula(*args64)
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
    """The widths of the models and beyond, and lengths that no run of tokens divides: bf16 tokens,
    an fp32 gate.
    """
    args = [*inputs(draw, 1, length, d, None, torch.bfloat16), draw(1, r, d)]
    args64 = doubled(args)
    out, expected = gated_residual(*args), formula(*args64)
    assert out.dtype == torch.bfloat16
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


@pytest.mark.parametrize(
    ("x", "y", "gate"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.bfloat16, None),
    ],
)
def test_every_tensor_keeps_its_dtype(
    x, y, gate, backend, draw, assert_matches, assert_gradients
) -> None:
    args = [draw(2, 6, 8, dtype=x), draw(2, 6, 8, dtype=y)] + (
        [] if gate is None else [draw(2, 2, 8, dtype=gate)]
    )
    args64 = doubled(args)
    out, expected = gated_residual(*args), formula(*args64)
    assert out.dtype == x
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("narrow", "half_step"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)]
)
def test_wider_branch_is_rounded_once(gated, narrow, half_step, backend, device) -> None:
    """x in 16 bits, y in fp32: half a step and a bit more rounds up; rounding y first would make it
    a tie, to even.
    """
    x, y = (
        torch.ones(1, 1, 8, dtype=narrow, device=device),
        torch.full((1, 1, 8), half_step + 2**-20, device=device),
    )
    gate = torch.ones(1, 1, 8, device=device) if gated else None
    assert (gated_residual(x, y, gate) == 1 + 2 * half_step).all()


@pytest.mark.parametrize("r", [None, 1, 3])
def test_is_the_first_result_of_residual_layer_norm(r, backend, dtype, draw) -> None:
    args = inputs(draw, 2, 6, 8, r, dtype)
    assert torch.equal(gated_residual(*args), residual_layer_norm(*args)[0])


def test_gradient_of_the_stream_is_the_gradient(backend, draw) -> None:
    """x is handed the gradient itself: no pass over memory."""
    x, y, gate = inputs(draw, 1, 4, 8, 2)
    seen: list[Tensor] = []
    middle = x * 1
    middle.register_hook(seen.append)
    out, grad = gated_residual(middle, y, gate), torch.ones_like(x)
    torch.autograd.grad(out, [x, y, gate], grad)
    assert seen[0].data_ptr() == grad.data_ptr()


def test_registered_operator(backend, draw, assert_matches, assert_gradients) -> None:
    """``torch.ops.anyflow.gated_residual``: on the eager backend too it has a backward formula of
    its own.
    """
    operator, gradient = torch.ops.anyflow.gated_residual, torch.ops.anyflow.gated_residual_backward
    for r in (1, 3):
        args = inputs(draw, 2, 12, 16, r)
        args64 = doubled(args)
        out, expected = operator(*args), formula(*args64)
        assert_matches(out, expected)
        assert_gradients([out], args, [expected], args64)
        torch.library.opcheck(operator.default, args)
        torch.library.opcheck(gradient.default, (out.detach(), *(a.detach() for a in args[1:])))


@pytest.mark.parametrize("r", [None, 3])
def test_compiles_in_one_graph(r, backend, draw) -> None:
    compiled = torch.compile(gated_residual, fullgraph=True, backend="aot_eager")
    args = inputs(draw, 2, 12, 16, r)
    outputs = compiled(*args), gated_residual(*args)
    gradients = [torch.autograd.grad(o.square().sum(), args) for o in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("d", "r"), [(7, 5), (33, 1)])
def test_any_width_runs_eagerly(d, r, draw, assert_matches, assert_gradients) -> None:
    args = inputs(draw, 2, 5, d, r, torch.float64)
    args64 = doubled(args)
    out, expected = gated_residual(*args), formula(*args64)
    assert_matches(out, expected)
    assert_gradients([out], args, [expected], args64)


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(kernel, device, data: st.DataObject) -> None:
    b, r, tokens = (data.draw(st.integers(low, high)) for low, high in ((0, 3), (1, 3), (0, 40)))
    d, seed = 8 * data.draw(st.integers(1, 20)), data.draw(st.integers(0, 99))
    g = torch.Generator().manual_seed(seed)
    shapes = ((b, r * tokens, d), (b, r * tokens, d), (b, r, d))
    args = [torch.randn(s, generator=g).to(device).requires_grad_() for s in shapes]
    with use_backend(kernel):
        out = gated_residual(*args)
        gradients = torch.autograd.grad(out.square().sum(), args)
    expected = formula(*(args64 := doubled(args)))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    expected_gradients = torch.autograd.grad(expected.square().sum(), args64)
    torch.testing.assert_close(
        [t.double() for t in gradients], list(expected_gradients), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(0, 6, 8), (2, 0, 8)])
@pytest.mark.parametrize("gated", [False, True])
def test_empty(shape, gated, backend, device) -> None:
    x, y = (torch.empty(shape, requires_grad=True, device=device) for _ in range(2))
    gate = torch.zeros(shape[0], 2, 8, requires_grad=True, device=device)
    out = gated_residual(x, y, gate if gated else None)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad is not None and y.grad is not None and x.grad.shape == y.grad.shape == shape
    assert not gated or (
        gate.grad is not None and gate.grad.shape == gate.shape and not gate.grad.any()
    )


@pytest.mark.parametrize("r", [1, 3])
def test_non_contiguous(r, backend, draw, assert_gradients) -> None:
    x, y, gate = inputs(draw, 2, 6, 8, r)
    plain = gated_residual(x, y, gate)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, y, gate)]
    assert r == 1 or not any(t.is_contiguous() for t in strided)
    out = gated_residual(*strided)
    assert backend == "eager" or out.is_contiguous()
    torch.testing.assert_close(out, plain)
    # the model passes views of one [B, R, 6, D] tensor
    modulation = torch.stack([gate, gate], dim=2)
    torch.testing.assert_close(gated_residual(x, y, modulation.unbind(2)[1]), plain)
    shared = gated_residual(x, y, gate[:1].expand(2, -1, -1))
    torch.testing.assert_close(shared[:1], plain[:1])
    # strides of their own
    x_apart, y_apart = (torch.stack([t] * n, dim=2)[:, :, 0] for t, n in ((x, 2), (y, 3)))
    out64 = formula(*(args64 := doubled([x, y, gate])))
    torch.testing.assert_close(gated_residual(x_apart, y_apart, gate), plain)
    assert_gradients([gated_residual(x_apart, y_apart, gate)], [x, y, gate], [out64], args64)
    out = gated_residual(x, y, gate)
    # strides of a transpose
    gradients = torch.autograd.grad(out.transpose(1, 2).contiguous().sum(), [x, y, gate])
    expected = torch.autograd.grad(formula(*args64).sum(), args64)
    torch.testing.assert_close(
        [g.double() for g in gradients], list(expected), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("r", [None, 1, 2])
def test_gradcheck(r, draw) -> None:
    assert torch.autograd.gradcheck(gated_residual, inputs(draw, 2, 4, 3, r, torch.float64))


X, ROW = torch.zeros(2, 6, 4), torch.zeros(2, 1, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[0], X[0], ROW), "x must be"),
        ((X.long(), X, ROW), "x must be"),
        ((X, X[:, :3], ROW), "y must have the shape of x"),
        ((X, X[:, :3], None), "y must have the shape of x"),
        ((X, X[:, :1], None), "y must have the shape of x"),
        ((X, X.long(), ROW), "y must have the shape of x"),
        ((X, X.to("meta"), None), "y is on meta"),
        ((X, X.to("meta"), ROW), "y is on meta"),
        ((X, X, ROW[:, 0]), "gate must be"),
        ((X, X, ROW.long()), "gate must be"),
        ((X, X, ROW[:1]), "gate must be"),
        ((X, X, ROW[..., :3]), "gate must be"),
        ((X, X, torch.zeros(2, 4, 4)), "must divide the L=6"),
        ((X, X, torch.zeros(2, 0, 4)), "must divide the L=6"),
        ((X, X, ROW.to("meta")), "gate is on meta"),
    ],
)
def test_bad_input(args, message) -> None:
    with pytest.raises(ValueError, match=f"gated_residual: .*{message}"):
        gated_residual(*args)


@pytest.mark.parametrize(
    ("d", "wide", "message"),
    [(4, None, "D=4"), (8, 0, "float64"), (8, 1, "float64"), (8, 2, "float64")],
)
def test_forced_kernel_says_what_it_does_not_take(kernel, d, wide, message, draw) -> None:
    args = [a.double() if i == wide else a for i, a in enumerate(inputs(draw, 2, 6, d, 2))]
    with (
        use_backend(kernel),
        pytest.raises(ValueError, match=f"gated_residual: .*does not support .*{message}"),
    ):
        gated_residual(*args)
