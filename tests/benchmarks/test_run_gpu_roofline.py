"""benchmarks/gpu/roofline.py: a forward has the FLOPs that torch counts, the floors are those of
the arithmetic.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu import roofline
from gpu.sizes import PUBLISHED, TINY, Size

from anyflow.models import AnyFlowTransformer3DModel, use_attention_backend
from anyflow.ops import use_backend

TERA = 1e12


def parts(size: Size) -> dict[str, float]:
    """TFLOP of self-attention, of everything else, of the linear layers alone."""
    components = roofline.forward(size)
    attention = components[0].flops / TERA
    linear = sum(c.flops for c in components if c.name.startswith("linear")) / TERA
    return {
        "attention": attention,
        "rest": roofline.total(components).flops / TERA - attention,
        "linear": linear,
    }


@pytest.mark.parametrize("name", TINY)
def test_flops_are_those_of_torchs_counter(name: str) -> None:
    size = TINY[name]
    model = AnyFlowTransformer3DModel(**size.config())
    inputs = torch.randn(1, *size.latents), torch.tensor([700.0]), torch.tensor([300.0])
    text = torch.randn(1, size.text_tokens, size.text_dim)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), use_backend("eager"), use_attention_backend("math"), counter:
        model(*inputs, text)
    assert counter.get_total_flops() == roofline.total(roofline.forward(size)).flops
    assert sum(p.numel() for p in model.parameters()) == size.parameters


def test_published_sizes() -> None:
    """480x832, 81 frames: 198 and 85 TFLOP at 1.3B; at 14B 880 of attention, and less than 920 of
    everything else.
    """
    small, large = (parts(PUBLISHED[name]) for name in ("1.3B", "14B"))
    assert PUBLISHED["1.3B"].tokens == 32760
    assert small["attention"] == pytest.approx(198, rel=0.01) and small["rest"] == pytest.approx(
        85, rel=0.01
    )
    assert large["attention"] == pytest.approx(880, rel=0.01)
    assert large["linear"] == pytest.approx(785, rel=0.01) and large["rest"] == pytest.approx(
        799, rel=0.01
    )
    # 920 is every matrix of the blocks times every token; the keys and values of the text have 512
    # tokens.
    size = PUBLISHED["14B"]
    charged_twice = 4 * (size.tokens - size.text_tokens) * size.dim**2 * size.layers / TERA
    assert large["linear"] + charged_twice == pytest.approx(920, rel=0.01)


def test_parameters_of_the_published_sizes() -> None:
    with torch.device("meta"):
        for size in PUBLISHED.values():
            model = AnyFlowTransformer3DModel(**size.config())
            assert sum(p.numel() for p in model.parameters()) == size.parameters


def test_a_component_takes_the_longer_of_its_two_limits() -> None:
    limits = roofline.Limits("toy", flops=10.0, bandwidth=2.0)
    assert roofline.Component("a", 100.0, 4.0).floor_s(limits) == 10.0
    assert roofline.Component("b", 10.0, 40.0).floor_s(limits) == 20.0
    assert roofline.Component("a", 100.0, 4.0).bound(limits) == "arithmetic"
    assert roofline.Component("b", 10.0, 40.0).bound(limits) == "memory"
    both = [roofline.Component("a", 100.0, 4.0), roofline.Component("b", 10.0, 40.0)]
    assert roofline.floor_s(both, limits) == 30.0  # one after the other


def test_a_card_is_found_by_its_whole_name() -> None:
    """The PCIe and NVL forms, a Grace Hopper and a part of a card are slower than what was
    measured.
    """
    assert (
        roofline.card("NVIDIA H100 80GB HBM3") is roofline.H100 is roofline.card(roofline.H100.name)
    )
    assert roofline.card("NVIDIA H200") is roofline.H200 is roofline.card("H200")
    others = [
        "NVIDIA H100 PCIe",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "",
    ]
    assert [roofline.card(name) for name in others] == [None] * len(others)
    assert all(limits.source for limits in roofline.CARDS.values())


def test_a_components_own_rate_takes_the_place_of_a_products() -> None:
    limits = roofline.Limits("toy", flops=10.0, bandwidth=2.0)
    parts = [roofline.Component("a", 100.0, 4.0), roofline.Component("b", 10.0, 40.0)]
    # b stays bound by memory
    assert roofline.floor_s(parts, limits, {"a": 5.0, "b": 1e9}) == 20.0 + 20.0
    # 14B on an H100: 40 blocks of 4 L^2 D, 879.2 TFLOP of attention at 600 instead of 800 TFLOP/s
    # are 366.3 ms more.
    size, attention = PUBLISHED["14B"], 40 * 4 * 32760**2 * 5120
    slower = roofline.forward_floor_s(size, roofline.H100, {roofline.SELF_ATTENTION: 600e12})
    gained = attention / 600e12 - attention / 800e12
    assert (
        slower - roofline.forward_floor_s(size, roofline.H100)
        == pytest.approx(gained)
        == pytest.approx(0.3663, abs=1e-4)
    )


def test_norms_and_residuals_by_hand() -> None:
    """14B: 19 passes over [32760, 5120] in bf16, cosines and sines for q and k, the text's keys, in
    40 blocks.
    """
    size = PUBLISHED["14B"]
    norms = next(c for c in roofline.forward(size) if c.name == "norms, rotary, residuals")
    token_pass = 32760 * 5120 * 2
    block = 19 * token_pass + 2 * (2 * 32760 * 64 * 4) + 2 * 512 * 5120 * 2
    assert norms.bytes == 40 * block + 3 * token_pass


class _Bytes(TorchDispatchMode):
    """Counts what operators other than products, attention and views read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns
        )
        names = ("mm", "linear", "attention", "detach", "_unsafe_view", "empty")
        if not is_view and not any(name in function.name() for name in names):
            tensors = [
                t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, torch.Tensor)
            ]
            self.total += sum(
                min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors
            )
        return result


