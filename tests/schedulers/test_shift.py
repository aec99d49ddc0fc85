"""Compare the shift and the training weights with reference numbers, formulas and properties."""

from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from anyflow.schedulers import FlowMapEulerDiscreteScheduler, invert_shift, shift_times

REFERENCE = Path(__file__).parents[1] / "data" / "anyflow_reference_c.safetensors"

# Training weights ---------------------------------------------------------------------------------


def test_weights_match_the_reference() -> None:
    with safe_open(REFERENCE, "pt") as f:
        t, w = f.get_tensor("weight.t"), f.get_tensor("weight.w")
    torch.testing.assert_close(
        FlowMapEulerDiscreteScheduler(shift=5.0).get_train_weight(t), w, rtol=1e-6, atol=0
    )


def grid(shift: float) -> Tensor:
    u = torch.linspace(1, 0, 1001, dtype=torch.float64)
    return 1000 * shift * u / (1 + (shift - 1) * u)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("weight_type", ["beta08", "gaussian", "uniform"])
def test_weights_by_their_formula(weight_type, shift) -> None:
    """Compute the weights of the grid in fp64, and find the nearest point by brute force."""
    points = grid(shift)
    if weight_type == "beta08":
        y = points / 1000 * (1 - points / 1000).sqrt()
    elif weight_type == "gaussian":
        y = torch.exp(-2 * ((points - 500) / 1000) ** 2)
        y = y - y.min()
    else:
        y = torch.ones_like(points) * (1001 / 1000)
    w = 1000 * y / y.sum() if weight_type != "uniform" else torch.ones_like(y)
    t = torch.cat([torch.linspace(0, 1000, 333, dtype=torch.float64), points[::50]])
    nearest = (points[None] - t[:, None]).abs().argmin(1)
    scheduler = FlowMapEulerDiscreteScheduler(shift=shift, weight_type=weight_type)
    actual = scheduler.get_train_weight(t)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), w[nearest], rtol=1e-5, atol=1e-7)


def test_beta08_numbers_at_shift_5() -> None:
    tau = grid(5.0) / 1000
    assert (tau * (1 - tau).sqrt()).sum().item() == pytest.approx(273.44, abs=5e-3)
    w = FlowMapEulerDiscreteScheduler(shift=5.0).get_train_weight(grid(5.0))
    assert w.sum().item() == pytest.approx(1000, rel=1e-5)
    assert w.max().item() == pytest.approx(1.4076, abs=5e-5)
    assert grid(5.0)[w.argmax()].item() == pytest.approx(667, abs=2)
    assert w[0] == 0 and w[-1] == 0


def test_weight_does_not_depend_on_the_batch() -> None:
    """Weigh a batch of 1, where a weight that is normalized over the batch would be 1000."""
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    t = torch.tensor([[980.0, 667.0], [300.0, 10.0]])
    together = scheduler.get_train_weight(t)
    assert together.shape == t.shape
    for i in range(2):
        for j in range(2):
            assert scheduler.get_train_weight(t[i, j]).item() == together[i, j].item() < 2
    assert scheduler.get_train_weight(t[:0]).shape == (0, 2)


def test_units_are_never_guessed() -> None:
    """Take no small timesteps for fractions of the range."""
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    small = scheduler.get_train_weight(torch.tensor([0.667, 0.9]))
    assert torch.equal(small, scheduler.get_train_weight(torch.tensor([0.667, 0.9, 667.0]))[:2])
    assert small.max() < 0.01
    assert scheduler.get_train_weight(torch.tensor([1.0])) < 0.01
    short = FlowMapEulerDiscreteScheduler(num_train_timesteps=100, shift=5.0)
    torch.testing.assert_close(
        short.get_train_weight(torch.tensor([66.7])),
        scheduler.get_train_weight(torch.tensor([667.0])),
    )


# Shift --------------------------------------------------------------------------------------------

shifts = st.floats(0.05, 20)
fractions = st.floats(0, 1)


@given(u=fractions, shift=shifts)
def test_shift_and_its_inverse(u, shift) -> None:
    assert invert_shift(shift_times(u, shift), shift) == pytest.approx(u, rel=1e-9, abs=1e-12)
    assert 0 <= shift_times(u, shift) <= 1 + 1e-12
    scheduler = FlowMapEulerDiscreteScheduler(num_train_timesteps=1, shift=shift)
    assert scheduler.invert_shift(scheduler.apply_shift(u)) == pytest.approx(u, rel=1e-9, abs=1e-12)


@given(u=fractions, v=fractions, shift=shifts)
def test_shift_is_monotone_with_fixed_ends(u, v, shift) -> None:
    assert shift_times(0.0, shift) == 0 and shift_times(1.0, shift) == pytest.approx(1)
    low, high = sorted((u, v))
    assert shift_times(low, shift) <= shift_times(high, shift) + 1e-15
    toward_noise = shift_times(u, shift) - u
    assert toward_noise >= -1e-12 if shift >= 1 else toward_noise <= 1e-12


@given(shift=shifts, other=shifts, u=fractions)
def test_shifts_compose_by_multiplying(shift, other, u) -> None:
    assert shift_times(shift_times(u, shift), other) == pytest.approx(
        shift_times(u, shift * other), rel=1e-9
    )


def test_apply_shift_on_tensors_matches_diffusers() -> None:
    ours, theirs = (
        FlowMapEulerDiscreteScheduler(shift=5.0),
        diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    )
    u = torch.linspace(0, 1, 21, dtype=torch.float64).reshape(3, 7)
    torch.testing.assert_close(ours.apply_shift(u), theirs.apply_shift(u))
