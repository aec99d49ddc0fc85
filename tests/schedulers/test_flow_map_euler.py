"""Compare the scheduler with diffusers' and closed forms, and give it bad input."""

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from anyflow.schedulers import FlowMapEulerDiscreteScheduler

SHAPE = (3, 2, 4, 6, 6)
TURBO = [999, 937, 833, 624]


def pair(**settings: Any) -> tuple[FlowMapEulerDiscreteScheduler, Any]:
    return FlowMapEulerDiscreteScheduler(**settings), diffusers.FlowMapEulerDiscreteScheduler(
        **settings
    )


def randn(g: torch.Generator, count: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(SHAPE, generator=g, dtype=dtype) for _ in range(count)]


# Schedule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 0.5])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 50, 1000])
def test_schedule_parity(shift, n) -> None:
    ours, theirs = pair(shift=shift)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(n)
    assert len(ours.timesteps) == ours.num_inference_steps == n and len(ours.sigmas) == n + 1
    for name in ("timesteps", "sigmas"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-15, atol=1e-12)


def test_state_before_set_timesteps_parity() -> None:
    ours, theirs = pair(shift=5.0, num_train_timesteps=100)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    assert (ours.order, ours.init_noise_sigma) == (1, 1.0)
    assert ours.step_index is None and ours.begin_index is None
    x = torch.zeros(2)
    assert ours.scale_model_input(x, 5) is x


def test_published_four_step_schedule_is_the_floored_shift() -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    assert [math.floor(t) for t in scheduler.timesteps.tolist()] == [1000, 937, 833, 625]


@pytest.mark.parametrize(
    "values", [TURBO, [*TURBO, 0], tuple(TURBO), torch.tensor(TURBO), [999.0, 937.5, 0.25]]
)
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_custom_timesteps_are_verbatim(values, shift) -> None:
    """Keep custom timesteps; diffusers shifts them again (624 becomes 892 at shift 5)."""
    ours, theirs = pair(shift=shift)
    ours.set_timesteps(timesteps=values)
    expected = [float(v) for v in values if v != 0]
    assert ours.timesteps.tolist() == expected and ours.num_inference_steps == len(expected)
    assert ours.sigmas.tolist() == [v / 1000 for v in expected] + [0.0]
    if shift != 1 and isinstance(values, list):
        theirs.set_timesteps(timesteps=values)
        assert theirs.timesteps[-1] != values[-1] or values[-1] == 0
        assert abs(theirs.timesteps[1].item() - values[1]) > 10


@pytest.mark.parametrize(
    ("n", "values"), [(4, TURBO), (4, [*TURBO, 0]), (5, [*TURBO, 0]), (None, TURBO)]
)
def test_count_given_beside_custom_timesteps(n, values) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(n, "cpu", timesteps=values)
    assert scheduler.timesteps.tolist() == TURBO and scheduler.num_inference_steps == 4


@pytest.mark.parametrize("values", [[1.0, 0.5, 0.25], [0.9, 0.4, 0.0], torch.tensor([1.0, 0.75])])
def test_custom_sigmas_are_verbatim(values) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=values)
    expected = [float(v) for v in values if v != 0]
    assert scheduler.sigmas.tolist() == pytest.approx([*expected, 0.0])
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * v for v in expected])


def test_schedule_leaves_the_scheduler_alone() -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.clone()
    sigmas = scheduler.schedule(2)
    assert sigmas.tolist() == pytest.approx([1.0, 5 / 6, 0.0]) and torch.equal(
        scheduler.timesteps, before
    )


