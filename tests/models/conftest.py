"""Tiny transformers and random arguments for them, shared by the model's tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 80,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


@dataclass
class Inputs:
    """Arguments of one forward, per frame; ``image`` only for models with an image branch."""

    x: Tensor
    t: Tensor
    r: Tensor
    text: Tensor
    image: Tensor | None

    def tuple(self) -> tuple[Tensor | None, ...]:
        """In the positional order of diffusers' forward."""
        return self.x, self.t, self.r, self.text, self.image


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A configuration with two layers."""
    return dict(TINY)


@pytest.fixture
def make_inputs(generator: torch.Generator) -> Callable[..., Inputs]:
    """``make_inputs(b, f, h, w, image=False, per_sample=False)`` in fp32, times in [0, 1000] with r <= t."""

    def make(
        b: int = 2, f: int = 3, h: int = 4, w: int = 6, *, image: bool = False, per_sample: bool = False
    ) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        t = 1000 * torch.rand(b, f, generator=generator)
        r = t * torch.rand(b, f, generator=generator)
        if per_sample:
            t, r = (v[:, :1].expand(b, f).contiguous() for v in (t, r))
        return Inputs(randn(b, f, 16, h, w), t, r, randn(b, 7, 20), randn(b, 5, 12) if image else None)

    return make


@pytest.fixture
def relative() -> Callable[[Tensor, Tensor], float]:
    """``relative(a, b)``: |a - b| / |b| in fp64."""
    return lambda a, b: ((a.double() - b.double()).norm() / b.double().norm()).item()
