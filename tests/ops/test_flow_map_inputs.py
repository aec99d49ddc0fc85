"""flow_map_inputs against the interpolation written out frame by frame in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.ops import _frames, flow_map_inputs, use_backend
from anyflow.ops.flow_map_inputs import flow_map_batch

B, F = 4, 3
SHAPE = (B, F, 2, 3, 5)
ROWS = [None, [2, 0], [1], [0, 1, 2, 3], [-1, 0, 2, 2, -4], []]


def formula(
    x0: Tensor, eps: Tensor, t: Tensor, plus: Tensor, minus: Tensor, picked: list[int] | None
) -> list[Tensor]:
    """One frame at a time; t, plus, minus are [B, F]."""
    at, above, below = (torch.zeros_like(x0) for _ in range(3))
    for b in range(x0.shape[0]):
        for f in range(x0.shape[1]):
            v = eps[b, f] - x0[b, f]
            at[b, f] = (1 - t[b, f]) * x0[b, f] + t[b, f] * eps[b, f]
            above[b, f] = at[b, f] + plus[b, f] * v
            below[b, f] = at[b, f] - minus[b, f] * v
    return [at, above, below] if picked is None else [at, above[picked], below[picked]]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def inputs(
    draw, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE
) -> list[Tensor]:
    return [draw(*shape, dtype=dtype) for _ in range(2)]


def uniform(draw, *shape: int) -> Tensor:
    return draw(*shape).detach().sigmoid()


def frames(times: Tensor, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return times.double().reshape(shape[0], -1).expand(shape[:2])


def indices(picked: list[int] | None, device: torch.device) -> Tensor | None:
    return None if picked is None else torch.tensor(picked, dtype=torch.long, device=device)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("picked", ROWS)
def test_values_and_gradients(
    per_frame, picked, backend, dtype, draw, device, assert_matches, assert_gradients
) -> None:
    args = inputs(draw, dtype)
    args64 = doubled(args)
    shape = (B, F) if per_frame else (B,)
    t, plus, minus = (
        uniform(draw, *shape),
        0.01 * uniform(draw, *shape),
        0.02 * uniform(draw, *shape),
    )
    out = flow_map_inputs(*args, t, (plus, minus), indices(picked, device))
    expected = formula(*args64, frames(t), frames(plus), frames(minus), picked)
    wide = torch.promote_types(dtype, torch.float32)
    assert [o.dtype for o in out] == [dtype, wide, wide]
    for o, e in zip(out, expected, strict=True):
        assert_matches(o, e)
    assert_gradients(out, args, expected, args64)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (3, 2), (1, 5, 7), (2, 3, 1023), (1, 2, 4, 16, 33), (1, 1, 8, 2, 64)]
)
@pytest.mark.parametrize("picked", [None, [-1]])
def test_sizes(shape, picked, backend, draw, device, assert_matches, assert_gradients) -> None:
    """Frames of one element, of any number of chunks, and no dimensions after F at all."""
    args = inputs(draw, torch.bfloat16, shape)
    args64 = doubled(args)
    t = uniform(draw, *shape[:2])
    out = flow_map_inputs(*args, t, 0.01, indices(picked, device))
    width = torch.full(shape[:2], 0.01, dtype=torch.float64)
    expected = formula(*args64, frames(t, shape), width, width, picked)
    for o, e in zip(out, expected, strict=True):
        assert_matches(o, e)
    assert_gradients(out, args, expected, args64)


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(kernel, device, data: st.DataObject) -> None:
    shape = tuple(
        data.draw(st.integers(low, high)) for low, high in ((1, 4), (0, 3), (0, 3), (1, 700))
    )
    picked = data.draw(st.none() | st.lists(st.integers(-shape[0], shape[0] - 1), max_size=6))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x0, eps = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    t = torch.rand(shape[: data.draw(st.integers(1, 2))], generator=g).to(device)
    with use_backend(kernel):
        out = flow_map_inputs(x0, eps, t, 0.02, indices(picked, x0.device))
    width = torch.full(shape[:2], 0.02, dtype=torch.float64)
    times = t.double().reshape(shape[0], -1).expand(shape[:2]) if t.numel() else width
    for o, e in zip(
        out, formula(x0.double(), eps.double(), times, width, width, picked), strict=True
    ):
        torch.testing.assert_close(o.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("picked", "with_x_t"), [(None, False), ([3, 0, -1], True)])
def test_registered_operator(
    picked, with_x_t, backend, draw, device, assert_matches, assert_gradients
) -> None:
    """``torch.ops.anyflow.flow_map_inputs``: on the eager backend too it has a backward formula of
    its own.
    """
    operator, gradient = (
        torch.ops.anyflow.flow_map_inputs,
        torch.ops.anyflow.flow_map_inputs_backward,
    )
    args = inputs(draw)
    args64 = doubled(args)
    t, plus, minus = uniform(draw, B), 0.01 * uniform(draw, B, F), torch.tensor(0.02, device=device)
    times = (t, plus, minus, indices(picked, device))
    out = operator(*args, *times, torch.float32, with_x_t)
    at, *sides = formula(*args64, frames(t), plus.double(), minus.double().expand(B, F), picked)
    expected = [at, torch.cat([*sides, at] if with_x_t else sides)]
    for o, e in zip(out, expected, strict=True):
        assert_matches(o, e)
    assert_gradients(out, args, expected, args64)
    torch.library.opcheck(operator.default, (*args, *times, torch.float32, with_x_t))
    grads = [torch.randn_like(o) for o in out]
    torch.library.opcheck(gradient.default, (*grads, *(a.detach() for a in args), *times, with_x_t))


@pytest.mark.parametrize("picked", [None, [3, 0, 3]])
def test_compiles_in_one_graph(picked, backend, draw, device) -> None:
    args, t, index = inputs(draw), uniform(draw, B), indices(picked, device)
    compiled = torch.compile(flow_map_inputs, fullgraph=True, backend="aot_eager")
    outputs = compiled(*args, t, 0.01, index), flow_map_inputs(*args, t, 0.01, index)
    gradients = [torch.autograd.grad(sum(o.square().sum() for o in out), args) for out in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("picked", [None, [2], []])
def test_batch_holds_what_the_network_reads(picked, backend, dtype, draw, device) -> None:
    """One buffer ``[x+ ; x- ; x_t]`` in fp32 at least, its x_t not rounded to the dtype that x_t is
    asked in.
    """
    args = [a.detach() for a in inputs(draw, dtype)]
    t, index = uniform(draw, B), indices(picked, device)
    wide = torch.promote_types(dtype, torch.float32)
    x_t, plus, minus = flow_map_inputs(*args, t, 0.01, index, dtype=wide)
    assert x_t.dtype == wide
    narrow, batch = flow_map_batch(*args, t, 0.01, index)
    assert (
        batch.dtype == wide
        and batch.is_contiguous()
        and torch.equal(batch, torch.cat([plus, minus, x_t]))
    )
    assert narrow.dtype == dtype and torch.equal(narrow, x_t.to(dtype))
    without = flow_map_batch(*args, t, 0.01, index, dtype=torch.float16, with_x_t=False)
    assert torch.equal(without[1], torch.cat([plus, minus])) and torch.equal(without[0], x_t.half())


def test_difference_of_the_sides_survives_half_precision(backend, draw) -> None:
    """Rounded to bf16, x+ - x- would be off by about 20 %; kept in fp32 it is 2 epsilon v."""
    x0, eps = (t.detach() for t in inputs(draw, torch.bfloat16))
    v = (eps.double() - x0.double()).mul(2 * 0.005)
    _, plus, minus = flow_map_inputs(x0, eps, torch.full((B,), 0.7, device=x0.device), 0.005)
    error = ((plus.double() - minus.double()) - v).norm() / v.norm()
    rounded = ((plus.bfloat16().double() - minus.bfloat16().double()) - v).norm() / v.norm()
    assert error < 1e-4 and rounded > 0.1


def test_mask_equals_indices(backend, draw, device) -> None:
    args, t = [t.detach() for t in inputs(draw)], uniform(draw, B)
    mask = torch.tensor([True, False, False, True], device=device)
    by_mask = flow_map_inputs(*args, t, 0.01, mask)
    for dtype in (torch.long, torch.int32, torch.uint8):
        by_index = flow_map_inputs(*args, t, 0.01, torch.tensor([0, 3], dtype=dtype, device=device))
        assert all(torch.equal(a, b) for a, b in zip(by_mask, by_index, strict=True))
    none = flow_map_inputs(*args, t, 0.01, torch.zeros(B, dtype=torch.bool, device=device))
    assert none[1].shape == none[2].shape == (0, *SHAPE[1:])


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("picked", [None, [0, 3]])
@pytest.mark.parametrize("times", [torch.float32, torch.float64])
def test_one_sided_pairs(per_frame, picked, times, backend, draw, device, assert_matches) -> None:
    """At t = 1 nothing lies above, at t = 0 nothing below: each side has its own width; fp64 times
    as the methods'.
    """
    x0, eps = (a.detach() for a in inputs(draw))
    t = torch.tensor([1.0, 0.5, 0.3, 0.0], dtype=times, device=device)
    sides = (1 - t).clamp(max=0.01), t.clamp(max=0.01)
    pair = tuple(s[:, None].expand(B, F) if per_frame else s for s in sides)
    out = flow_map_inputs(x0, eps, t, pair, indices(picked, device))
    expected = formula(x0.double(), eps.double(), frames(t), *(frames(s) for s in sides), picked)
    for o, e in zip(out, expected, strict=True):
        assert_matches(o, e)
    assert torch.equal(out[1][0], eps[0]) and torch.equal(out[2][-1], x0[3])


@pytest.mark.parametrize("shape", [(), (B,), (B, F)])
def test_epsilon_forms_agree(shape, backend, draw, device) -> None:
    args, t = inputs(draw), uniform(draw, B, F)
    number = flow_map_inputs(*args, t, 0.01)
    for epsilon in (
        torch.full(shape, 0.01, device=device),
        (0.01, torch.full(shape, 0.01, device=device)),
    ):
        for a, b in zip(flow_map_inputs(*args, t, epsilon), number, strict=True):
            torch.testing.assert_close(a, b)
    # a 0-d tensor is a number, wherever it is
    on_cpu = flow_map_inputs(*args, t, torch.tensor(0.01))
    assert all(torch.equal(a, b) for a, b in zip(on_cpu, number, strict=True))


def test_ends_are_exact(backend, draw, device) -> None:
    x0, eps = inputs(draw)
    assert torch.equal(flow_map_inputs(x0, eps, torch.zeros(B, device=device), 0.0)[0], x0)
    assert torch.equal(flow_map_inputs(x0, eps, torch.ones(B, device=device), 0.0)[1], eps)


@pytest.mark.parametrize("shape", [(0, F, 2), (B, 0, 2), (B, F, 0, 5)])
@pytest.mark.parametrize("picked", [None, []])
def test_empty(shape, picked, backend, device) -> None:
    x0, eps = (torch.empty(shape, device=device, requires_grad=True) for _ in range(2))
    x_t, plus, minus = flow_map_inputs(
        x0, eps, torch.zeros(shape[0], device=device), 0.01, indices(picked, device)
    )
    assert x_t.shape == shape and plus.shape == minus.shape == (
        shape[0] if picked is None else 0,
        *shape[1:],
    )
    (x_t.sum() + plus.sum()).backward()
    assert x0.grad is not None and x0.grad.shape == shape


def test_non_contiguous(backend, draw, assert_gradients) -> None:
    args, t = inputs(draw), uniform(draw, B, F)
    plain = flow_map_inputs(*args, t, 0.01)
    channels_first = [a.transpose(1, 2).contiguous().transpose(1, 2) for a in args]
    # strides of B and F only
    frames_first = [a.transpose(0, 1).contiguous().transpose(0, 1) for a in args]
    sliced = [torch.cat([a, a], dim=1)[:, :F] for a in args]
    times = t.t().contiguous().t()
    for x0, eps in (channels_first, frames_first, sliced, (channels_first[0], sliced[1])):
        assert not x0.is_contiguous()
        for a, b in zip(flow_map_inputs(x0, eps, times, 0.01), plain, strict=True):
            assert torch.equal(a, b) and (a.is_contiguous() or backend == "eager")
    one = [a[:1].expand(B, -1, -1, -1, -1) for a in args]
    for a, b in zip(flow_map_inputs(*one, t, 0.01), plain, strict=True):
        assert torch.equal(a[0], b[0])
    args64 = doubled(args)
    width = torch.full((B, F), 0.01, dtype=torch.float64)
    expected = formula(*args64, t.double(), width, width, None)
    out = flow_map_inputs(*channels_first, t, 0.01)
    # their gradients arrive strided
    transposed = [o.transpose(2, 3).contiguous().transpose(2, 3) for o in out]
    assert_gradients(transposed, args, expected, args64)


def test_mixed_dtypes(backend, draw, device, assert_matches, assert_gradients) -> None:
    """bf16 latents beside fp32 noise, as the data and the generator give them; x_t in a dtype of
    its own.
    """
    args = [draw(*SHAPE, dtype=torch.bfloat16), draw(*SHAPE)]
    args64 = doubled(args)
    t = uniform(draw, B, F)
    out = flow_map_inputs(*args, t, 0.01, indices([1, 2], device), dtype=torch.float32)
    width = torch.full((B, F), 0.01, dtype=torch.float64)
    expected = formula(*args64, t.double(), width, width, [1, 2])
    assert all(o.dtype == torch.float32 for o in out)
    for o, e in zip(out, expected, strict=True):
        assert_matches(o, e)
    assert_gradients(out, args, expected, args64)


def test_times_and_widths_are_constants(backend, draw) -> None:
    args = inputs(draw)
    t, epsilon = (uniform(draw, B).requires_grad_() for _ in range(2))
    sum(o.sum() for o in flow_map_inputs(*args, t, epsilon)).backward()
    assert t.grad is None and epsilon.grad is None and all(a.grad is not None for a in args)


def test_gradient_of_one_result(backend, draw) -> None:
    args, t = inputs(draw), uniform(draw, B)
    width = torch.tensor(0.25, device=t.device)
    x_t, batch = torch.ops.anyflow.flow_map_inputs(
        *args, t, width, width, None, torch.float32, False
    )
    for result, factor in ((x_t, t), (batch[:B], t + 0.25), (batch[B:], t - 0.25)):
        latents, noise = torch.autograd.grad(result.sum(), args, retain_graph=True)
        torch.testing.assert_close(noise[..., 0, 0, 0], factor[:, None].expand(B, F))
        torch.testing.assert_close(latents[..., 0, 0, 0], 1 - factor[:, None].expand(B, F))


def test_inputs_are_not_written(backend, draw, device) -> None:
    args = [t.detach() for t in inputs(draw)]
    copies = [a.clone() for a in args]
    for o in flow_map_inputs(*args, torch.zeros(B, device=device), 0.0):
        o.zero_()
    assert all(torch.equal(a, c) for a, c in zip(args, copies, strict=True))


def test_index_of_no_sample(backend, draw, device, monkeypatch) -> None:
    """Found on the CPU, where reading is free; else those picked are NaN, the others right, and
    nothing is raised.
    """
    args, t = inputs(draw), uniform(draw, B)
    good, bad = (
        torch.tensor(r, device=device) for r in ([2, 0, 2, 1, 0], [2, B, 2, -B - 1, 10**12])
    )
    for picked in (bad, bad.neg()):
        with (
            pytest.raises(ValueError, match=r"picked must be in \[-4, 4\)")
            if device.type == "cpu"
            else _nothing()
        ):
            flow_map_inputs(*args, t, 0.01, picked)
    if backend == "native" and device.type == "cpu":
        return  # its C++ looks at every index itself
    monkeypatch.setattr(_frames, "on_host", lambda picked: False)  # as on a GPU
    expected, out = flow_map_inputs(*args, t, 0.01, good), flow_map_inputs(*args, t, 0.01, bad)
    assert torch.equal(out[0], expected[0])
    for o, e in zip(out[1:], expected[1:], strict=True):
        assert torch.equal(o[[0, 2]], e[[0, 2]]) and o[[1, 3, 4]].isnan().all()
    cotangents = [torch.randn_like(o) for o in out]
    for c in cotangents[1:]:
        c[[1, 3, 4]] = 0.0
    gradients = [torch.autograd.grad(o, args, cotangents) for o in (expected, out)]
    for c in cotangents[1:]:
        c[[1, 3, 4]] = 7.0  # no sample is behind them
    gradients.append(torch.autograd.grad(flow_map_inputs(*args, t, 0.01, bad), args, cotangents))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[1], gradients[2])
    width = torch.tensor(0.01, device=device)
    x_t, batch = torch.ops.anyflow.flow_map_inputs(
        *args, t, width, width, bad, torch.float32, False
    )
    cotangents = [cotangents[0], torch.cat(cotangents[1:])]
    torch.testing.assert_close(torch.autograd.grad([x_t, batch], args, cotangents), gradients[2])


def _nothing():
    return pytest.MonkeyPatch.context()


def test_fp64_runs_eagerly(kernel, draw) -> None:
    x0, t = draw(*SHAPE, dtype=torch.float64).detach(), uniform(draw, B)
    with use_backend(kernel):
        for args in ((x0, x0), (x0.float(), x0)):
            with pytest.raises(ValueError, match=f"flow_map_inputs: backend '{kernel}' .* float64"):
                flow_map_inputs(*args, t, 0.01)
        with pytest.raises(ValueError, match="x_t in float64"):
            flow_map_inputs(x0.float(), x0.float(), t, 0.01, dtype=torch.float64)


def test_gradcheck(draw, device) -> None:
    args = [draw(2, 3, 2, dtype=torch.float64) for _ in range(2)]
    t, picked = uniform(draw, 2).double(), indices([1, 0, 1], device)
    assert torch.autograd.gradcheck(lambda a, b: flow_map_inputs(a, b, t, 0.01, picked), args)


X, T = torch.zeros(SHAPE), torch.zeros(B)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, X[:, :2], T, 0.1), "noise must have the shape of latents"),
        ((X, X.long(), T, 0.1), "noise must have the shape of latents"),
        ((X, X.to("meta"), T, 0.1), "noise is on meta"),
        ((T, T, T, 0.1), "latents must be"),
        ((X.long(), X, T, 0.1), "latents must be"),
        ((X, X, T[:2], 0.1), "t must be"),
        ((X, X, T.long(), 0.1), "t must be"),
        ((X, X, T[0], 0.1), "t must be"),
        ((X, X, torch.zeros(B, F + 1), 0.1), "t must be"),
        ((X, X, torch.zeros(B, F, 1), 0.1), "t must be"),
        ((X, X, T.to("meta"), 0.1), "t is on meta"),
        ((X, X, T, T[:2]), "epsilon plus must be"),
        ((X, X, T, T.long()), "epsilon plus must be"),
        ((X, X, T, (T, T[:2])), "epsilon minus must be"),
        ((X, X, T, T.to("meta")), "epsilon plus is on meta"),
        ((X, X, T, (0.1, T[0].to("meta"))), "epsilon minus is on meta"),
        ((X, X, T, 0.1, torch.tensor([0], device="meta")), "picked is on meta"),
        ((X, X, T, 0.1, torch.tensor([True])), "picked mask must be"),
        ((X, X, T, 0.1, torch.tensor([0.0])), "picked must be"),
        ((X, X, T, 0.1, torch.tensor([[0]])), "picked must be"),
        ((X, X, T, 0.1, torch.tensor([0, B])), "picked must be in"),
        ((X, X, T, 0.1, torch.tensor([-B - 1])), "picked must be in"),
        ((X[:0], X[:0], T[:0], 0.1, torch.tensor([0])), "pick among 0 samples"),
    ],
)
def test_bad_input(args, message) -> None:
    with pytest.raises(ValueError, match=f"flow_map_inputs: .*{message}"):
        flow_map_inputs(*args)


def test_bad_dtype() -> None:
    with pytest.raises(ValueError, match="flow_map_inputs: dtype must be floating-point"):
        flow_map_inputs(X, X, T, 0.1, dtype=torch.long)
