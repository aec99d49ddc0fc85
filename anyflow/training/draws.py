"""Make every draw of a run a function of its purpose, so that a resumed run repeats it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from anyflow.utils.transfer import to_device


def draw_seed(*parts: int | str) -> int:
    """Return 64 bits of BLAKE2b over the parts joined by ``/``.

    Torch's CPU generator uses the lower 32 bits.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def draw_generator(seed: int, purpose: str, step: int = 0, sample: int = 0) -> torch.Generator:
    """Make the generator of one purpose, update (from 0) and sample of its global batch.

    The generator is on the CPU, so that devices agree, and knows neither ranks nor micro-steps, so
    that layouts do.
    """
    return torch.Generator().manual_seed(draw_seed(seed, purpose, step, sample))


class SampleDraws:
    """Draw for some samples of an update, from a generator for each sample and purpose.

    Args:
        seed: seed of the run.
        step: number of the update, from 0.
        samples: places in the update's global batch.
        device: where draws go.
    """

    def __init__(self, seed: int, step: int, samples: Sequence[int], device: torch.device) -> None:
        self._seed, self._step, self._samples, self._device = seed, step, tuple(samples), device

    def normal(
        self, purpose: str, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draw standard normal numbers ``[B, *shape]``."""
        return self._stack(purpose, lambda g: torch.randn(tuple(shape), generator=g, dtype=dtype))

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Draw uniform fp32 numbers in [0, 1), ``[B, *shape]``."""
        return self._stack(purpose, lambda g: torch.rand(tuple(shape), generator=g))

    def _stack(self, purpose: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        drawn = [
            draw(draw_generator(self._seed, purpose, self._step, sample))
            for sample in self._samples
        ]
        return to_device(torch.stack(drawn), self._device)
