"""dual_timestep_embedding against the formula in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.ops import dual_timestep_embedding, use_backend


def formula(
    t: Tensor, r: Tensor, gate: float | Tensor, fusion: str, returned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The activation is that of the embedding as it was returned, rounded, if that is given."""
    emb = (1 - gate) * t + gate * r if fusion == "gated" else t + gate * r
    rounded = emb if returned is None else emb + (returned.double() - emb).detach()
    return emb, rounded / (1 + torch.exp(-rounded))


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def inputs(draw, n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(n, d, dtype=dtype), draw(n, d, dtype=dtype)]


@pytest.mark.parametrize("fusion", ["gated", "additive"])
@pytest.mark.parametrize("gate", [0.25, 0.0, 1.0, -0.5])
@pytest.mark.parametrize(("n", "d"), [(3, 16), (1, 7)])
def test_values_and_gradients(
    n, d, gate, fusion, backend, dtype, draw, assert_matches, assert_gradients
) -> None:
    args = inputs(draw, n, d, dtype)
    args64 = doubled(args)
    out = dual_timestep_embedding(*args, gate, fusion)
    expected = formula(*args64, gate, fusion, out[0])
    for o, e in zip(out, expected, strict=True):
        assert o.dtype == dtype and o.shape == (n, d)
        assert_matches(o, e)
    assert_gradients(out, args, expected, args64)


@pytest.mark.parametrize(("n", "d"), [(1, 8), (7, 96), (21, 1536), (1, 5120), (1023, 1), (4, 256)])
def test_real_sizes(n, d, backend, draw, assert_matches, assert_gradients) -> None:
    """One row per frame at the widths of the models, and sizes below, above and at a program's
    share.
    """
    args = inputs(draw, n, d, torch.bfloat16)
    args64 = doubled(args)
    out = dual_timestep_embedding(*args, 0.25)
    expected = formula(*args64, 0.25, "gated", out[0])
    for o, e in zip(out, expected, strict=True):
        assert_matches(o, e)
    assert_gradients(out, args, expected, args64)


@pytest.mark.parametrize("fusion", ["gated", "additive"])
@pytest.mark.parametrize(("n", "d"), [(3, 16), (5, 1000)])
def test_gradient_of_the_gate(
    n, d, fusion, backend, dtype, draw, assert_matches, assert_gradients
) -> None:
    """A sum over everything, in fp32 for half-precision embeddings; the gate keeps its own dtype
    and shape.
    """
    wide = torch.promote_types(dtype, torch.float32)
    gate = torch.tensor([0.25], dtype=wide, device=draw(1).device, requires_grad=True)
    args = [*inputs(draw, n, d, dtype), gate]
    args64 = doubled(args)
    out = dual_timestep_embedding(*args, fusion)
    expected = formula(*args64, fusion, out[0])
    assert_gradients(out, args, expected, args64)


