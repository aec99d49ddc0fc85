"""flow_map_loss: precision of times and gradients, the loss without neighbors, exact solutions."""

from typing import Any

import pytest
import torch
from checks import DEVICE, Elsewhere, check
from formulas import expected
from torch import Tensor

from anyflow.ops import flow_map_inputs, flow_map_loss, use_backend
from anyflow.ops.examples import Arguments, FrameTimes, moved
from anyflow.ops.examples import flow_map_loss as example
from anyflow.ops.flow_map_loss import flow_map_loss_reference

B, F, C, H, W = 4, 3, 2, 3, 5
SHAPE = (B, F, C, H, W)
CONSTANTS = ("u_plus", "u_minus", "latents", "noise", "t", "r", "weight", "width")


def arguments(
    picked=None, dtype: torch.dtype = torch.float32, guidance: float = 3.0, shape=SHAPE
) -> Arguments:
    return example(shape, picked, FrameTimes(), guidance).arguments(DEVICE, dtype)


def loss(named: Arguments, **changes: Any) -> Tensor:
    """Call the public function."""
    return flow_map_loss(**{n: v for n, v in (named | changes).items() if n != "need_grad"})


@pytest.mark.parametrize("width", ["number", "scalar", "sample", "frame"])
def test_forms_of_the_width(width, backend) -> None:
    named = arguments((3, 1)) | {"width": torch.full((2,), 0.01, device=DEVICE)}
    forms = {
        "number": 0.01,
        "scalar": torch.tensor(0.01),
        "sample": named["width"].double(),
        "frame": torch.full((2, F), 0.01, device=DEVICE),
    }
    torch.testing.assert_close(loss(named, width=forms[width]), loss(named), rtol=1e-5, atol=0)


def test_times_are_subtracted_before_they_are_rounded(backend) -> None:
    """t and r are fp64 numbers that are equal in fp32, beside bf16 data and fp32 velocities."""
    named = arguments((1,), torch.bfloat16)
    named["t"] = named["t"].double()
    named |= {"r": named["t"] - 1e-9, "width": named["width"].double() * 1e-9}
    check("flow_map_loss", named)


def test_scaled_gradient_in_fp16_does_not_underflow(backend) -> None:
    """Loss scaling works: the mean over a video, a factor of 1e-5, is applied with the scale."""
    named = arguments(None, torch.float16, 1.0, (1, 2, 30, 50, 33))
    exact = moved(named, DEVICE, torch.float64)
    (actual,) = torch.autograd.grad(loss(named).sum() * 2**14, named["pred"])
    (loss64,) = expected("flow_map_loss", exact)
    (gradient,) = torch.autograd.grad(loss64.sum() * 2**14, exact["pred"])
    assert ((actual.double() - gradient).abs() <= 2**-9 * gradient.abs() + 2**-24).all()


def test_operator_without_need_grad_has_no_gradient(backend) -> None:
    named = arguments() | {"need_grad": False}
    out, residual = torch.ops.anyflow.flow_map_loss(*named.values())
    assert residual.shape == (0,)
    detached = named | {"pred": named["pred"].detach()}
    torch.library.opcheck(torch.ops.anyflow.flow_map_loss.default, tuple(detached.values()))
    with pytest.raises(RuntimeError, match="ran without need_grad"):
        out.sum().backward()


def test_gradient_flows_to_pred_only(backend) -> None:
    named = arguments((2, 0))
    for name in CONSTANTS:
        named[name].requires_grad_()
    assert not loss(named, pred=named["pred"].detach()).requires_grad
    loss(named).sum().backward()
    assert named["pred"].grad is not None and named["pred"].grad.any()
    assert all(named[name].grad is None for name in CONSTANTS)
    with torch.no_grad():
        assert not loss(named).requires_grad


