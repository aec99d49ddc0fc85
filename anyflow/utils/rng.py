"""Draw random values from explicit generators, never from the global one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyflow.utils.transfer import to_device


def resolve_generator(
    generator: torch.Generator | None, device: torch.device | str | None = None
) -> torch.Generator:
    """Return the generator given, or one on ``device`` seeded from the operating system."""
    if generator is not None:
        return generator
    fresh = torch.Generator("cpu" if device is None else device)
    fresh.seed()
    return fresh


def randn_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw normal values of the shape, dtype and device of ``like``, on the generator's device."""
    g = resolve_generator(generator, like.device)
    return to_device(
        torch.randn(like.shape, generator=g, device=g.device, dtype=like.dtype), like.device
    )


def rand(
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw uniform fp32 values in [0, 1) on the generator's device, and copy them to ``device``."""
    g = resolve_generator(generator, device)
    values = torch.rand(tuple(shape), generator=g, device=g.device)
    return to_device(values, g.device if device is None else device)
