"""Turn latents into pictures, by a VAE, as synthetic videos, or in false colors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyflow.data import MovingShapes, VideoDataset, pixel_shuffle_3d
from anyflow.formats.hub import local_folder
from anyflow.pipelines.frames import uint8_pixels
from anyflow.pipelines.wan import decode_latents, load_vae
from anyflow.training.distributed import Mesh, main_result

if TYPE_CHECKING:
    from anyflow.training.config import Recipe


class Decoder:
    """Show latents as videos; the VAE of ``preview.vae`` is loaded before the run's networks.

    The VAE stays in the host's memory, and is on the device only while it decodes.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        dataset: gives the number of channels.
        everywhere: every rank decodes, so that each loads the VAE; else the first rank alone.

    Attributes:
        pixel_shape: ``(F', H', W')`` of real videos; None where there are false colors, or this
            rank does not decode.
        fps: frames per second at which the videos are shown.

    Raises:
        ValueError: the VAE cannot be loaded, or has latents of other channels; on every rank.
    """

    def __init__(
        self, recipe: Recipe, mesh: Mesh, dataset: VideoDataset, *, everywhere: bool
    ) -> None:
        self._recipe, self._mesh, self._channels = recipe, mesh, dataset.latent_shape[1]
        self._synthetic = recipe.data.kind == "synthetic"
        self._vae: Any = None
        # Wan2.1's videos have 16 frames per second; latents as they are, and the synthetic videos,
        # are shown slowly.
        self.fps = 8.0 if recipe.preview.vae is None else 16.0
        if recipe.preview.vae is not None:
            main_result(mesh, self._load)
            if everywhere and not mesh.is_main:
                self._load()
        self.pixel_shape = self._pixel_shape(dataset.latent_shape)

    def pixels(self, latents: Tensor) -> Tensor:
        """Show latents ``[N, F, C, H, W]`` as videos ``[N, F', H', W', 3]`` uint8 on the CPU.

        Raises:
            FloatingPointError: the VAE returns NaN or infinity.
            torch.OutOfMemoryError: the device has too little memory left to decode.
        """
        if self._vae is None:
            return _gray(latents) if self._synthetic else _false_colors(latents)
        vae = self._vae.to(self._mesh.device)
        try:
            return torch.cat(
                [uint8_pixels(decode_latents(vae, video[None])).cpu() for video in latents]
            )
        finally:
            vae.clear_cache()  # an error in the middle leaves frames in it, on the device
            self._vae = vae.to("cpu")
            if self._mesh.device.type == "cuda":
                torch.cuda.empty_cache()

    def _pixel_shape(self, latent_shape: tuple[int, int, int, int]) -> tuple[int, int, int] | None:
        frames, _, height, width = latent_shape
        if self._synthetic:
            return 2 * frames, 2 * height, 2 * width
        if self._vae is None:
            return None
        temporal, spatial = (
            self._vae.config.scale_factor_temporal,
            self._vae.config.scale_factor_spatial,
        )
        return 1 + (frames - 1) * temporal, height * spatial, width * spatial

    def _load(self) -> None:
        vae, on_gpu = self._recipe.preview.vae, self._mesh.device.type == "cuda"
        assert vae is not None
        dtype = torch.bfloat16 if on_gpu and self._recipe.precision == "bf16" else torch.float32
        try:
            self._vae = load_vae(local_folder(vae, ("vae/*",)), dtype)
        except ValueError as error:
            raise ValueError(f"preview.vae: {error}") from None
        if self._vae.config.z_dim != self._channels:
            raise ValueError(
                f"preview.vae: the VAE of {vae} has latents of {self._vae.config.z_dim} channels, "
                f"the data {self._channels}"
            )
        self._vae.enable_tiling()  # training has filled the device's memory


def _gray(latents: Tensor) -> Tensor:
    """Show ``[N, F, 8, H, W]`` of the synthetic data as videos ``[N, 2F, 2H, 2W, 3]`` uint8."""
    return MovingShapes().to_uint8(pixel_shuffle_3d(latents))[..., None].expand(-1, -1, -1, -1, 3)


def _false_colors(latents: Tensor) -> Tensor:
    """Show three channels of ``[N, F, C, H, W]``, stretched, as ``[N, F, H, W, 3]`` uint8.

    Each channel is stretched over its values in all videos.
    """
    channels = latents[:, :, [c % latents.shape[2] for c in range(3)]]
    low, high = channels.amin((0, 1, 3, 4), keepdim=True), channels.amax((0, 1, 3, 4), keepdim=True)
    stretched = (channels - low) / (high - low).clamp(min=1e-6)
    return (stretched * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
