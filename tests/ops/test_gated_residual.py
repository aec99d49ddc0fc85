"""gated_residual: its rounding, its copy-free gradient, and the sum without a gate."""

import pytest
import torch
from checks import assert_matches
from torch import Tensor

from anyflow.ops import gated_residual, residual_layer_norm


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("narrow", "half_step"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)]
)
def test_wider_branch_is_rounded_once(gated, narrow, half_step, backend, device) -> None:
    """Beside x in 16 bits, half a step and a bit more in fp32 rounds up.

    Rounding y first would make it a tie, which goes to even.
    """
    x = torch.ones(1, 1, 8, dtype=narrow, device=device)
    y = torch.full((1, 1, 8), half_step + 2**-20, device=device)
    gate = torch.ones(1, 1, 8, device=device) if gated else None
    assert (gated_residual(x, y, gate) == 1 + 2 * half_step).all()


@pytest.mark.parametrize("r", [None, 1, 3])
def test_is_the_first_result_of_residual_layer_norm(r, backend, dtype, draw) -> None:
    shapes = [(2, 6, 8)] * 2 + ([] if r is None else [(2, r, 8)])
    args = [draw(*shape, dtype=dtype) for shape in shapes]
    assert torch.equal(gated_residual(*args), residual_layer_norm(*args)[0])


def test_gradient_of_the_stream_is_the_gradient(backend, draw) -> None:
    """x is handed the gradient itself: no pass over memory."""
    x, y, gate = draw(1, 4, 8), draw(1, 4, 8), draw(1, 2, 8)
    seen: list[Tensor] = []
    middle = x * 1
    middle.register_hook(seen.append)
    out, grad = gated_residual(middle, y, gate), torch.ones_like(x)
    torch.autograd.grad(out, [x, y, gate], grad)
    assert seen[0].data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 5, 7), (0, 6, 8), (2, 0, 8)])
def test_without_a_gate(shape, y_dtype, backend, dtype, draw) -> None:
    x, y = draw(*shape, dtype=dtype), draw(*shape, dtype=y_dtype)
    out = gated_residual(x, y)
    assert out.dtype == dtype and out.shape == shape
    assert_matches(out, x.double() + y.double())
    for g, t in zip(torch.autograd.grad(out, (x, y), torch.ones_like(out)), (x, y), strict=True):
        assert g.dtype == t.dtype and torch.equal(g, torch.ones_like(t))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(2, 3, 4), "y must have the shape of x"),
        (torch.zeros(2, 1, 4), "y must have the shape of x"),
        (torch.zeros(2, 6, 4, device="meta"), "y is on meta"),
    ],
)
def test_bad_branch_without_a_gate(y, message) -> None:
    with pytest.raises(ValueError, match=f"gated_residual: .*{message}"):
        gated_residual(torch.zeros(2, 6, 4), y)
