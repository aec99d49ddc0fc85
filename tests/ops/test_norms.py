"""Operators on tokens: cancellation, rounding, what is kept or shared, 64-bit offsets."""

import mmap

import pytest
import torch
from checks import DEVICE, assert_matches, check
from forms import label, over
from formulas import expected
from torch import Tensor

from anyflow.ops import examples as catalog
from anyflow.ops import (
    gated_residual,
    layer_norm_modulate,
    residual_layer_norm,
    rms_norm_rope,
    use_backend,
)
from anyflow.ops.examples import RESIDUAL_VARIANTS, moved, public_call

RESIDUALS = [catalog.residual_layer_norm(v, 6, 64, 2, batch=2) for v in RESIDUAL_VARIANTS]
NORMS = [catalog.layer_norm_modulate(6, 64, 2, batch=2), *RESIDUALS]
RMS = catalog.rms_norm_rope(6, 64, heads=2, batch=2)
FP32, BF16 = torch.float32, torch.bfloat16


@over([*NORMS, RMS], [FP32])
def test_large_offset_does_not_cancel(example, backend, dtype) -> None:
    """A mean of squares less the square of the mean would be off by 100 % at 1e4.

    fp32 has a sum to within 1e-3 there, and a norm of the variance of one, which no weight
    enlarges, to within 2e-3. An RMS loses nothing.
    """
    named = example.arguments(DEVICE, dtype)
    named["x"] = named["x"].detach() + 1e4
    for name, neutral in (("scale", 0.0), ("weight", 1.0)):
        if example is not RMS and named.get(name) is not None:
            named[name] = torch.full_like(named[name], neutral)
    out = public_call(example.op, named).outputs()
    exact = expected(example.op, moved(named, DEVICE, torch.float64), out)
    if example is RMS:
        assert_matches(out[0], exact[0])
        return
    for actual, wanted, limit in zip(reversed(out), reversed(exact), (2e-3, 1e-3), strict=False):
        assert (actual.double() - wanted).abs().max() < limit


@over(NORMS, [FP32])
def test_constant_tokens_give_the_offset(example, backend, dtype) -> None:
    """A norm of no variance is what is added to it."""
    named = example.arguments(DEVICE, dtype)
    named["x"] = torch.full_like(named["x"], 3.0)
    if "y" in named:
        named |= {"y": torch.zeros_like(named["y"]), "gate": None}
    out = public_call(example.op, named).outputs()
    offset = named.get("bias")
    if named["shift"] is not None:
        offset = named["shift"].repeat_interleave(3, dim=1)
    torch.testing.assert_close(
        out[-1], torch.zeros_like(out[-1]) if offset is None else offset.expand_as(out[-1])
    )
    assert len(out) == 1 or (out[0] == 3).all()


@over(RESIDUALS, [FP32], kernels=True)
def test_kernel_saves_no_more_than_it_needs(example, backend, dtype) -> None:
    """h in place of x, and y only where there is a gate."""
    named = example.arguments(DEVICE, dtype)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()) or t, lambda t: t
    ):
        h, n = residual_layer_norm(**named)
    assert h.data_ptr() in saved
    assert not {n.data_ptr(), named["x"].data_ptr()} & set(saved)
    assert (named["y"].data_ptr() in saved) == (named["gate"] is not None)


@over(RESIDUALS[-1:])
def test_norm_reads_the_rounded_sum(example, backend, dtype) -> None:
    """n is the norm of the h that is returned; h is the gated residual to the bit."""
    named = example.arguments(DEVICE, dtype)
    h, n = residual_layer_norm(**named)
    assert torch.equal(n, layer_norm_modulate(h, named["shift"], named["scale"]))
    assert torch.equal(h, gated_residual(named["x"], named["y"], named["gate"]))
    plain = residual_layer_norm(named["x"], named["y"])[0]
    assert torch.equal(plain, gated_residual(named["x"], named["y"]))


@over([catalog.gated_residual(1, 8)], [torch.float16, BF16])
def test_wider_branch_is_rounded_once(example, backend, dtype) -> None:
    """Beside x in 16 bits, half a step and a bit more in fp32 rounds up.

    Rounding y first would make it a tie, which goes to even.
    """
    half_step = torch.finfo(dtype).eps / 2
    x = torch.ones(1, 1, 8, dtype=dtype, device=DEVICE)
    y = torch.full((1, 1, 8), half_step + 2**-20, device=DEVICE)
    for gate in (None, torch.ones(1, 1, 8, device=DEVICE)):
        assert (gated_residual(x, y, gate) == 1 + 2 * half_step).all()


@over([catalog.gated_residual(4, 8, 2)], [FP32])
def test_gradient_of_the_stream_is_the_gradient(example, backend, dtype) -> None:
    """x is handed the gradient itself: no pass over memory."""
    named = example.arguments(DEVICE, dtype)
    seen: list[Tensor] = []
    middle = named["x"] * 1
    middle.register_hook(seen.append)
    out, grad = gated_residual(middle, named["y"], named["gate"]), torch.ones_like(middle)
    torch.autograd.grad(out, list(named.values()), grad)
    assert seen[0].data_ptr() == grad.data_ptr()


@over([RMS], [FP32])
def test_extreme_magnitudes(example, backend, dtype) -> None:
    named = moved(example.arguments(DEVICE, dtype), DEVICE) | {"cos": None, "sin": None}
    for scale in (1e-8, 1e4):
        scaled = named | {"x": named["x"].detach() * scale, "eps": 1e-26}
        exact = moved(scaled, DEVICE, torch.float64) | {"eps": 0.0}
        (wanted,) = expected(example.op, exact)
        out = rms_norm_rope(**scaled)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)


@over([RMS], [FP32])
def test_zero_input_has_finite_gradient(example, backend, dtype) -> None:
    x = torch.zeros(1, 2, 8, requires_grad=True, device=DEVICE)
    out = rms_norm_rope(x, torch.ones(8, device=DEVICE), num_heads=2)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert not out.any()
    torch.testing.assert_close(gradient, torch.full_like(x, 1e3))


# Rows of 33, 99 or all 198 tokens: threads begin and end within one, and have a part of one alone.
SHARED = [
    catalog.layer_norm_modulate(99, 512, 3, batch=2),
    catalog.gated_residual(99, 512, 3, batch=2),
    *(catalog.residual_layer_norm(v, 99, 512, 1, batch=2) for v in RESIDUAL_VARIANTS),
    catalog.rms_norm_rope(99, 512, heads=4, batch=2),
]


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("example", SHARED, ids=label)
def test_sums_of_rows_that_threads_share(example, threads, native) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend("native"):
            check(example.op, example.arguments(DEVICE, FP32))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU has no untouched memory")
@over([RMS], [FP32], kernels=True)
def test_no_index_overflows_32_bits(example, backend, dtype) -> None:
    """Tokens 2^31 elements apart in a view of memory of which a few pages are touched."""
    stride, flags = 2**27, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (16 * stride + 8), flags=flags), dtype=BF16)
    x = memory.as_strided((1, 17, 8), (8, stride, 1))
    x.copy_(torch.arange(17.0)[:, None] - torch.arange(8.0))
    weight = torch.ones(8)
    backward = torch.ops.anyflow.rms_norm_rope_backward
    results = [
        (
            rms_norm_rope(v, weight, num_heads=2),
            *backward(v.unflatten(2, (2, 4)), v, weight, None, None, 2, 1e-6),
        )
        for v in (x, x.contiguous())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
