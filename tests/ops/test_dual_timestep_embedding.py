"""dual_timestep_embedding: forms of its gate, the activation's rounding, extremes."""

import pytest
import torch
from checks import DEVICE, approximation
from forms import FUSIONS
from torch.nn.functional import silu

from anyflow.ops import dual_timestep_embedding


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_activation_is_of_the_returned_embedding(half, backend, draw) -> None:
    """The activation is half a unit in the last place off at most.

    That of the embedding before rounding is further off.
    """
    emb, activated = dual_timestep_embedding(*(draw(4, 256, dtype=half) for _ in range(2)), 0.3)
    expected = silu(emb.double())
    unit = torch.finfo(half)
    # On a GPU, of emb / (1 + exp(-emb)): the exponent is rounded too, to |emb| 2^-24 of the result.
    off = approximation("exp") + approximation("division")
    off += emb.abs().max().item() * 2**-24 if off else 0.0
    limit = (0.5001 * unit.eps + off) * expected.abs().clamp_min(unit.smallest_normal)
    assert ((activated.double() - expected).abs() <= limit).all()


def test_forms_of_the_gate(backend, draw) -> None:
    """A number is a tensor of one element, fusion is gated by default, and zero ignores r."""
    t, r = draw(3, 8), draw(3, 8)
    plain = dual_timestep_embedding(t, r, 0.25)
    for shape in ((), (1,), (1, 1)):
        gate = torch.full(shape, 0.25, device=DEVICE, requires_grad=True)
        outputs = dual_timestep_embedding(t, r, gate, "gated")
        assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))
        (gradient,) = torch.autograd.grad(sum(o.sum() for o in outputs), gate)
        assert gradient.shape == shape
    for fusion in FUSIONS:
        emb, activated = dual_timestep_embedding(t, r, 0.0, fusion)
        assert torch.equal(emb, t)
        torch.testing.assert_close(activated, silu(t))


def test_extremes_stay_finite(backend) -> None:
    t = torch.tensor([[-1e4, 1e4]], device=DEVICE, requires_grad=True)
    emb, activated = dual_timestep_embedding(t, t.detach(), 0.25)
    torch.testing.assert_close(activated, torch.tensor([[0.0, 1e4]], device=DEVICE))
    assert torch.isfinite(emb).all()
    (gradient,) = torch.autograd.grad(activated.sum(), t)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.75]], device=DEVICE))
