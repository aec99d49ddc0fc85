"""flow_map_inputs and flow_map_loss: the batch that a network reads, forms, rounding, indices."""

from typing import Any

import pytest
import torch
from checks import DEVICE, check
from forms import over
from formulas import expected
from torch import Tensor

from anyflow.ops import examples as catalog
from anyflow.ops import flow_map_inputs, flow_map_loss
from anyflow.ops.examples import Arguments, FrameTimes, moved
from anyflow.ops.flow_map_inputs import (
    flow_map_batch,
    flow_map_inputs_backward_reference,
    flow_map_inputs_reference,
)
from anyflow.ops.flow_map_loss import flow_map_loss_reference

B, F = 4, 3
SHAPE = (B, F, 2, 3, 5)
FP32 = [torch.float32]
INPUTS = catalog.flow_map_inputs(SHAPE, None, FrameTimes(), with_x_t=True)
LOSS = catalog.flow_map_loss(SHAPE, None, FrameTimes())
GOOD, BAD = (2, 0, 2, 1, 0), (2, B, 2, -B - 1, 10**12)


class Elsewhere(Tensor):
    """Stand for indices on a device whose values the host does not read."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Return the name of a device that is none of this machine's."""
        return torch.device("cuda")


def points(picked=None, dtype: torch.dtype = torch.float32) -> Arguments:
    made = catalog.flow_map_inputs(SHAPE, picked, FrameTimes(), with_x_t=True)
    named = made.arguments(DEVICE, dtype)
    return named | {name: named[name].detach() for name in ("latents", "noise")}


def predictions(picked=None, dtype: torch.dtype = torch.float32, guidance: float = 3.0):
    return catalog.flow_map_loss(SHAPE, picked, FrameTimes(), guidance).arguments(DEVICE, dtype)


def loss(named: Arguments, **changes: Any) -> Tensor:
    """Call the public function."""
    return flow_map_loss(**{n: v for n, v in (named | changes).items() if n != "need_grad"})


def indices(*picked: int) -> Tensor:
    return torch.tensor(picked, dtype=torch.long, device=DEVICE)


@over([INPUTS])
def test_batch_holds_what_the_network_reads(example, backend, dtype) -> None:
    """One buffer ``[x+ ; x- ; x_t]`` in fp32 at least, its x_t not rounded to the dtype of x_t."""
    a = points((2,), dtype)
    data, epsilon, index = (a["latents"], a["noise"], a["t"]), a["epsilon_plus"], a["picked"]
    wide = torch.promote_types(dtype, torch.float32)
    x_t, plus, minus = flow_map_inputs(*data, epsilon, index, dtype=wide)
    assert x_t.dtype == wide
    narrow, batch = flow_map_batch(*data, epsilon, index)
    assert batch.dtype == wide and batch.is_contiguous()
    assert torch.equal(batch, torch.cat([plus, minus, x_t]))
    assert narrow.dtype == dtype and torch.equal(narrow, x_t.to(dtype))
    without = flow_map_batch(*data, epsilon, index, dtype=torch.float16, with_x_t=False)
    assert torch.equal(without[1], torch.cat([plus, minus])) and torch.equal(without[0], x_t.half())


@over([INPUTS], FP32)
def test_nan_of_any_bits_is_nan_in_16_bits(example, backend, dtype) -> None:
    """Rounding carries into the sign where every bit of a NaN is set."""
    if backend == "triton" and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter rounds such a NaN to -0, which a GPU does not")
    a = points()
    bits = torch.tensor([2**31 - 1, -1, 0x7FC00000], dtype=torch.int32, device=DEVICE)
    nan = bits.view(torch.float32)[:, None, None, None].expand(3, *SHAPE[2:])
    latents = a["latents"].detach().clone()
    latents[0] = nan[:F]
    for kind in (torch.bfloat16, torch.float16):
        x_t, *_ = flow_map_inputs(latents, a["noise"], a["t"], 0.01, dtype=kind)
        assert x_t[0].isnan().all() and x_t[1:].isfinite().all()


