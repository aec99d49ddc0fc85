"""Trace that plan ``low`` brings pinned weights to the device without waiting."""

from typing import Any

import pytest
import torch
from torch import nn

from anyflow.pipelines.memory import Turns
from anyflow.pipelines.pinning import pin_weights


def test_weights_come_from_pinned_memory_at_the_second_turn(device: Any) -> None:
    first, again = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16()) for _ in range(2))
    turns = Turns("low", torch.device("cuda", 0), cuda_graph=False)
    device.clear()
    turns.transformer(first)
    assert len(device.waits) == 4 and {wait.why for wait in device.waits} == {
        "copies from pageable memory"
    }

    turns = Turns("low", torch.device("cuda", 0), cuda_graph=False)
    turns.rest(again)
    before = [p.detach().clone() for p in again.parameters()]
    device.clear()
    turns.transformer(again)
    assert all(p.is_cuda for p in again.parameters()) and device.waits == []
    homes = [home for _, home in turns._homes]
    assert all(torch.equal(a, b) for a, b in zip(homes, before, strict=True))
    assert len({home.untyped_storage().data_ptr() for home in homes}) == 1  # all in one chunk


def test_pinning_in_one_go(device: Any, recwarn: pytest.WarningsRecorder) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16())
    assert pin_weights(module) == 0 and not recwarn.list
