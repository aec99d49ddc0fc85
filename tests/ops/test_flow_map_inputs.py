"""flow_map_inputs: the batch that a network reads, forms of times and of indices."""

import pytest
import torch
from checks import DEVICE, Elsewhere, assert_matches
from formulas import expected

from anyflow.ops import flow_map_inputs
from anyflow.ops.examples import Arguments, FrameTimes, moved
from anyflow.ops.examples import flow_map_inputs as example
from anyflow.ops.flow_map_inputs import (
    flow_map_batch,
    flow_map_inputs_backward_reference,
    flow_map_inputs_reference,
)

B, F = 4, 3
SHAPE = (B, F, 2, 3, 5)


def arguments(picked=None, dtype: torch.dtype = torch.float32) -> Arguments:
    made = example(SHAPE, picked, FrameTimes(), with_x_t=True).arguments(DEVICE, dtype)
    return made | {name: made[name].detach() for name in ("latents", "noise")}


def indices(*picked: int) -> torch.Tensor:
    return torch.tensor(picked, dtype=torch.long, device=DEVICE)


@pytest.mark.parametrize("picked", [None, (2,), ()])
def test_batch_holds_what_the_network_reads(picked, backend, dtype) -> None:
    """One buffer ``[x+ ; x- ; x_t]`` in fp32 at least, its x_t not rounded to the dtype of x_t."""
    a = arguments(picked, dtype)
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


def test_difference_of_the_sides_survives_half_precision(backend) -> None:
    """Rounded to bf16, x+ - x- would be off by about 20 %; kept in fp32 it is 2 epsilon v."""
    a = arguments(dtype=torch.bfloat16)
    v = (a["noise"].double() - a["latents"].double()).mul(2 * 0.005)
    t = torch.full((B,), 0.7, device=DEVICE)
    _, plus, minus = flow_map_inputs(a["latents"], a["noise"], t, 0.005)
    error = ((plus.double() - minus.double()) - v).norm() / v.norm()
    rounded = ((plus.bfloat16().double() - minus.bfloat16().double()) - v).norm() / v.norm()
    assert error < 1e-4 and rounded > 0.1


def test_forms_of_indices(backend) -> None:
    a = arguments()
    data = (a["latents"], a["noise"], a["t"], 0.01)
    by_mask = flow_map_inputs(*data, torch.tensor([True, False, False, True], device=DEVICE))
    for dtype in (torch.long, torch.int32, torch.uint8):
        by_index = flow_map_inputs(*data, indices(0, 3).to(dtype))
        assert all(torch.equal(m, i) for m, i in zip(by_mask, by_index, strict=True))
    none = flow_map_inputs(*data, torch.zeros(B, dtype=torch.bool, device=DEVICE))
    assert none[1].shape == none[2].shape == (0, *SHAPE[1:])


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("picked", [None, (0, 3)])
@pytest.mark.parametrize("times", [torch.float32, torch.float64])
def test_one_sided_pairs(per_frame, picked, times, backend) -> None:
    """Each side has its own width: at t = 1 nothing lies above, at t = 0 nothing below."""
    a = arguments(picked)
    t = torch.tensor([1.0, 0.5, 0.3, 0.0], dtype=times, device=DEVICE)
    sides = (1 - t).clamp(max=0.01), t.clamp(max=0.01)
    pair = tuple(s[:, None].expand(B, F) if per_frame else s for s in sides)
    x_t, plus, minus = flow_map_inputs(a["latents"], a["noise"], t, pair, a["picked"])
    a |= {"t": t, "epsilon_plus": pair[0], "epsilon_minus": pair[1]}
    exact = expected("flow_map_inputs", moved(a, DEVICE, torch.float64))
    assert_matches(x_t, exact[0])
    assert_matches(torch.cat([plus, minus, x_t]), exact[1])
    assert torch.equal(plus[0], a["noise"][0]) and torch.equal(minus[-1], a["latents"][3])