def test_without_neighbors_it_is_flow_matching(backend) -> None:
    named = arguments(guidance=1.0) | {"u_plus": None, "u_minus": None}
    v = named["noise"] - named["latents"]
    squares = (named["pred"] - v).square().flatten(1).mean(1)
    torch.testing.assert_close(loss(named), named["weight"] * squares)
    ignored = {"picked": torch.tensor([9], device=DEVICE), "width": torch.zeros(9, device=DEVICE)}
    torch.testing.assert_close(loss(named, **ignored), named["weight"] * squares)


def test_t_equals_r_needs_no_neighbors(backend) -> None:
    """The methods skip the samples with r = t: their slope has the factor 0."""
    named = arguments()
    named["r"] = named["t"].clone()
    assert torch.equal(loss(named), loss(named, u_plus=None, u_minus=None))


def test_exact_flow_map_of_a_linear_field_has_zero_loss(backend, draw, device) -> None:
    """The residual of u(x, t, r) = (x - x0) / t, which one data point has, is 0 at any t, r."""
    wide, zero = (torch.float64, 1e-24) if backend == "eager" else (torch.float32, 1e-8)
    x0, noise = (draw(B, F, C, H, W, dtype=torch.float64).detach() for _ in range(2))
    t = torch.tensor([0.9, 0.6, 0.4, 1.0], dtype=torch.float64, device=device)
    r = torch.tensor([0.1, 0.6, 0.0, 0.5], dtype=torch.float64, device=device)
    e, weight = 0.01, torch.ones(B, device=device)
    with use_backend("eager"):  # the kernels take no fp64
        x_t, plus, minus = flow_map_inputs(x0, noise, t, e)

    def u(x: Tensor, at: Tensor) -> Tensor:
        return (x - x0) / at.reshape(B, 1, 1, 1, 1)

    pred, *others = (x.to(wide) for x in (u(x_t, t), u(plus, t + e), u(minus, t - e), x0, noise))
    exact = flow_map_loss(pred, None, *others, t, r, weight, 1.0, 2 * e)
    wrong = flow_map_loss(pred + 0.1, None, *others, t, r, weight, 1.0, 2 * e)
    assert exact.max() < zero
    torch.testing.assert_close(wrong, torch.full_like(wrong, 0.01), rtol=10 * zero**0.5, atol=0.0)


def test_slices_of_one_batch(backend) -> None:
    """The neighbors and the unconditional prediction are views of what one evaluation returns."""
    named = arguments((2, 0, 2))
    names = ("u_plus", "u_minus", "uncond")
    batch = torch.cat([named[name] for name in names])
    views = dict(zip(names, batch.split([3, 3, B]), strict=True))
    torch.testing.assert_close(check("flow_map_loss", named | views)[0], loss(named))


@pytest.mark.parametrize("bad", [(1, 2, B), (-B - 1, 0, 0)])
def test_index_of_no_sample_is_found_on_the_cpu(bad, backend) -> None:
    if DEVICE.type != "cpu":
        pytest.skip("checking the values would wait for the device")
    with pytest.raises(ValueError, match=r"picked must be in \[-4, 4\)"):
        loss(arguments((1, 2, 0)), picked=torch.tensor(bad))


@pytest.mark.parametrize(("bad", "sample"), [(B, B - 1), (-(10**12), 0)])
def test_index_of_no_sample_elsewhere(bad, sample, backend) -> None:
    """Expect NaN for the loss of the nearest sample where the host reads no values."""
    if DEVICE.type == "cpu" and backend == "native":
        pytest.skip("the C++ looks at every index itself")
    named = arguments((1, 2, 0))
    run = torch.ops.anyflow.flow_map_loss
    wrong = named | {"picked": torch.tensor([1, 2, bad], device=DEVICE)}
    if DEVICE.type == "cpu" and backend == "eager":
        wrong["picked"] = wrong["picked"].as_subclass(Elsewhere)
        run = flow_map_loss_reference
    right, (out, residual) = run(*named.values())[0], run(*wrong.values())
    assert out.isnan().tolist() == [i == sample for i in range(B)]
    assert torch.equal(out[1:3], right[1:3])
    assert residual[sample].isnan().all() and residual[1:3].isfinite().all()
