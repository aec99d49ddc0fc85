"""rms_norm_rope: precision and meaning of the rotation, extremes, 64-bit offsets."""

import mmap

import pytest
import torch
from checks import DEVICE, assert_matches
from formulas import expected

from anyflow.ops import rms_norm_rope, use_backend
from anyflow.ops.examples import moved
from anyflow.ops.examples import rms_norm_rope as example

# relative to the length of a rotated pair
PAIRS = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 2**-10, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("sizes", [(6, 24, 3), (35, 56, 4), (7, 72, 12), (17, 24, 1)])
def test_error_of_a_pair(sizes, rotary, backend, dtype, approximation) -> None:
    """A rotation mixes two numbers: the error scales with the length of the pair."""
    tokens, dim, heads = sizes
    arguments = example(tokens, dim, heads=heads, rotary=rotary).arguments(DEVICE, dtype)
    out = rms_norm_rope(**arguments)
    (exact,) = expected("rms_norm_rope", moved(arguments, DEVICE, torch.float64))
    error = (out.double() - exact).unflatten(-1, (-1, 2)).norm(dim=-1)
    limit = PAIRS[dtype]
    if dtype != torch.float64:  # the root of a mean, which halves what its division is off by
        limit += approximation("rsqrt") + approximation("division") / 2
    assert (error <= limit * exact.unflatten(-1, (-1, 2)).norm(dim=-1)).all()


def test_tables_are_constants(backend) -> None:
    """No gradient on any backend, through the function or the operator."""
    named = example(6, 16, heads=2, batch=2).arguments(DEVICE, torch.float32)
    for name in ("cos", "sin"):
        named[name].requires_grad_()
    out = rms_norm_rope(**named)
    registered = torch.ops.anyflow.rms_norm_rope(*named.values())
    (out.square().sum() + registered.square().sum()).backward()
    assert named["cos"].grad is None and named["sin"].grad is None
    assert named["x"].grad is not None and named["weight"].grad is not None
    plain = {n: named[n].detach() for n in ("x", "weight")}
    assert not rms_norm_rope(**named | plain).requires_grad


def test_statistics_are_of_the_full_width(backend, draw) -> None:
    """Scaling one head changes the other: the norm is taken before the split."""
    x, weight = draw(1, 3, 8).detach(), draw(8).detach()
    louder = x.clone()
    louder[..., :4] *= 10
    other = [rms_norm_rope(v, weight, num_heads=2)[:, :, 1] for v in (x, louder)]
    assert (other[1].abs() < 0.9 * other[0].abs()).all()


def test_rotation_keeps_lengths_and_relative_positions(backend, generator, device) -> None:
    """q(l) . k(m) depends on l - m only, which is the point of a rotary embedding."""
    frequency = torch.rand(4, generator=generator)
    angle = torch.outer(torch.arange(9.0), frequency)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    q, k = torch.randn(2, 1, 1, 8, generator=generator).expand(2, 1, 9, 8).to(device).unbind(0)
    one = torch.ones(8, device=device)
    rq, rk = (rms_norm_rope(v, one, cos, sin, num_heads=1)[0, :, 0] for v in (q, k))
    scores = rq @ rk.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=0, atol=1e-5)
    lengths = torch.full((9,), 8**0.5, device=device)
    torch.testing.assert_close(rq.norm(dim=-1), lengths, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_extreme_magnitudes(scale, backend, draw) -> None:
    x, weight = draw(2, 3, 16).detach(), draw(16).detach()
    out = rms_norm_rope(x * scale, weight, num_heads=2, eps=1e-26)
    wide = {"x": x.double(), "weight": weight.double(), "cos": None, "sin": None}
    (exact,) = expected("rms_norm_rope", wide | {"num_heads": 2, "eps": 0.0})
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


def test_large_offset(backend) -> None:
    named = example(3, 16, heads=2, batch=2).arguments(DEVICE, torch.float32)
    named["x"] = named["x"].detach() + 1e4
    (exact,) = expected("rms_norm_rope", moved(named, DEVICE, torch.float64))
    assert_matches(rms_norm_rope(**named), exact)


def test_zero_input_has_finite_gradient(backend, device) -> None:
    x = torch.zeros(1, 2, 8, requires_grad=True, device=device)
    out = rms_norm_rope(x, torch.ones(8, device=device), num_heads=2)
    out.sum().backward()
    assert not out.any() and x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e3))


def test_no_index_overflows_32_bits(kernel, device) -> None:
    """Tokens 2^31 elements apart in a view of memory of which a few pages are touched."""
    if device.type != "cpu":
        pytest.skip("a GPU has no untouched memory")
    stride, flags = 2**27, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = torch.frombuffer(
        mmap.mmap(-1, 2 * (16 * stride + 8), flags=flags), dtype=torch.bfloat16
    )
    x = memory.as_strided((1, 17, 8), (8, stride, 1))
    x.copy_(torch.arange(17.0)[:, None] - torch.arange(8.0))
    weight = torch.ones(8)
    backward = torch.ops.anyflow.rms_norm_rope_backward
    with use_backend(kernel):
        results = [
            (
                rms_norm_rope(v, weight, num_heads=2),
                *backward(v.unflatten(2, (2, 4)), v, weight, None, None, 2, 1e-6),
            )
            for v in (x, x.contiguous())
        ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
