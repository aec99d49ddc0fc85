"""layer_norm_modulate where a norm has little to divide by."""

import torch
from formulas import normed

from anyflow.ops import layer_norm_modulate


def test_large_offset_does_not_cancel(backend, draw, device) -> None:
    """The variance is centered, and good to fp32's resolution at 1e4.

    mean(x^2) - mean(x)^2 would be off by 100 % here.
    """
    x = (1e4 + draw(2, 6, 64, dtype=torch.float64)).float().detach()
    zero = torch.zeros(2, 1, 64, device=device)
    out = layer_norm_modulate(x, zero, zero)
    assert (out.double() - normed(x.double(), 1e-6)).abs().max() < 2e-3


def test_constant_tokens_give_the_shift(backend, draw, device) -> None:
    shift, scale = (draw(2, 2, 8) for _ in range(2))
    out = layer_norm_modulate(torch.full((2, 4, 8), 3.0, device=device), shift, scale)
    torch.testing.assert_close(out, shift.repeat_interleave(2, dim=1))
