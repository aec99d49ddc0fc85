"""Render moving shapes: a procedural, class-conditional video set that is learned in minutes.

Each video shows one soft-edged shape that moves at constant speed over a torus (what leaves on one
side comes back on the other). The class fixes the shape and the direction, the position is uniform
over the ``size * size`` pixel centers. The set is finite (its :meth:`MovingShapes.templates`), so
both "is this sample a real video?" and "are all positions covered?" have exact answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SHAPES = ("disc", "cross")
_DIRECTIONS = ("right", "down")


@dataclass(frozen=True)
class MovingShapesConfig:
    """Hold the geometry of the set; lengths are in pixels.

    ``radius`` is the disc's radius; ``arm_length`` and ``arm_width`` are the half-length and
    half-width of the two bars of the cross; an edge fades from 1 to 0 over ``softness`` pixels;
    ``speed`` is in pixels per frame. Raises ``ValueError`` for sizes below 1, non-finite lengths,
    or a shape that would overlap itself on the torus.
    """

    num_frames: int = 8
    size: int = 12
    radius: float = 2.5
    arm_length: float = 3.5
    arm_width: float = 1.0
    softness: float = 4.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_frames", "size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        for name in ("radius", "arm_length", "arm_width", "softness"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a finite number of pixels > 0, got {value!r}")
        if not math.isfinite(self.speed):
            raise ValueError(
                f"speed must be a finite number of pixels per frame, got {self.speed!r}"
            )
        if self.arm_width > self.arm_length:
            raise ValueError(
                f"arm_width ({self.arm_width}) must not exceed arm_length ({self.arm_length})"
            )
        extent = 2 * max(self.radius, self.arm_length) + self.softness
        if extent > self.size:
            raise ValueError(
                f"shapes span {extent:g} pixels and would overlap themselves: size must be >= "
                f"{extent:g}, "
                f"got {self.size}"
            )


class MovingShapes:
    """Render and sample the set that ``config`` describes, and list all its videos.

    Videos are ``[N, F, 1, H, W]`` float32, shifted and scaled by :attr:`mean` and :attr:`std`
    (those of all gray levels of the whole set, known exactly because it is finite) to zero mean and
    unit variance.
    """

    def __init__(self, config: MovingShapesConfig | None = None) -> None:
        self.config = MovingShapesConfig() if config is None else config
        self.class_names = tuple(
            f"{shape} {direction}" for shape in _SHAPES for direction in _DIRECTIONS
        )
        labels, positions = self._bank()
        grays = self._gray(labels, positions.double())
        self.mean = grays.mean().item()
        self.std = grays.std(correction=0).item()

    @property
    def num_classes(self) -> int:
        """Return the number of classes (4)."""
        return len(self.class_names)

    def render(self, labels: Tensor, positions: Tensor) -> Tensor:
        """Draw ``labels[N]`` (int64) with centers at ``positions[N, 2]`` in the first frame.

        Positions are (row, column) in pixels; they wrap around and may be fractional. Returns ``[N,
        F, 1, H, W]`` float32 on the labels' device. Raises ``ValueError`` for wrong shapes or
        dtypes, labels out of range, and positions that are not finite.
        """
        self._check_labels(labels)
        if positions.shape != (labels.shape[0], 2):
            raise ValueError(
                f"positions must be [{labels.shape[0]}, 2] to match labels, got "
                f"{tuple(positions.shape)}"
            )
        positions = positions.to(device=labels.device, dtype=torch.float32)
        if not torch.isfinite(positions).all():
            raise ValueError("positions must be finite")
        return ((self._gray(labels, positions) - self.mean) / self.std).unsqueeze(2)

    def sample(
        self, n: int, generator: torch.Generator, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` videos with uniform whole-pixel positions and uniform or given labels.

        Labels are given as ``[n]`` int64. Returns ``(videos[n, F, 1, H, W], labels[n])`` on the
        generator's device. Only ``generator`` is consumed.
        """
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        device = generator.device
        if labels is None:
            labels = torch.randint(self.num_classes, (n,), generator=generator, device=device)
        elif labels.shape != (n,):
            raise ValueError(f"labels must be [{n}], got {tuple(labels.shape)}")
        labels = labels.to(device)
        positions = torch.randint(self.config.size, (n, 2), generator=generator, device=device)
        return self.render(labels, positions), labels

    def templates(self) -> Tensor:
        """Return every video of the set, ``[num_classes, size*size, F, 1, H, W]``.

        Number i of a class starts at ``divmod(i, size)``.
        """
        labels, positions = self._bank()
        return self.render(labels, positions).unflatten(0, (self.num_classes, -1))

    def to_uint8(self, video: Tensor) -> Tensor:
        """Turn ``[N, F, 1, H, W]`` floats into ``[N, F, H, W]`` uint8 gray levels, clipped."""
        if video.ndim != 5 or video.shape[2] != 1:
            raise ValueError(f"video must be [N, F, 1, H, W], got shape {tuple(video.shape)}")
        gray = (video[:, :, 0].float() * self.std + self.mean).clamp(0, 1)
        return (gray * 255).round().to(torch.uint8)

    def _bank(self) -> tuple[Tensor, Tensor]:
        """Return labels ``[N]`` and positions ``[N, 2]`` of all N videos of the set."""
        size = self.config.size
        index = torch.arange(size * size)
        positions = torch.stack([index // size, index % size], dim=1).repeat(self.num_classes, 1)
        return torch.arange(self.num_classes).repeat_interleave(size * size), positions

    def _check_labels(self, labels: Tensor) -> None:
        if labels.ndim != 1 or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be [N] int64, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < self.num_classes):
            raise ValueError(
                f"labels must lie in 0..{self.num_classes - 1}, got "
                f"{int(labels.min())}..{int(labels.max())}"
            )

    def _gray(self, labels: Tensor, positions: Tensor) -> Tensor:
        """Return gray levels in [0, 1], ``[N, F, H, W]`` in the dtype of ``positions``."""
        cfg, dtype, device = self.config, positions.dtype, positions.device
        travel = torch.arange(cfg.num_frames, dtype=dtype, device=device) * cfg.speed
        down = (labels % len(_DIRECTIONS)).to(dtype)
        step = torch.stack([down, 1 - down], dim=1)
        centers = positions[:, None] + travel[:, None] * step[:, None]  # [N, F, 2]
        grid = torch.arange(cfg.size, dtype=dtype, device=device)
        half = cfg.size / 2
        # [N, F, 2, size]
        offset = torch.remainder(grid - centers[..., None] + half, cfg.size).sub_(half).abs_()
        dy, dx = offset[:, :, 0, :, None], offset[:, :, 1, None, :]
        disc = self._soften(cfg.radius - (dy * dy + dx * dx).sqrt_())
        along, across = self._soften(cfg.arm_length - offset), self._soften(cfg.arm_width - offset)
        cross = torch.maximum(
            along[:, :, 0, :, None] * across[:, :, 1, None, :],
            across[:, :, 0, :, None] * along[:, :, 1, None, :],
        )
        return torch.where((labels // len(_DIRECTIONS) == 0)[:, None, None, None], disc, cross)

    def _soften(self, inside: Tensor) -> Tensor:
        """Map distances inside an edge (pixels, negative outside) to gray levels by a ramp."""
        return (inside / self.config.softness + 0.5).clamp_(0, 1)
