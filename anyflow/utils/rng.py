"""Random draws from explicit generators. Nothing in the library touches the global RNG."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyflow.utils.transfer import to_device


def resolve_generator(
    generator: torch.Generator | None, device: torch.device | str | None = None
) -> torch.Generator:
    """The generator given, or a fresh one on ``device`` seeded from the operating system."""
    if generator is not None:
        return generator
    fresh = torch.Generator(device or "cpu")
    fresh.seed()
    return fresh


def randn_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal of the shape, dtype and device of ``like``, drawn on the generator's
    device.
    """
    g = resolve_generator(generator, like.device)
    return to_device(
        torch.randn(like.shape, generator=g, device=g.device, dtype=like.dtype), like.device
    )


def rand(
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform fp32 in [0, 1) on ``device``, drawn on the generator's device."""
    g = resolve_generator(generator, device)
    return to_device(torch.rand(tuple(shape), generator=g, device=g.device), device or g.device)
