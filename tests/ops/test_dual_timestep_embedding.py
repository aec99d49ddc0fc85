"""dual_timestep_embedding against the formula in fp64."""

import pytest
import torch
from torch import Tensor

from anyflow.ops import dual_timestep_embedding


def formula(t: Tensor, r: Tensor, gate: float, fusion: str, rounded_to: torch.dtype) -> tuple[Tensor, Tensor]:
    emb = (1 - gate) * t + gate * r if fusion == "gated" else t + gate * r
    emb = emb + (emb.to(rounded_to).double() - emb).detach()  # the activation reads what is returned
    return emb, emb / (1 + torch.exp(-emb))


def inputs(g: torch.Generator, n: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("fusion", ["gated", "additive"])
@pytest.mark.parametrize("gate", [0.25, 0.0, 1.0, -0.5])
@pytest.mark.parametrize(("n", "d"), [(3, 16), (1, 7)])
def test_values_and_gradients(n, d, gate, fusion, dtype, generator, assert_matches, assert_gradients) -> None:
    args = inputs(generator, n, d, dtype)
    args64 = [a.detach().double().requires_grad_() for a in args]
    out = dual_timestep_embedding(*args, gate, fusion)
    expected = formula(*args64, gate, fusion, dtype)
    for o, e in zip(out, expected, strict=True):
        assert o.dtype == dtype and o.shape == (n, d)
        assert_matches(o, e)
    assert_gradients(out, args, expected, args64)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_gate_as_a_tensor(shape, generator) -> None:
    t, r = inputs(generator, 3, 8, torch.float32)
    for a, b in zip(
        dual_timestep_embedding(t, r, torch.full(shape, 0.25)), dual_timestep_embedding(t, r, 0.25), strict=True
    ):
        assert torch.equal(a, b)


def test_default_is_gated_and_gate_zero_ignores_r(generator) -> None:
    t, r = inputs(generator, 3, 8, torch.float32)
    assert torch.equal(dual_timestep_embedding(t, r, 0.25)[0], dual_timestep_embedding(t, r, 0.25, "gated")[0])
    for fusion in ("gated", "additive"):
        emb, activated = dual_timestep_embedding(t, r, 0.0, fusion)
        assert torch.equal(emb, t) and torch.equal(activated, torch.nn.functional.silu(t))


def test_equal_embeddings_are_unchanged_when_gated(generator) -> None:
    t = inputs(generator, 3, 8, torch.float64)[0]
    torch.testing.assert_close(dual_timestep_embedding(t, t, 0.3)[0], t, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(dual_timestep_embedding(t, t, 0.3, "additive")[0], 1.3 * t)


def test_empty_and_non_contiguous(generator) -> None:
    emb, activated = dual_timestep_embedding(torch.empty(0, 8), torch.empty(0, 8), 0.25)
    assert emb.shape == activated.shape == (0, 8)
    t, r = inputs(generator, 8, 3, torch.float32)
    assert torch.equal(
        dual_timestep_embedding(t.T, r.T, 0.25)[1], dual_timestep_embedding(t.T.contiguous(), r.T.contiguous(), 0.25)[1]
    )


def test_extremes_stay_finite() -> None:
    t = torch.tensor([[-1e4, 1e4]])
    emb, activated = dual_timestep_embedding(t, t, 0.25)
    torch.testing.assert_close(activated, torch.tensor([[0.0, 1e4]]))
    assert torch.isfinite(emb).all()


@pytest.mark.parametrize("fusion", ["gated", "additive"])
def test_gradcheck(fusion, generator) -> None:
    gate = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t, r, g: dual_timestep_embedding(t, r, g, fusion), (*inputs(generator, 2, 3, torch.float64), gate)
    )


E = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((E[0], E[0], 0.5), "t_emb must be"),
        ((E.long(), E, 0.5), "t_emb must be"),
        ((E, E[:2], 0.5), "r_emb must have the shape"),
        ((E, E.to("meta"), 0.5), "r_emb is on meta"),
        ((E, E, 0.5, "sum"), "unknown fusion 'sum'"),
        ((E, E, torch.zeros(2)), "gate must be"),
        ((E, E, torch.zeros(1, device="meta")), "gate is on meta"),
    ],
)
def test_bad_input(args, message) -> None:
    with pytest.raises(ValueError, match=f"dual_timestep_embedding: .*{message}"):
        dual_timestep_embedding(*args)