@pytest.mark.parametrize("shape", [(), (B,), (B, F)])
def test_epsilon_forms_agree(shape, backend) -> None:
    a = arguments()
    data, full = (a["latents"], a["noise"], a["t"]), torch.full(shape, 0.01, device=DEVICE)
    number = flow_map_inputs(*data, 0.01)
    for epsilon in (full, (0.01, full)):
        for form, plain in zip(flow_map_inputs(*data, epsilon), number, strict=True):
            torch.testing.assert_close(form, plain)
    # a 0-d tensor is a number, wherever it is
    on_cpu = flow_map_inputs(*data, torch.tensor(0.01))
    assert all(torch.equal(form, plain) for form, plain in zip(on_cpu, number, strict=True))


def test_ends_are_exact_and_no_views(backend) -> None:
    a = arguments()
    x0, noise = a["latents"], a["noise"]
    copies = x0.clone(), noise.clone()
    zero, one = torch.zeros(B, device=DEVICE), torch.ones(B, device=DEVICE)
    at_zero, at_one = (flow_map_inputs(x0, noise, t, 0.0) for t in (zero, one))
    assert torch.equal(at_zero[0], x0) and torch.equal(at_one[1], noise)
    for result in (*at_zero, *at_one):
        result.zero_()
    assert torch.equal(x0, copies[0]) and torch.equal(noise, copies[1])


def test_times_and_widths_are_constants(backend) -> None:
    a = arguments()
    data = [a[name].requires_grad_() for name in ("latents", "noise")]
    constants = [a[name].requires_grad_() for name in ("t", "epsilon_plus")]
    sum(o.sum() for o in flow_map_inputs(*data, *constants)).backward()
    assert all(c.grad is None for c in constants) and all(x.grad is not None for x in data)


GOOD, BAD = (2, 0, 2, 1, 0), (2, B, 2, -B - 1, 10**12)


@pytest.mark.parametrize("bad", [BAD, tuple(-i for i in BAD)])
def test_index_of_no_sample_is_found_on_the_cpu(bad, backend) -> None:
    if DEVICE.type != "cpu":
        pytest.skip("checking the values would wait for the device")
    a = arguments()
    with pytest.raises(ValueError, match=r"picked must be in \[-4, 4\)"):
        flow_map_inputs(a["latents"], a["noise"], a["t"], 0.01, indices(*bad))


def test_index_of_no_sample_elsewhere(backend) -> None:
    """Expect NaN for those samples, and right others, where the host reads no values."""
    if DEVICE.type == "cpu" and backend == "native":
        pytest.skip("the C++ looks at every index itself")
    a = arguments(GOOD) | {"with_x_t": False}
    bad = a | {"picked": indices(*BAD)}
    forward, backward = (
        getattr(torch.ops.anyflow, f"flow_map_inputs{suffix}") for suffix in ("", "_backward")
    )
    if DEVICE.type == "cpu" and backend == "eager":
        bad["picked"] = bad["picked"].as_subclass(Elsewhere)
        forward, backward = flow_map_inputs_reference, flow_map_inputs_backward_reference
    sides, out = (forward(*named.values())[1].as_subclass(torch.Tensor) for named in (a, bad))
    assert torch.equal(out[[0, 2, 5, 7]], sides[[0, 2, 5, 7]])
    assert out[[1, 3, 4, 6, 8, 9]].isnan().all()
    gradients = []
    for named, ignored in ((a, 0.0), (bad, 0.0), (bad, 7.0)):  # no sample is behind them
        grads = [torch.ones(s, device=DEVICE).cumsum(0) for s in (SHAPE, sides.shape)]
        grads[1][[1, 3, 4, 6, 8, 9]] = ignored
        operands = {n: v for n, v in named.items() if n != "dtype"}
        found = backward(*grads, *operands.values())
        gradients.append([g.as_subclass(torch.Tensor) for g in found])
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[1], gradients[2])