@pytest.mark.parametrize(("name", "expected"), [("1.3B", 489), ("14B", 475)])
def test_bytes_that_diffusers_moves_in_eager_mode(name: str, expected: float) -> None:
    """Per element of [L, D], of a block in bf16, beside products and attention; it is in
    docs/performance-log.md.
    """
    from diffusers.models.transformers.transformer_anyflow import AnyFlowTransformerBlock

    size, tokens = PUBLISHED[name], 256
    block = AnyFlowTransformerBlock(size.dim, 64, size.heads, True).bfloat16()
    for parameter_name, parameter in block.named_parameters():
        if {"scale_shift_table", "norm2"} & set(parameter_name.split(".")):
            parameter.data = parameter.data.float()
    x, text = torch.randn(1, tokens, size.dim).bfloat16(), torch.randn(1, 1, size.dim).bfloat16()
    modulation = torch.randn(1, tokens, 6, size.dim).bfloat16()
    angles = torch.randn(1, 1, tokens, size.head_dim // 2, dtype=torch.float64)
    rotary = torch.polar(torch.ones_like(angles), angles)
    with torch.no_grad(), _Bytes() as counted:
        block(x, text, modulation, {"query": rotary, "key": rotary}, None)
    # GELU of the whole width, read and written in bf16
    activation = 4 * (size.ffn_dim - 64) / size.dim
    assert counted.total / (tokens * size.dim) + activation == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("limits", roofline.CARDS.values(), ids=lambda card: card.name)
def test_floors_of_sampling_and_training(limits: roofline.Limits) -> None:
    size = PUBLISHED["1.3B"]
    one = roofline.forward_floor_s(size, limits)
    assert roofline.sampling_floor_s(size, 1, limits) == pytest.approx(one)
    assert 49 * one < roofline.sampling_floor_s(size, 50, limits) < 50 * one  # text and times once
    steps = roofline.pretrain_evaluations(batch=2, flow_map_rows=1)
    assert steps["ours"] == roofline.Evaluations(4, 2) and steps[
        "peers' formulation"
    ] == roofline.Evaluations(6, 2)
    ours, peers = (roofline.training_floor_s(size, e, limits) for e in steps.values())
    # 14 / 12 if a gradient costs four forwards, 12 / 10 if it costs three: frozen weights are in
    # between.
    assert 14 / 12 < peers / ours < 12 / 10