@pytest.mark.parametrize(
    "values",
    [
        [624, 833, 937, 999],
        [999, 937, 937, 624],
        [999, 0, 500],
        [999, 0, 0],
        [0],
        [],
        [[999, 500]],
        [float("nan"), 500],
        [999, float("nan")],
        [float("inf"), 500],
        [1001, 500],
        [999, -1],
    ],
    ids=str,
)
def test_bad_schedules(values) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    before = scheduler.timesteps.clone()
    with pytest.raises(ValueError, match="timesteps must be"):
        scheduler.set_timesteps(timesteps=values)
    with pytest.raises(ValueError, match="sigmas must be"):
        scheduler.set_timesteps(sigmas=(torch.tensor(values, dtype=torch.float64) / 1000).tolist())
    assert torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_inference_steps is required"),
        ({"num_inference_steps": 0}, "a whole number from 1 to 10000"),
        ({"num_inference_steps": -3}, "a whole number from 1 to 10000"),
        (
            {"num_inference_steps": 3, "timesteps": TURBO},
            "num_inference_steps=3, but timesteps has 4 steps",
        ),
        (
            {"num_inference_steps": 5, "timesteps": TURBO},
            "num_inference_steps=5, but timesteps has 4 steps",
        ),
        (
            {"num_inference_steps": 2, "sigmas": [1.0]},
            "num_inference_steps=2, but sigmas has 1 steps",
        ),
        ({"sigmas": [1.0], "timesteps": [1000]}, "not both"),
        ({"num_inference_steps": 10**9}, "from 1 to 10000, got 1000000000"),
        ({"num_inference_steps": 2.0}, "a whole number"),
        ({"num_inference_steps": True}, "a whole number"),
        (
            {"timesteps": "999, 500"},
            "timesteps must be a sequence of at most 10000 numbers, got '999, 500'",
        ),
        ({"timesteps": ["999", "500"]}, "a sequence of at most 10000 numbers"),
        ({"timesteps": {999: 1, 500: 2}}, "a sequence of at most 10000 numbers"),
        ({"timesteps": 999}, "a sequence of at most 10000 numbers, got 999"),
        ({"timesteps": [None]}, "a sequence of at most 10000 numbers"),
        ({"timesteps": [1j]}, "a sequence of at most 10000 numbers"),
        ({"sigmas": torch.tensor(0.5)}, "a sequence of at most 10000 numbers"),
        ({"sigmas": torch.tensor([0.5 + 0j])}, "a sequence of at most 10000 numbers"),
    ],
)
def test_bad_set_timesteps(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMapEulerDiscreteScheduler().set_timesteps(**arguments)


@pytest.mark.parametrize(
    "kind",
    [tuple, np.array, np.float32, torch.tensor, lambda v: torch.tensor(v).bfloat16(), iter],
    ids=["tuple", "array", "float32", "tensor", "bfloat16", "iterator"],
)
def test_schedules_of_any_sequence_of_numbers(kind) -> None:
    given, expected = kind([992.0, 752.0, 500.0]), [0.992, 0.752, 0.5, 0.0]
    assert FlowMapEulerDiscreteScheduler().schedule(timesteps=given).tolist() == expected


@pytest.mark.parametrize(
    "number", [np.int64(4), np.uint8(4), np.array(4), torch.tensor(4)], ids=repr
)
def test_step_counts_of_numpy_and_torch(number) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    assert torch.equal(scheduler.schedule(number), scheduler.schedule(4))


# Steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize("explicit", [False, True])
def test_step_parity(n, explicit, generator) -> None:
    ours, theirs = pair(shift=5.0)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(n)
    x, _ = randn(generator)
    a = b = x
    for i, t in enumerate(ours.timesteps):
        u = torch.randn(SHAPE, generator=generator)
        r = ours.sigmas[i + 1] * 1000 if explicit else None
        a = ours.step(u, t, a, r).prev_sample
        # diffusers looks the final r = 0 up among the timesteps, which do not hold it, and then
        # divides: the same.
        b = theirs.step(u, t, b, r).prev_sample
        assert ours.step_index == theirs.step_index == i + 1
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("t", "r"), [(1000, 0), (800.5, 300.25), (500.0, 500.0), (0, 0)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_step_between_any_two_times(t, r, as_tensor, generator) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    x, u = randn(generator, dtype=torch.float64)
    arguments = (torch.tensor(t), torch.tensor(r)) if as_tensor else (t, r)
    out = scheduler.step(u, arguments[0], x, arguments[1])
    torch.testing.assert_close(out.prev_sample, x - (t - r) / 1000 * u)
    assert out[0] is out.prev_sample and out["prev_sample"] is out.prev_sample
    as_tuple = scheduler.step(u, arguments[0], x, arguments[1], return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.prev_sample)


@pytest.mark.parametrize("on_schedule", [True, False])
@pytest.mark.parametrize("per_frame", [True, False])
def test_per_sample_timesteps_equal_a_loop_over_samples(per_frame, on_schedule, generator) -> None:
    """Give each sample its time; diffusers reads t[0] for all where it is on its schedule."""
    ours, theirs = pair(shift=5.0)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    x, u = randn(generator)
    t = (
        ours.timesteps[[0, 1, 3]]
        if on_schedule
        else torch.tensor([900.0, 500.0, 20.0], dtype=torch.float64)
    )
    r = t * torch.tensor([0.1, 0.9, 0.5])
    if per_frame:
        t, r = (v[:, None] * torch.tensor([1.0, 0.75]) for v in (t, r))
    out = ours.step(u, t, x, r).prev_sample
    for b in range(3):
        for f in range(2):
            tb, rb = (v[b, f] if per_frame else v[b] for v in (t, r))
            expected = ours.step(
                u[b : b + 1, f : f + 1], tb, x[b : b + 1, f : f + 1], rb
            ).prev_sample
            torch.testing.assert_close(out[b : b + 1, f : f + 1], expected)
    if on_schedule and not per_frame:
        wrong = theirs.step(u, t, x, r).prev_sample
        torch.testing.assert_close(wrong[0], out[0])
        assert (wrong[1] - out[1]).abs().max() > 0.1


def test_per_sample_timesteps_find_their_own_successors(generator) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    x, u = randn(generator)
    t = scheduler.timesteps[[2, 0, 3]]
    following = torch.stack([scheduler.timesteps[3], scheduler.timesteps[1], torch.tensor(0.0)])
    assert torch.equal(
        scheduler.step(u, t, x).prev_sample, scheduler.step(u, t, x, following).prev_sample
    )


@pytest.mark.parametrize(
    ("t_shape", "r_shape"), [((3, 2), (3,)), ((3,), (3, 2)), ((3, 2), ()), ((), (3, 2))]
)
def test_times_of_different_rank(t_shape, r_shape, generator) -> None:
    scheduler = FlowMapEulerDiscreteScheduler()
    x, u = randn(generator)
    t, r = (
        500 + 500 * torch.rand(t_shape, generator=generator),
        500 * torch.rand(r_shape, generator=generator),
    )
    wide = [v.reshape(v.shape + (1,) * (2 - v.ndim)).expand(3, 2) for v in (t, r)]
    expected = scheduler.step(u, wide[0], x, wide[1]).prev_sample
    torch.testing.assert_close(scheduler.step(u, t, x, r).prev_sample, expected)


def test_context_frames_stay_with_t_equals_r(generator) -> None:
    x, u = randn(generator)
    t = torch.full((3, 2), 700.0)
    t[:, 0] = 0
    out = FlowMapEulerDiscreteScheduler().step(u, t, x, torch.zeros(3, 2)).prev_sample
    assert torch.equal(out[:, 0], x[:, 0]) and not torch.equal(out[:, 1], x[:, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_step_computes_in_fp32_and_returns_the_samples_dtype(dtype, generator) -> None:
    scheduler = FlowMapEulerDiscreteScheduler()
    x, u = (v.to(dtype) for v in randn(generator))
    out = scheduler.step(u, 900.0, x, 100.0).prev_sample
    exact = x.double() - 0.8 * u.double()
    assert out.dtype == dtype
    atol = 4e-7 if dtype != torch.float64 else 1e-15
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=atol)


def test_step_off_the_schedule_needs_r(generator) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    x, u = randn(generator)
    assert torch.equal(
        scheduler.step(u, 1000, x).prev_sample, scheduler.step(u, 1000, x, 937.5).prev_sample
    )
    with pytest.raises(ValueError, match=r"timestep 123.0 is not on the schedule.*pass r_timestep"):
        scheduler.step(u, 123.0, x)


def test_step_does_not_write_its_arguments(generator) -> None:
    scheduler = FlowMapEulerDiscreteScheduler()
    x, u = randn(generator)
    copies = x.clone(), u.clone()
    scheduler.step(u, 500.0, x, 500.0).prev_sample.zero_()
    assert torch.equal(x, copies[0]) and torch.equal(u, copies[1])


def test_begin_index(generator) -> None:
    ours, theirs = pair(shift=5.0)
    x, u = randn(generator)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(2)
        assert scheduler.begin_index == 2
        scheduler.step(u, scheduler.timesteps[2], x)
        assert scheduler.step_index == 3
        scheduler.set_timesteps(4)
        assert scheduler.step_index is None and scheduler.begin_index is None
        scheduler.step(u, scheduler.timesteps[1], x)  # without it, found from the timestep
        assert scheduler.step_index == 2


@pytest.mark.parametrize(
    ("t", "r", "message"),
    [
        (1001.0, 0.0, "timestep must be in"),
        (-1.0, -2.0, "timestep must be in"),
        (float("nan"), 0.0, "timestep must be in"),
        (500.0, float("nan"), "r_timestep must be in"),
        (500.0, -1.0, "r_timestep must be in"),
        (500.0, 600.0, "must not exceed timestep"),
        (
            torch.tensor([900.0, 100.0, 500.0]),
            torch.tensor([100.0, 200.0, 100.0]),
            "must not exceed timestep",
        ),
        (
            torch.full((3, 2), 500.0),
            torch.tensor([100.0, 600.0, 100.0]),
            "must not exceed timestep",
        ),
        (torch.zeros(2), 0.0, "timestep"),
        (torch.zeros(3, 3), 0.0, "timestep"),
        (500.0, torch.zeros(4), "r_timestep"),
    ],
)
def test_bad_times(t, r, message, generator) -> None:
    x, u = randn(generator)
    with pytest.raises(ValueError, match=message):
        FlowMapEulerDiscreteScheduler().step(u, t, x, r)


def test_bad_shapes(generator) -> None:
    x, u = randn(generator)
    with pytest.raises(ValueError, match="must match"):
        FlowMapEulerDiscreteScheduler().step(u[:1], 500.0, x, 0.0)
    with pytest.raises(ValueError, match="must match"):
        FlowMapEulerDiscreteScheduler().scale_noise(x, 500.0, u[:1])


# Noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "t", [torch.tensor([900.0, 500.0, 0.0]), 1000 * torch.ones(3, 2), torch.tensor(250.0)]
)
def test_scale_noise_parity(t, generator) -> None:
    ours, theirs = pair(shift=5.0)
    x, noise = randn(generator)
    out = ours.scale_noise(x, t, noise)
    sigma = (t / 1000).reshape(t.shape + (1,) * (5 - t.ndim))
    torch.testing.assert_close(out, (1 - sigma) * x + sigma * noise)
    torch.testing.assert_close(out, theirs.scale_noise(x, t, noise))
    assert torch.equal(ours.add_noise(x, noise, t), out)


def test_scale_noise_ends_and_dtype(generator) -> None:
    x, noise = (v.bfloat16() for v in randn(generator))
    scheduler = FlowMapEulerDiscreteScheduler()
    assert torch.equal(scheduler.scale_noise(x, 0, noise), x) and torch.equal(
        scheduler.scale_noise(x, 1000, noise), noise
    )
    # 999 is 1000 in bf16: sigma must not be rounded to it
    middle = scheduler.scale_noise(x, 999.0, noise)
    assert middle.dtype == torch.bfloat16
    assert torch.equal(middle, (0.001 * x.double() + 0.999 * noise.double()).float().bfloat16())
    with pytest.raises(ValueError, match="timestep must be in"):
        scheduler.add_noise(x, noise, 1001.0)