@over([INPUTS], FP32)
def test_forms_of_indices_and_widths(example, backend, dtype) -> None:
    a = points()
    data = (a["latents"], a["noise"], a["t"])
    by_mask = flow_map_inputs(*data, 0.01, torch.tensor([True, False, False, True], device=DEVICE))
    for kind in (torch.long, torch.int32, torch.uint8):
        by_index = flow_map_inputs(*data, 0.01, indices(0, 3).to(kind))
        assert all(torch.equal(m, i) for m, i in zip(by_mask, by_index, strict=True))
    none = flow_map_inputs(*data, 0.01, torch.zeros(B, dtype=torch.bool, device=DEVICE))
    assert none[1].shape == none[2].shape == (0, *SHAPE[1:])
    number = flow_map_inputs(*data, 0.01)
    # a 0-d tensor is a number, wherever it is
    fulls = [torch.full(shape, 0.01, device=DEVICE) for shape in ((), (B,), (B, F))]
    for epsilon in (torch.tensor(0.01), *fulls, *((0.01, full) for full in fulls)):
        for form, plain in zip(flow_map_inputs(*data, epsilon), number, strict=True):
            torch.testing.assert_close(form, plain)


@over([INPUTS], FP32)
def test_ends_are_exact_and_no_views(example, backend, dtype) -> None:
    a = points()
    x0, noise = a["latents"], a["noise"]
    copies = x0.clone(), noise.clone()
    zero, one = torch.zeros(B, device=DEVICE), torch.ones(B, device=DEVICE)
    at_zero, at_one = (flow_map_inputs(x0, noise, t, 0.0) for t in (zero, one))
    assert torch.equal(at_zero[0], x0) and torch.equal(at_one[1], noise)
    for result in (*at_zero, *at_one):
        result.zero_()
    assert torch.equal(x0, copies[0]) and torch.equal(noise, copies[1])


@over([LOSS], FP32)
def test_forms_of_the_width(example, backend, dtype) -> None:
    width = torch.full((2,), 0.01, device=DEVICE)
    named = predictions((3, 1)) | {"width": width}
    for form in (0.01, torch.tensor(0.01), width.double(), width[:, None].expand(2, F)):
        torch.testing.assert_close(loss(named, width=form), loss(named), rtol=1e-5, atol=0)


@over([LOSS], FP32)
def test_times_are_subtracted_before_they_are_rounded(example, backend, dtype) -> None:
    """t and r are fp64 numbers that are equal in fp32, beside bf16 data and fp32 velocities."""
    named = predictions((1,), torch.bfloat16)
    named["t"] = named["t"].double()
    named |= {"r": named["t"] - 1e-9, "width": named["width"].double() * 1e-9}
    check("flow_map_loss", named)


@over([LOSS], FP32)
def test_scaled_gradient_in_fp16_does_not_underflow(example, backend, dtype) -> None:
    """Loss scaling works: the mean over a video, a factor of 1e-5, is applied with the scale."""
    video = catalog.flow_map_loss((1, 2, 30, 50, 33), None, guidance=1.0)
    named = video.arguments(DEVICE, torch.float16)
    exact = moved(named, DEVICE, torch.float64)
    (actual,) = torch.autograd.grad(loss(named).sum() * 2**14, named["pred"])
    (loss64,) = expected("flow_map_loss", exact)
    (gradient,) = torch.autograd.grad(loss64.sum() * 2**14, exact["pred"])
    assert ((actual.double() - gradient).abs() <= 2**-9 * gradient.abs() + 2**-24).all()


@over([LOSS], FP32)
def test_operator_without_need_grad_has_no_gradient(example, backend, dtype) -> None:
    named = predictions() | {"need_grad": False}
    out, residual = torch.ops.anyflow.flow_map_loss(*named.values())
    assert residual.shape == (0,)
    detached = named | {"pred": named["pred"].detach()}
    torch.library.opcheck(torch.ops.anyflow.flow_map_loss.default, tuple(detached.values()))
    with pytest.raises(RuntimeError, match="ran without need_grad"):
        out.sum().backward()
    with torch.no_grad():
        assert not loss(named).requires_grad


