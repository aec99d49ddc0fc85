"""dual_timestep_embedding: forms of its gate, the activation's rounding, extremes."""

import pytest
import torch
from checks import DEVICE, check
from torch.nn.functional import silu

from anyflow.ops import dual_timestep_embedding
from anyflow.ops.examples import dual_timestep_embedding as example

FUSIONS = ("gated", "additive")


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("gate", [0.0, 1.0, -0.5])
def test_any_gate(gate, fusion, backend, dtype) -> None:
    arguments = example(3, 16, fusion).arguments(DEVICE, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    check(example(3, 16).op, arguments | {"gate": torch.tensor(gate, dtype=wide, device=DEVICE)})


def test_gradient_of_the_gate_alone(backend) -> None:
    arguments = example(3, 16, learned=True).arguments(DEVICE, torch.float32)
    check(
        example(3, 16).op,
        {n: v.detach() if n in ("t_emb", "r_emb") else v for n, v in arguments.items()},
    )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_activation_is_of_the_returned_embedding(half, backend, draw, approximation) -> None:
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


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_gate_as_a_tensor(shape, backend, draw, device) -> None:
    t, r, gate = draw(3, 8), draw(3, 8), torch.full(shape, 0.25, device=device, requires_grad=True)
    outputs = [dual_timestep_embedding(t, r, g) for g in (gate, 0.25)]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    (gradient,) = torch.autograd.grad(sum(o.sum() for o in outputs[0]), gate)
    assert gradient.shape == shape


def test_default_is_gated_and_gate_zero_ignores_r(backend, draw) -> None:
    t, r = draw(3, 8), draw(3, 8)
    default, gated = (dual_timestep_embedding(t, r, 0.25, *f)[0] for f in ((), ("gated",)))
    assert torch.equal(default, gated)
    for fusion in FUSIONS:
        emb, activated = dual_timestep_embedding(t, r, 0.0, fusion)
        assert torch.equal(emb, t)
        torch.testing.assert_close(activated, silu(t))


def test_extremes_stay_finite(backend, device) -> None:
    t = torch.tensor([[-1e4, 1e4]], device=device, requires_grad=True)
    emb, activated = dual_timestep_embedding(t, t.detach(), 0.25)
    torch.testing.assert_close(activated, torch.tensor([[0.0, 1e4]], device=device))
    assert torch.isfinite(emb).all()
    activated.sum().backward()
    torch.testing.assert_close(t.grad, torch.tensor([[0.0, 0.75]], device=device))
