"""Draw training times: pairs (t, r) of three kinds, shared out over the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anyflow.utils.rng import rand, resolve_generator
from anyflow.utils.transfer import device_tensor, to_device
from anyflow.utils.validation import SettingError


@dataclass(frozen=True)
class TimePairs:
    """Hold times in [0, 1] before the shift, ``t[B] >= r[B]``, and the kind of each sample.

    Args:
        t, r: ``[B]``.
        is_diffusion: ``[B]`` boolean, true for plain diffusion (r = t).

    Raises:
        ValueError: shapes differ, values leave [0, 1] or are NaN, or r > t (checked on CPU
            tensors).
    """

    t: Tensor
    r: Tensor
    is_diffusion: Tensor
    # kept on the host where they are known: reading the mask would wait for the device
    _indices: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (
            self.t.ndim != 1
            or self.r.shape != self.t.shape
            or self.is_diffusion.shape != self.t.shape
        ):
            shapes = (
                f"t {tuple(self.t.shape)}, r {tuple(self.r.shape)}, is_diffusion "
                f"{tuple(self.is_diffusion.shape)}"
            )
            raise ValueError(f"TimePairs: t, r and is_diffusion must all be [B], got {shapes}")
        if self.is_diffusion.dtype != torch.bool:
            raise ValueError(
                f"TimePairs: is_diffusion must be boolean, got {self.is_diffusion.dtype}"
            )
        if self.t.device.type == "cpu":
            inside = (self.r >= 0) & (self.t <= 1) & (self.t >= self.r)  # false for NaN
            if not bool(inside.all()):
                raise ValueError(
                    f"TimePairs: need 0 <= r <= t <= 1, got t={self.t.tolist()}, "
                    f"r={self.r.tolist()}"
                )
            if bool((self.is_diffusion & (self.t != self.r)).any()):
                raise ValueError("TimePairs: diffusion samples must have r = t")

    def flow_map_indices(self) -> Tensor:
        """Return the indices ``[n]`` of the samples that are no plain diffusion, on t's device."""
        if self._indices is None:
            return (~self.is_diffusion).nonzero().flatten()
        return device_tensor(self._indices, torch.long, self.t.device)

    def select(self, samples: Sequence[int], device: torch.device | str) -> TimePairs:
        """Return the pairs of these samples, in this order, on ``device``."""
        index = device_tensor(samples, torch.long, self.t.device)
        kinds = self.is_diffusion[index]
        chosen = TimePairs(*(to_device(x, device) for x in (self.t[index], self.r[index], kinds)))
        chosen._know_indices(kinds.tolist())
        return chosen

    def diffusion_first(self) -> list[int]:
        """Order all samples, as indices: first plain diffusion, then the others."""
        kinds = self.is_diffusion.tolist()
        return sorted(range(len(kinds)), key=lambda i: not kinds[i])

    def _know_indices(self, kinds: Sequence[bool]) -> None:
        """Keep the result of ``flow_map_indices`` on the host.

        The indices are no argument, which dataclasses.replace() would carry over to other times.
        """
        object.__setattr__(
            self, "_indices", tuple(b for b, is_diffusion in enumerate(kinds) if not is_diffusion)
        )


def sample_time_pairs(
    batch_size: int,
    *,
    diffusion_ratio: float = 0.5,
    consistency_ratio: float = 0.25,
    rank: int = 0,
    world_size: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    offset: int = 0,
    uniforms: Tensor | None = None,
) -> TimePairs:
    """Draw ``t, r = max, min`` of two uniforms, then fix r for two kinds of samples.

    With N = world_size * batch_size samples and the global index
    ``i = (b * world_size + rank + offset) mod N``, which interleaves ranks, the first
    ``round(diffusion_ratio * N)`` get r = t, the next ``round(consistency_ratio * N)`` get r = 0,
    and the rest keep both.

    Args:
        batch_size: samples on this rank.
        diffusion_ratio: share of r = t samples of the global batch.
        consistency_ratio: share of r = 0 samples.
        rank, world_size: this rank, and the number of ranks.
        generator: explicit source; None seeds a fresh one from the operating system.
        device: where the result goes.
        offset: rotates i, so that with one sample per rank no rank is stuck with one kind; pass the
            step number.
        uniforms: ``[2, B]`` in [0, 1), of which t is the larger and r the smaller; drawn when None.

    Raises:
        ValueError: a ratio is outside [0, 1] or they sum to more than 1, or sizes are not positive.
    """
    check_ratios(diffusion_ratio, consistency_ratio)
    if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"need batch_size >= 1 and 0 <= rank < world_size, got batch_size={batch_size}, "
            f"rank={rank}, world_size={world_size}"
        )
    total = batch_size * world_size
    diffusion = round(diffusion_ratio * total)
    consistency = min(round(consistency_ratio * total), total - diffusion)
    index = [(b * world_size + rank + offset) % total for b in range(batch_size)]

    generator = resolve_generator(generator, device)
    target = device or generator.device
    uniforms = (
        rand((2, batch_size), generator, target)
        if uniforms is None
        else to_device(uniforms, target)
    )
    t, r = uniforms.amax(0), uniforms.amin(0)
    is_diffusion = device_tensor([i < diffusion for i in index], torch.bool, target)
    is_consistency = device_tensor(
        [diffusion <= i < diffusion + consistency for i in index], torch.bool, target
    )
    r = torch.where(is_diffusion, t, torch.where(is_consistency, torch.zeros_like(r), r))
    pairs = TimePairs(t, r, is_diffusion)
    pairs._know_indices([i < diffusion for i in index])
    return pairs


def check_ratios(diffusion_ratio: float, consistency_ratio: float) -> None:
    """Raise a SettingError unless both ratios are in [0, 1] and sum to at most 1."""
    for name, ratio in (
        ("diffusion_ratio", diffusion_ratio),
        ("consistency_ratio", consistency_ratio),
    ):
        if not 0 <= ratio <= 1:
            raise SettingError(name, f"must be in [0, 1], got {ratio}")
    if diffusion_ratio + consistency_ratio > 1 + 1e-9:
        raise SettingError(
            "diffusion_ratio",
            "must not exceed 1 together with consistency_ratio, got "
            f"{diffusion_ratio} + {consistency_ratio}",
        )