@over([LOSS], FP32)
def test_without_neighbors(example, backend, dtype) -> None:
    """Indices and widths are ignored; where r = t, so are the neighbors, whose slope has factor 0.

    The methods leave them out there.
    """
    named = predictions()
    alone = loss(named, u_plus=None, u_minus=None)
    wrong = {"picked": indices(9), "width": torch.zeros(9, device=DEVICE)}
    assert torch.equal(loss(named, u_plus=None, u_minus=None, **wrong), alone)
    assert torch.equal(loss(named, r=named["t"].clone()), alone)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="checking the values would wait for the device")
@over([INPUTS, LOSS], FP32)
def test_index_of_no_sample_is_found_on_the_cpu(example, backend, dtype) -> None:
    a = points()
    for bad in (indices(*BAD), -indices(*BAD)):
        with pytest.raises(ValueError, match=r"picked must be in \[-4, 4\)"):
            if example is INPUTS:
                flow_map_inputs(a["latents"], a["noise"], a["t"], 0.01, bad)
            else:
                loss(predictions(GOOD), picked=bad)


def unread(picked: tuple[int, ...], backend: str) -> Tensor:
    """Return indices that the host does not look at; skip where the C++ looks at every one."""
    if DEVICE.type == "cpu" and backend == "native":
        pytest.skip("the C++ looks at every index itself")
    hidden = DEVICE.type == "cpu" and backend == "eager"
    return indices(*picked).as_subclass(Elsewhere) if hidden else indices(*picked)


@over([INPUTS], FP32)
def test_inputs_of_an_index_of_no_sample_elsewhere(example, backend, dtype) -> None:
    """Expect NaN for those samples, and right others, where the host reads no values."""
    bad_index = unread(BAD, backend)
    a = points(GOOD) | {"with_x_t": False}
    bad = a | {"picked": bad_index}
    forward, backward = flow_map_inputs_reference, flow_map_inputs_backward_reference
    if not isinstance(bad_index, Elsewhere):
        forward = torch.ops.anyflow.flow_map_inputs
        backward = torch.ops.anyflow.flow_map_inputs_backward
    sides, out = (forward(*named.values())[1].as_subclass(Tensor) for named in (a, bad))
    assert torch.equal(out[[0, 2, 5, 7]], sides[[0, 2, 5, 7]])
    assert out[[1, 3, 4, 6, 8, 9]].isnan().all()
    gradients = []
    for named, ignored in ((a, 0.0), (bad, 0.0), (bad, 7.0)):  # no sample is behind them
        grads = [torch.ones(s, device=DEVICE).cumsum(0) for s in (SHAPE, sides.shape)]
        grads[1][[1, 3, 4, 6, 8, 9]] = ignored
        found = backward(*grads, *(v for n, v in named.items() if n != "dtype"))
        gradients.append([g.as_subclass(Tensor) for g in found])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[1], gradients[2])


@over([LOSS], FP32)
@pytest.mark.parametrize(("bad", "sample"), [(B, B - 1), (-(10**12), 0)])
def test_loss_of_an_index_of_no_sample_elsewhere(bad, sample, example, backend, dtype) -> None:
    """Expect NaN for the loss of the nearest sample where the host reads no values."""
    named, index = predictions((1, 2, 0)), unread((1, 2, bad), backend)
    hidden = isinstance(index, Elsewhere)
    run = flow_map_loss_reference if hidden else torch.ops.anyflow.flow_map_loss
    right, (out, residual) = run(*named.values())[0], run(*(named | {"picked": index}).values())
    assert out.isnan().tolist() == [i == sample for i in range(B)]
    assert torch.equal(out[1:3], right[1:3])
    assert residual[sample].isnan().all() and residual[1:3].isfinite().all()
