"""Measure rates since the last line of metrics; real time passes."""

import time

import pytest
import torch

from anyflow.training.distributed import Mesh
from anyflow.training.throughput import Throughput


def test_rates_are_of_the_time_that_is_not_left_out() -> None:
    throughput = Throughput(Mesh(torch.device("cpu")), tokens=36, bf16=True)
    time.sleep(0.05)
    throughput.add(4, 10**9)
    with throughput.paused():
        time.sleep(0.3)
        values = throughput.take()
    rate = values["samples_per_second"]
    assert 0 < rate <= 4 / 0.05
    assert values["tokens_per_second"] == pytest.approx(36 * rate)
    assert values["tflops_per_second"] == pytest.approx(rate / 4 * 1e-3)
    assert "mfu" not in values  # a CPU's peak is not known
    with throughput.paused():
        assert throughput.take()["samples_per_second"] == 0


def test_memory_at_its_peak_is_that_of_the_process() -> None:
    throughput = Throughput(Mesh(torch.device("cpu")), tokens=1, bf16=False)
    with throughput.paused():
        before = throughput.take()["peak_memory_gb"]
    block = torch.ones(2**26)  # 0.27 GB
    del block
    with throughput.paused():
        after = throughput.take()["peak_memory_gb"]
    assert 0.1 < before <= after < 100 and after > 0.27
