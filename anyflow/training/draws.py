"""Stateless randomness: every draw of a run is a function of what it is for, so a resumed run repeats it."""

from __future__ import annotations

import hashlib

import torch


def draw_seed(*parts: int | str) -> int:
    """64 bits of BLAKE2b over the parts joined by ``/`` (of which torch's CPU generator uses the lower 32)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def draw_generator(seed: int, purpose: str, step: int = 0, micro: int = 0, data_rank: int = 0) -> torch.Generator:
    """The generator of one purpose, update (from 0), micro-step and data rank; on the CPU, so that devices agree."""
    return torch.Generator().manual_seed(draw_seed(seed, purpose, step, micro, data_rank))
