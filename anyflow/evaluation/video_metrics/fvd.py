"""Compute the Fréchet video distance between two sets, on features of an I3D network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anyflow.evaluation.frechet import frechet_distance
from anyflow.evaluation.video_metrics.models import I3D, model_problem
from anyflow.evaluation.video_metrics.values import levels, unit_videos
from anyflow.utils.documents import require_content, shortened
from anyflow.utils.validation import brief, require_whole

LEAST_FRAMES = 10  # the network's strides leave nothing of fewer


class I3DFeatures:
    """Compute the features that the Fréchet video distance is defined on.

    The network is the I3D of Kinetics-400 in the TorchScript file of StyleGAN-V (Skorokhodov et al.
    2022), which reproduces the original one of TensorFlow Hub. The network is called as in
    StyleGAN-V: ``detector(videos, rescale=True, resize=True, return_features=True)`` with videos
    ``[B, 3, F, H, W]`` uint8, which it resizes to 224 x 224 itself. A TorchScript file is a
    program: load one that you trust.

    Args:
        file: ``i3d_torchscript.pt``; ``model_path("fvd")`` is the usual one. Nothing is downloaded.
        device: device of the network.

    Raises:
        ValueError: the file is missing, or no TorchScript file.
    """

    def __init__(self, file: Path | str, *, device: str | torch.device = "cpu") -> None:
        path = Path(file)
        problem = model_problem("the Fréchet video distance", I3D, path)
        if problem is not None:
            raise ValueError(problem)
        require_content(path)
        try:
            self._detector = torch.jit.load(str(path), map_location="cpu").eval().to(device)
        except RuntimeError as error:
            reason = brief(" ".join(str(error).split()), 300)
            raise ValueError(f"{shortened(path)} is no TorchScript file: {reason}") from error
        self._path, self._device = path, torch.device(device)

    @torch.inference_mode()
    def __call__(self, videos: Tensor, *, batch_size: int = 4) -> Tensor:
        """Compute the features of each video.

        Args:
            videos: ``[N, F, C, H, W]`` with F >= 10, floating-point in [0, 1] or uint8; C is 1 or
                3.
            batch_size: videos in one call of the network.

        Returns:
            ``[N, D]`` float32 on the CPU; D is 400 for the published file.

        Raises:
            ValueError: too few frames, a batch size below 1, videos of another shape, dtype or
                range, or a file whose network is called otherwise or gives something else.
        """
        frames = levels(unit_videos(videos, least_frames=LEAST_FRAMES))
        require_whole("batch_size", batch_size)
        channels_first = frames.expand(-1, -1, 3, -1, -1).transpose(1, 2)
        return torch.cat(
            [self._features(piece.contiguous()) for piece in channels_first.split(batch_size)]
        )

    def _features(self, videos: Tensor) -> Tensor:
        try:
            found = self._detector(
                videos.to(self._device), rescale=True, resize=True, return_features=True
            )
        except RuntimeError as error:
            reason = brief(" ".join(str(error).split())[-300:], 300)
            raise ValueError(f"the network in {shortened(self._path)} failed: {reason}") from error
        if not isinstance(found, Tensor) or found.numel() == 0 or found.numel() % len(videos):
            raise ValueError(f"the network in {shortened(self._path)} must give features [B, D]")
        features = (
            found.float().cpu().reshape(len(videos), -1)
        )  # the network gives [D] for one video
        if not torch.isfinite(features).all():
            raise ValueError(f"the network in {shortened(self._path)} gives NaN or infinity")
        return features


def frechet_video_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Compute the Fréchet video distance of two sets (Unterthiner et al. 2018, arXiv 1812.01717).

    The distance is :func:`anyflow.evaluation.frechet_distance` of the sets' I3D features. Its bias
    falls with the number of videos: compare values at equal numbers only; StyleGAN-V takes 2048.
    The order of the sets does not matter.

    Args:
        features_a: ``[N, D]`` of :class:`I3DFeatures`, N >= 2.
        features_b: ``[M, D]``, M >= 2.

    Returns:
        The distance; lower is closer, 0 for equal sets.

    Raises:
        ValueError: another shape, fewer than two videos, or NaN or infinity.
    """
    return frechet_distance(features_a, features_b)