def test_gradient_of_the_gate_alone(backend, draw, assert_gradients) -> None:
    t, r = (e.detach() for e in inputs(draw, 3, 16))
    gate = torch.tensor(0.25, device=t.device, requires_grad=True)
    gate64 = doubled([gate])
    out, expected = (
        dual_timestep_embedding(t, r, gate),
        formula(t.double(), r.double(), gate64[0], "gated"),
    )
    assert_gradients(out, [gate], expected, gate64)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_result(used, backend, draw, assert_gradients) -> None:
    """As when the projection reads the activation and nothing reads the embedding, or the other way
    round.
    """
    args = inputs(draw, 3, 16)
    args64 = doubled(args)
    out, expected = (
        dual_timestep_embedding(*args, 0.25)[used],
        formula(*args64, 0.25, "gated")[used],
    )
    assert_gradients([out], args, [expected], args64)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_activation_is_of_the_returned_embedding(half, backend, draw, approximation) -> None:
    """Half a unit in the last place off at most, which that of the embedding before rounding is
    not.
    """
    emb, activated = dual_timestep_embedding(*inputs(draw, 4, 256, half), 0.3)
    expected = torch.nn.functional.silu(emb.double())
    unit = torch.finfo(half)
    # On a GPU, of emb / (1 + exp(-emb)): the exponent is rounded too, to |emb| 2^-24 of the result.
    off = approximation("exp") + approximation("division")
    off += emb.abs().max().item() * 2**-24 if off else 0.0
    limit = (0.5001 * unit.eps + off) * expected.abs().clamp_min(unit.smallest_normal)
    assert ((activated.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize(
    ("t_dtype", "r_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_embeddings_keep_their_own_dtypes(
    t_dtype, r_dtype, backend, draw, assert_matches, assert_gradients
) -> None:
    args = [draw(3, 16, dtype=t_dtype), draw(3, 16, dtype=r_dtype)]
    args64 = doubled(args)
    out = dual_timestep_embedding(*args, 0.25)
    expected = formula(*args64, 0.25, "gated", out[0])
    for o, e in zip(out, expected, strict=True):
        assert o.dtype == t_dtype
        assert_matches(o, e)
    assert_gradients(out, args, expected, args64)


@pytest.mark.parametrize("fusion", ["gated", "additive"])
@pytest.mark.parametrize("gate_gradient", [True, False])
def test_registered_operator(
    fusion, gate_gradient, backend, draw, assert_matches, assert_gradients
) -> None:
    """``torch.ops.anyflow.dual_timestep_embedding``: on the eager backend too it has a backward
    formula of its own.
    """
    operator, backward = (
        torch.ops.anyflow.dual_timestep_embedding,
        torch.ops.anyflow.dual_timestep_embedding_backward,
    )
    args = inputs(draw, 3, 16)
    gate = torch.full((1,), 0.25, device=args[0].device, requires_grad=gate_gradient)
    leaves = [*args, gate] if gate_gradient else args
    leaves64 = doubled(leaves)
    expected = formula(*leaves64[:2], leaves64[2] if gate_gradient else 0.25, fusion)
    out = operator(*args, gate, fusion)
    for o, e in zip(out, expected, strict=True):
        assert_matches(o, e)
    assert_gradients(out, leaves, expected, leaves64)
    torch.library.opcheck(operator.default, (*args, gate, fusion))
    saved = [s.detach() for s in (*out, *args, gate)]
    torch.library.opcheck(backward.default, (*saved, fusion, gate_gradient))


@pytest.mark.parametrize("as_tensor", [True, False])
def test_compiles_in_one_graph(as_tensor, backend, draw) -> None:
    compiled = torch.compile(dual_timestep_embedding, fullgraph=True, backend="aot_eager")
    args = inputs(draw, 3, 16)
    gate = torch.full((1,), 0.25, device=args[0].device, requires_grad=True) if as_tensor else 0.25
    leaves = [*args, gate] if as_tensor else args
    outputs = compiled(*args, gate), dual_timestep_embedding(*args, gate)
    gradients = [torch.autograd.grad(sum(o.square().sum() for o in out), leaves) for out in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(kernel, device, data: st.DataObject) -> None:
    n, d, seed = (data.draw(st.integers(0, high)) for high in (9, 700, 99))
    fusion, gate = data.draw(st.sampled_from(["gated", "additive"])), data.draw(st.floats(-2, 2))
    g = torch.Generator().manual_seed(seed)
    args = [torch.randn(n, d, generator=g).to(device) for _ in range(2)]
    with use_backend(kernel):
        out = dual_timestep_embedding(*args, gate, fusion)
    expected = formula(*(a.double() for a in args), gate, fusion)
    for o, e in zip(out, expected, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_gate_as_a_tensor(shape, backend, draw) -> None:
    t, r = inputs(draw, 3, 8)
    outputs = (
        dual_timestep_embedding(t, r, g) for g in (torch.full(shape, 0.25, device=t.device), 0.25)
    )
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def test_default_is_gated_and_gate_zero_ignores_r(backend, draw) -> None:
    t, r = inputs(draw, 3, 8)
    assert torch.equal(
        dual_timestep_embedding(t, r, 0.25)[0], dual_timestep_embedding(t, r, 0.25, "gated")[0]
    )
    for fusion in ("gated", "additive"):
        emb, activated = dual_timestep_embedding(t, r, 0.0, fusion)
        assert torch.equal(emb, t)
        torch.testing.assert_close(activated, torch.nn.functional.silu(t))


def test_equal_embeddings_are_unchanged_when_gated(draw) -> None:
    t = inputs(draw, 3, 8, torch.float64)[0]
    torch.testing.assert_close(dual_timestep_embedding(t, t, 0.3)[0], t, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(dual_timestep_embedding(t, t, 0.3, "additive")[0], 1.3 * t)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty(shape, backend, device) -> None:
    t, r = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
    gate = torch.full((1,), 0.25, device=device, requires_grad=True)
    emb, activated = dual_timestep_embedding(t, r, gate)
    assert emb.shape == activated.shape == shape
    (emb.sum() + activated.sum()).backward()
    assert t.grad is not None and r.grad is not None and t.grad.shape == r.grad.shape == shape
    assert gate.grad is not None and gate.grad.shape == (1,) and not gate.grad.any()


def test_non_contiguous(backend, draw, assert_matches, assert_gradients) -> None:
    args = inputs(draw, 8, 3)
    args64 = doubled(args)
    views, views64 = [a.T for a in args], [a.T for a in args64]
    assert not views[0].is_contiguous()
    plain = dual_timestep_embedding(*(v.contiguous() for v in views), 0.25)
    out = dual_timestep_embedding(*views, 0.25)
    assert all(
        o.is_contiguous() and torch.equal(o, p)
        for o, p in zip(out, plain, strict=True)
        if backend != "eager"
    )
    expected = formula(*views64, 0.25, "gated")
    for o, e in zip(out, expected, strict=True):
        assert_matches(o, e)
    # gradients arrive as views as well
    assert_gradients([o.T for o in out], args, [e.T for e in expected], args64)
    row = args[0].detach()[:1].expand(8, -1)
    emb = dual_timestep_embedding(row, args[1].detach(), 0.25)[0]
    assert_matches(emb, formula(row.double(), args[1].detach().double(), 0.25, "gated")[0])


def test_extremes_stay_finite(backend, device) -> None:
    t = torch.tensor([[-1e4, 1e4]], device=device, requires_grad=True)
    emb, activated = dual_timestep_embedding(t, t.detach(), 0.25)
    torch.testing.assert_close(activated, torch.tensor([[0.0, 1e4]], device=device))
    assert torch.isfinite(emb).all()
    activated.sum().backward()
    torch.testing.assert_close(t.grad, torch.tensor([[0.0, 0.75]], device=device))


@pytest.mark.parametrize("fusion", ["gated", "additive"])
def test_gradcheck(fusion, draw) -> None:
    gate = torch.tensor([0.25], dtype=torch.float64, device=draw(1).device, requires_grad=True)
    args = (*inputs(draw, 2, 3, torch.float64), gate)
    assert torch.autograd.gradcheck(lambda t, r, g: dual_timestep_embedding(t, r, g, fusion), args)


E = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((E[0], E[0], 0.5), "t_emb must be"),
        ((E.long(), E, 0.5), "t_emb must be"),
        ((E, E[:2], 0.5), "r_emb must have the shape"),
        ((E, E.long(), 0.5), "r_emb must have the shape"),
        ((E, E.to("meta"), 0.5), "r_emb is on meta"),
        ((E, E, 0.5, "sum"), "unknown fusion 'sum'"),
        ((E, E, torch.zeros(2)), "gate must be"),
        ((E, E, torch.zeros(1, dtype=torch.long)), "gate must be"),
        ((E, E, torch.zeros(1, device="meta")), "gate is on meta"),
    ],
)
def test_bad_input(args, message) -> None:
    with pytest.raises(ValueError, match=f"dual_timestep_embedding: .*{message}"):
        dual_timestep_embedding(*args)


def test_forced_kernel_refuses_fp64(kernel, draw) -> None:
    args = inputs(draw, 2, 8, torch.float64)
    with use_backend(kernel), pytest.raises(ValueError, match=r"does not support \(2, 8\) float64"):
        dual_timestep_embedding(*args, 0.25)
