"""Test what is reported beside ratios: FLOPs, bytes, tiles, peak memory and limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import roofline
import torch
from ops import bench_ops
from roofline import Component, DeviceLimits, Evaluations, LimitMeter
from sizes import PUBLISHED, TINY
from timing import peak_memory
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from workloads import Place

from anyflow.models import AnyFlowTransformer3DModel, use_attention_backend
from anyflow.ops import examples, use_backend

CPU = torch.device("cpu")
TERA = 1e12


def counted(step: Callable[[], Any]) -> int:
    """Count the FLOPs of the products that torch sees in a step of the eager references."""
    # Of torch's attention it counts what is written as products, not the fused kernel for CPUs.
    counter, math = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
    with counter, math, use_backend("eager"), use_attention_backend("math"):
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", TINY)
def test_flops_of_a_forward_are_those_of_torchs_counter(name: str) -> None:
    size = TINY[name]
    model = AnyFlowTransformer3DModel(**size.config())
    inputs = torch.randn(1, *size.latents), torch.tensor([700.0]), torch.tensor([300.0])
    text = torch.randn(1, size.text_tokens, size.text_dim)
    with torch.no_grad():
        assert counted(lambda: model(*inputs, text)) == roofline.work(size).flops
    assert sum(p.numel() for p in model.parameters()) == size.parameters


def test_published_sizes() -> None:
    """Test 480x832, 81 frames: 198 + 85 TFLOP at 1.3B, 880 + 799 at 14B, and the parameters."""
    assert PUBLISHED["1.3B"].tokens == 32760
    for name, attention, rest in (("1.3B", 198, 85), ("14B", 880, 799)):
        size = PUBLISHED[name]
        found = roofline.forward(size)[0].flops / TERA
        assert found == pytest.approx(attention, rel=0.01)
        assert roofline.work(size).flops / TERA - found == pytest.approx(rest, rel=0.01)
        with torch.device("meta"):
            model = AnyFlowTransformer3DModel(**size.config())
        assert sum(p.numel() for p in model.parameters()) == size.parameters


def test_norms_and_residuals_by_hand() -> None:
    """Test 14B: 19 passes over [32760, 5120] in bf16, the rotary tables for q and k, text keys."""
    norms = next(c for c in roofline.forward(PUBLISHED["14B"]) if c.name == roofline.NORMS)
    token_pass = 32760 * 5120 * 2
    block = 19 * token_pass + 2 * (2 * 32760 * 64 * 4) + 2 * 512 * 5120 * 2
    assert norms.bytes == 40 * block + 3 * token_pass


def test_a_component_takes_the_longer_of_its_two_limits() -> None:
    limits = DeviceLimits("toy", flops=10.0, bandwidth=2.0)
    a, b = Component("a", 100.0, 4.0), Component("b", 10.0, 40.0)
    assert (a.floor_s(limits), a.bound(limits)) == (10.0, "arithmetic")
    assert (b.floor_s(limits), b.bound(limits)) == (20.0, "memory")
    assert roofline.floor_s([a, b], limits) == 30.0  # one after the other
    # a kernel's own rate takes the place of a product's; b stays bound by memory
    assert roofline.floor_s([a, b], limits, {"a": 5.0, "b": 1e9}) == 20.0 + 20.0
    # 14B on an H100: 879.2 TFLOP of attention at 600 instead of 800 TFLOP/s are 366.3 ms more.
    size, rates = PUBLISHED["14B"], {roofline.SELF_ATTENTION: 600e12}
    slower = roofline.forward_floor_s(size, roofline.H100, rates)
    gained = slower - roofline.forward_floor_s(size, roofline.H100)
    assert gained == pytest.approx(0.3663, abs=1e-4)


@pytest.mark.parametrize("limits", (roofline.H100, roofline.H200), ids=lambda card: card.name)
def test_floors_of_sampling_and_training(limits: DeviceLimits) -> None:
    size = PUBLISHED["1.3B"]
    one = roofline.forward_floor_s(size, limits)
    assert roofline.sampling_floor_s(size, 1, limits) == pytest.approx(one)
    assert 49 * one < roofline.sampling_floor_s(size, 50, limits) < 50 * one  # text and times once
    steps = roofline.pretrain_evaluations(batch=2, flow_map_samples=1)
    assert list(steps.values()) == [Evaluations(4, 2), Evaluations(6, 2)]
    ours, peers = (roofline.training_floor_s(size, e, limits) for e in steps.values())
    # 14 / 12 if a gradient costs four forwards, 12 / 10 if it costs three: frozen weights are in
    # between.
    assert 14 / 12 < peers / ours < 12 / 10
    assert roofline.both_on_policy(1) == Evaluations(6, 4)


@pytest.mark.parametrize("example", [examples.linear(12, 32, 16), examples.attention(12, 32, 16)])
def test_flops_of_operators(example: examples.Example) -> None:
    place, found = Place(CPU, Path()), {}
    for direction in bench_ops.DIRECTIONS:
        step = bench_ops.makers(example, direction, torch.float32, place)["eager"]()
        found[direction] = counted(step)
    # torch keeps the weights of attention for its backward, where a kernel forms the scores again:
    # one product more.
    again = example.forward.flops // 2 if example.op == "attention" else 0
    assert found["forward"] == example.forward.flops
    assert found["backward"] + again == example.backward.flops


def test_peak_memory() -> None:
    """Test two tensors of 32 MiB at once, of which none stays."""

    def step() -> Tensor:
        x = torch.ones(1 << 23)
        return (x + 1)[0]

    peak = peak_memory(lambda: float(step()), CPU)
    if peak is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert 63 * 2**20 < peak < 80 * 2**20


def test_limits_of_the_machine() -> None:
    meter, dtype = LimitMeter(CPU), torch.float32
    moving, computing = (meter.floor_s(*work, dtype) for work in ((1 << 20, 0), (0, 10**9)))
    assert moving == (1 << 20) / meter.copy_bandwidth(1 << 20) > 0
    assert computing == 1e9 / meter.product_rate(dtype) > 0
    assert meter.floor_s(1 << 20, 10**9, dtype) == max(moving, computing)
