"""Test the learning rate, the optimizer's state and the guard against values not finite."""

import math

import pytest
import torch
from torch import nn

from anyflow.training.config import OptimizerConfig
from anyflow.training.guard import check_state
from anyflow.training.optimization import NetworkOptimizer, TrainingError, lr_factor


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))


def _backward(network: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    loss = network(torch.randn(5, 3, generator=generator)).square().mean()
    loss.backward()
    return {"loss": loss.detach()}


def test_the_warm_up_is_linear_and_then_the_rate_is_constant() -> None:
    config = OptimizerConfig(warmup_steps=4)
    assert [lr_factor(config, s, 100) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_factor(OptimizerConfig(), 0, 100) == 1.0


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_the_cosine_starts_at_the_peak_and_ends_with_the_last_update(warmup: int) -> None:
    config = OptimizerConfig(schedule="cosine", warmup_steps=warmup, min_lr_ratio=0.1)
    factors = [lr_factor(config, s, 25) for s in range(25)]
    peak = max(warmup, 1) - 1
    assert factors[peak] == 1.0 and factors[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(factors[peak:], factors[peak + 1 :], strict=False))
    middle = (peak + 24) // 2
    assert factors[middle] == pytest.approx(0.55) or (24 - peak) % 2
    assert lr_factor(config, 30, 25) == pytest.approx(0.1)


def test_a_run_of_warm_up_alone_or_of_one_update_has_a_rate() -> None:
    config = OptimizerConfig(schedule="cosine", warmup_steps=10)
    assert lr_factor(config, 4, 5) == 0.5
    assert lr_factor(OptimizerConfig(schedule="cosine"), 0, 1) == 1.0


def test_updates_are_those_of_adamw_with_its_own_clipping_and_schedule(
    generator: torch.Generator,
) -> None:
    config = OptimizerConfig(
        lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1, warmup_steps=3, clip_norm=0.05
    )
    ours, theirs = _network(), _network()
    theirs.load_state_dict(ours.state_dict())
    optimizer = NetworkOptimizer("student", ours, config, total_steps=10)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1.0, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(5):
        state = generator.get_state()
        losses = _backward(ours, generator)
        norm = optimizer.update(step, losses)
        generator.set_state(state)
        _backward(theirs, generator)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        adamw.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 3)
        adamw.step()
        adamw.zero_grad()
        torch.testing.assert_close(norm, expected)
        assert all(p.grad is None for p in ours.parameters())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_the_state_exists_before_the_first_update_and_resumes_it_bit_for_bit(
    generator: torch.Generator,
) -> None:
    config = OptimizerConfig(lr=1e-2)
    straight, resumed = _network(), _network()
    optimizer = NetworkOptimizer("student", straight, config, 10)
    names = {"weight", "bias"}
    assert set(optimizer.tensors()) == {f"student/{i}.{n}" for i in range(3) for n in names} | {
        f"optimizer/student/{i}.{n}/{key}"
        for i in range(3)
        for n in names
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    for step in range(3):
        optimizer.update(step, _backward(straight, generator))
    again = NetworkOptimizer("student", resumed, config, 10)
    for name, tensor in again.tensors().items():
        tensor.copy_(optimizer.tensors()[name])
    state = generator.get_state()
    optimizer.update(3, _backward(straight, generator))
    generator.set_state(state)
    again.update(3, _backward(resumed, generator))
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, optimizer.tensors()[name]), name


def test_frozen_parameters_are_left_out() -> None:
    network = _network()
    network[1].requires_grad_(False)
    tensors = NetworkOptimizer("critic", network, OptimizerConfig(), 10).tensors()
    assert len(tensors) == 4 * 4 and not any("/1." in name for name in tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_before_anything_changes(
    value: float, generator: torch.Generator
) -> None:
    network = _network()
    optimizer = NetworkOptimizer("student", network, OptimizerConfig(), 10)
    losses = _backward(network, generator)
    network[1].weight.grad[0, 0] = value
    before = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    with pytest.raises(
        TrainingError, match=r"step 8: gradient norm of the student .* is that of 1\.weight"
    ):
        optimizer.update(7, losses)
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.tensors().items())


def test_a_loss_that_is_not_finite_is_named(generator: torch.Generator) -> None:
    network = _network()
    optimizer = NetworkOptimizer("critic", network, OptimizerConfig(), 10)
    losses = {**_backward(network, generator), "loss_data": torch.tensor(math.inf)}
    with pytest.raises(TrainingError, match="step 1: loss_data of the critic is not finite"):
        optimizer.update(0, losses)


def test_an_output_of_another_network_is_suspected_first(generator: torch.Generator) -> None:
    network = _network()
    optimizer = NetworkOptimizer("student", network, OptimizerConfig(), 10)
    losses = {**_backward(network, generator), "loss_data": torch.tensor(math.inf)}
    norms = {
        "rollout of the student": torch.tensor(1.0),
        "score of the teacher": torch.tensor(math.nan),
    }
    with pytest.raises(TrainingError, match="step 3: score of the teacher is not finite") as error:
        optimizer.update(2, losses, norms)
    assert (error.value.network, error.value.step) == ("teacher", 3)


@pytest.mark.parametrize(
    ("name", "value", "network"),
    [
        ("student/a.weight", math.nan, "student"),
        ("student/a.weight", 1e20, "student"),  # finite, but every loss with it overflows
        ("critic/b", math.inf, "critic"),
        ("optimizer/critic/b/exp_avg_sq", math.inf, "critic"),
        ("ema/a.weight", math.nan, "student"),
    ],
)
def test_state_that_is_not_finite_is_named(name: str, value: float, network: str) -> None:
    names = (
        "student/a.weight",
        "critic/b",
        "optimizer/critic/b/exp_avg_sq",
        "optimizer/critic/b/step",
        "ema/a.weight",
    )
    tensors = {n: torch.ones(3) for n in names}
    tensors |= {
        "optimizer/critic/b/exp_avg": torch.full((3,), 1e30),
        "optimizer/critic/c/exp_avg": torch.ones(0),
    }
    check_state(4, tensors)
    tensors[name] = torch.tensor([1.0, value, 1.0])
    with pytest.raises(
        TrainingError, match=f"step 4: {name} of the {network} is not finite"
    ) as error:
        check_state(4, tensors)
    assert error.value.network == network
