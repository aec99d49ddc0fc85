"""Test means since the last line of metrics."""

import json

import pytest
import torch

from anyflow.training.window import Window

CPU = torch.device("cpu")


def test_means_are_over_the_updates_that_had_a_scalar() -> None:
    window = Window(CPU)
    window.add({"loss": torch.tensor(1.0), "lr": 0.1})
    window.add({"critic_loss": torch.tensor(5.0)})
    window.add(
        {
            "loss": torch.tensor(2.0, dtype=torch.float64),
            "critic_loss": torch.tensor(6.0),
            "lr": 0.2,
        }
    )
    assert window.take() == {"loss": 1.5, "critic_loss": 5.5, "lr": 0.2}
    assert window.take() == {}
    window.add({"loss": torch.tensor(7.0)})
    assert window.take() == {"loss": 7.0}


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_a_resumed_window_has_the_same_means_bit_for_bit(
    stop: int, generator: torch.Generator
) -> None:
    """Interrupt anywhere, or only read the state; values differ by many orders."""
    values = torch.randn(10, generator=generator) * 10.0 ** torch.arange(-5, 5)
    straight, read = Window(CPU), Window(CPU)
    for value in values:
        straight.add({"loss": value, "lr": float(value)})
        read.add({"loss": value, "lr": float(value)})
        read.state()
    first = Window(CPU)
    for value in values[:stop]:
        first.add({"loss": value, "lr": float(value)})
    second = Window(CPU, json.loads(json.dumps(first.state())))
    for value in values[stop:]:
        second.add({"loss": value, "lr": float(value)})
    expected = straight.take()
    assert second.take() == expected == read.take()
    assert expected["loss"] == pytest.approx(values.double().mean().item(), rel=1e-12)
