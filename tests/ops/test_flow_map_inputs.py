"""flow_map_inputs against the interpolation written out sample by sample in fp64."""

import pytest
import torch
from torch import Tensor

from anyflow.ops import flow_map_inputs

B, F = 4, 3
SHAPE = (B, F, 2, 3, 5)


def formula(x0: Tensor, eps: Tensor, t: Tensor, plus: Tensor, minus: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    """One frame at a time; t, plus, minus are [B, F]."""
    at, above, below = [], [], []
    for b in range(x0.shape[0]):
        for f in range(x0.shape[1]):
            v = eps[b, f] - x0[b, f]
            x = (1 - t[b, f]) * x0[b, f] + t[b, f] * eps[b, f]
            at.append(x)
            if b in rows:
                above.append(x + plus[b, f] * v)
                below.append(x - minus[b, f] * v)
    shape = (len(rows), *x0.shape[1:])
    return torch.stack(at).reshape(x0.shape), torch.stack(above).reshape(shape), torch.stack(below).reshape(shape)


def inputs(g: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(SHAPE, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]


def frames(times: Tensor) -> Tensor:
    return times.double().reshape(B, -1).expand(B, F)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("rows", [None, [2, 0], [1], [0, 1, 2, 3]])
def test_values_and_gradients(per_frame, rows, dtype, generator, assert_matches, assert_gradients) -> None:
    args = inputs(generator, dtype)
    args64 = [a.detach().double().requires_grad_() for a in args]
    t = torch.rand((B, F) if per_frame else (B,), generator=generator)
    index = None if rows is None else torch.tensor(rows)
    out = flow_map_inputs(*args, t, 0.005, index)
    side = torch.full((B, F), 0.005, dtype=torch.float64)
    order = list(range(B)) if rows is None else sorted(rows)
    at, above, below = formula(*args64, frames(t), side, side, order)
    pick = slice(None) if rows is None else torch.tensor([order.index(r) for r in rows])
    expected = (at, above[pick], below[pick])
    wide = torch.promote_types(dtype, torch.float32)
    assert [o.dtype for o in out] == [dtype, wide, wide]
    for o, e in zip(out, expected, strict=True):
        assert_matches(o, e)
    assert_gradients(out, args, expected, args64)


def test_difference_of_the_sides_survives_half_precision(generator) -> None:
    """SPEC D1: rounded to bf16, x+ - x- would be off by about 20 %; kept in fp32 it is 2 epsilon v."""
    x0, eps = (t.detach() for t in inputs(generator, torch.bfloat16))
    v = (eps.double() - x0.double()).mul(2 * 0.005)
    _, plus, minus = flow_map_inputs(x0, eps, torch.full((B,), 0.7), 0.005)
    error = ((plus.double() - minus.double()) - v).norm() / v.norm()
    rounded = ((plus.bfloat16().double() - minus.bfloat16().double()) - v).norm() / v.norm()
    assert error < 1e-4 and rounded > 0.1


def test_mask_equals_indices(generator) -> None:
    args = [t.detach() for t in inputs(generator, torch.float32)]
    t = torch.rand(B, generator=generator)
    mask = torch.tensor([True, False, False, True])
    by_mask = flow_map_inputs(*args, t, 0.01, mask)
    by_index = flow_map_inputs(*args, t, 0.01, torch.tensor([0, 3]))
    assert all(torch.equal(a, b) for a, b in zip(by_mask, by_index, strict=True))
    none = flow_map_inputs(*args, t, 0.01, torch.zeros(B, dtype=torch.bool))
    assert none[1].shape == none[2].shape == (0, *SHAPE[1:])


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("rows", [None, [0, 3]])
def test_one_sided_pairs(per_frame, rows, generator, assert_matches) -> None:
    """At t = 1 nothing lies above, at t = 0 nothing below: each side has its own width."""
    x0, eps = inputs(generator, torch.float64)
    t = torch.tensor([1.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    plus, minus = torch.minimum(1 - t, torch.tensor(0.01)), torch.minimum(t, torch.tensor(0.01))
    shape = (B, F) if per_frame else (B,)
    pair = tuple(s.reshape(B, -1).expand(B, F).clone().reshape(shape) if per_frame else s for s in (plus, minus))
    index = None if rows is None else torch.tensor(rows)
    out = flow_map_inputs(x0, eps, t, pair, index)
    expected = formula(x0, eps, frames(t), frames(plus), frames(minus), rows or list(range(B)))
    for o, e in zip(out, expected, strict=True):
        assert_matches(o, e)
    assert torch.equal(out[1][0], eps[0]) and torch.equal(out[2][-1], x0[3])


@pytest.mark.parametrize("epsilon", [torch.tensor(0.01), torch.full((B,), 0.01), torch.full((B, F), 0.01)])
def test_epsilon_forms_agree(epsilon, generator) -> None:
    args = inputs(generator, torch.float32)
    t = torch.rand(B, F, generator=generator)
    for a, b in zip(flow_map_inputs(*args, t, epsilon), flow_map_inputs(*args, t, 0.01), strict=True):
        torch.testing.assert_close(a, b)


def test_ends_are_exact(generator) -> None:
    x0, eps = inputs(generator, torch.float32)
    assert torch.equal(flow_map_inputs(x0, eps, torch.zeros(B), 0.0)[0], x0)
    assert torch.equal(flow_map_inputs(x0, eps, torch.ones(B), 0.0)[1], eps)


def test_empty_batch_and_non_contiguous(generator) -> None:
    empty = torch.empty(0, *SHAPE[1:])
    assert all(o.shape == empty.shape for o in flow_map_inputs(empty, empty, torch.empty(0), 0.01))
    args = inputs(generator, torch.float32)
    strided = [a.transpose(1, 2).contiguous().transpose(1, 2) for a in args]  # channels-first storage
    assert not strided[0].is_contiguous()
    t = torch.rand(B, generator=generator)
    for a, b in zip(flow_map_inputs(*strided, t, 0.01), flow_map_inputs(*args, t, 0.01), strict=True):
        assert torch.equal(a, b)


def test_inputs_are_not_written(generator) -> None:
    args = [t.detach() for t in inputs(generator, torch.float32)]
    copies = [a.clone() for a in args]
    for o in flow_map_inputs(*args, torch.zeros(B), 0.0):
        o.zero_()
    assert all(torch.equal(a, c) for a, c in zip(args, copies, strict=True))


def test_gradcheck(generator) -> None:
    args = [t[:2, :, :1, :1].detach().requires_grad_() for t in inputs(generator, torch.float64)]
    t = torch.rand(2, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: flow_map_inputs(a, b, t, 0.01, torch.tensor([1])), args)


X, T = torch.zeros(SHAPE), torch.zeros(B)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, X[:, :2], T, 0.1), "noise must have the shape of latents"),
        ((X, X.to("meta"), T, 0.1), "noise is on meta"),
        ((T, T, T, 0.1), "latents must be"),
        ((X, X, T[:2], 0.1), "t must be"),
        ((X, X, torch.zeros(B, F + 1), 0.1), "t must be"),
        ((X, X, torch.zeros(B, F, 1), 0.1), "t must be"),
        ((X, X, T.to("meta"), 0.1), "t is on meta"),
        ((X, X, T, T[:2]), "epsilon plus must be"),
        ((X, X, T, (T, T[:2])), "epsilon minus must be"),
        ((X, X, T, T.to("meta")), "epsilon plus is on meta"),
        ((X, X, T, 0.1, torch.tensor([0], device="meta")), "rows is on meta"),
        ((X, X, T, 0.1, torch.tensor([True])), "rows mask must be"),
        ((X, X, T, 0.1, torch.tensor([0.0])), "rows must be"),
        ((X, X, T, 0.1, torch.tensor([[0]])), "rows must be"),
    ],
)
def test_bad_input(args, message) -> None:
    with pytest.raises(ValueError, match=f"flow_map_inputs: .*{message}"):
        flow_map_inputs(*args)
