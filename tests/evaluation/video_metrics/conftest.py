"""Make videos whose motion is known exactly."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def moving_texture() -> Callable[..., Tensor]:
    """Make a smooth random texture that moves by (right, down) pixels per frame.

    The result is ``[1, F, 1, H, W]`` float64.

    The texture is band-limited and moves by phases of its Fourier transform, so that positions
    between pixels are exact. It is a part of a larger periodic one: new content enters at the
    border, as in a real video.
    """

    def make(
        right: float,
        down: float,
        size: tuple[int, int] = (48, 64),
        frames: int = 3,
        seed: int = 0,
        blur: float = 2.5,
    ) -> Tensor:
        height, width = (side + 64 for side in size)
        generator = torch.Generator().manual_seed(seed)
        fy, fx = torch.fft.fftfreq(height).double()[:, None], torch.fft.fftfreq(width).double()
        spectrum = torch.fft.fft2(
            torch.randn(height, width, generator=generator, dtype=torch.float64)
        )
        spectrum = spectrum * torch.exp(-2 * (math.pi * blur) ** 2 * (fx**2 + fy**2))
        phases = [torch.exp(-2j * math.pi * i * (fx * right + fy * down)) for i in range(frames)]
        video = torch.stack([torch.fft.ifft2(spectrum * phase).real for phase in phases])
        video = (video - video.min()) / (video.max() - video.min())
        return video[None, :, None, 32:-32, 32:-32].contiguous()

    return make
