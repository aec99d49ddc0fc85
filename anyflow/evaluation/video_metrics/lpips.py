"""Measure the perceptual distance of videos to references by LPIPS."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anyflow.evaluation.video_metrics.models import (
    ALEXNET,
    missing_package,
    model_problem,
    package_problem,
)
from anyflow.evaluation.video_metrics.pixels import psnr
from anyflow.evaluation.video_metrics.values import require_equal_shapes, unit_videos
from anyflow.utils.documents import require_content, shortened
from anyflow.utils.packages import is_missing
from anyflow.utils.validation import require_whole

LEAST_SIDE = 31  # pixels, below which AlexNet's second pooling has nothing to pool


class Lpips:
    """Measure the perceptual distance to references, LPIPS (Zhang et al. 2018, arXiv 1801.03924).

    The network is AlexNet with the linear weights of version 0.1, as in the ``lpips`` package, in
    the implementation of torchmetrics, which has those weights in it. AlexNet's come from a file.

    Args:
        file: weights of AlexNet, named ``alexnet-owt-7be5be79.pth`` in a folder ``checkpoints``;
            ``model_path("lpips")`` is the usual one. Nothing is downloaded.
        device: device of the network.

    Raises:
        ImportError: torchmetrics or torchvision is missing or does not import.
        ValueError: the file is missing, is not such weights, or has another name or folder.
    """

    def __init__(self, file: Path | str, *, device: str | torch.device = "cpu") -> None:
        packages = ("torchmetrics", "torchvision")
        problems = [
            missing_package("LPIPS", package) for package in packages if is_missing(package)
        ]
        problems = problems or [
            p for package in packages if (p := package_problem("LPIPS", package)) is not None
        ]
        if problems:
            raise ImportError(problems[0])
        path = Path(file)
        problem = model_problem("LPIPS", ALEXNET, path)
        if problem is not None:
            raise ValueError(problem)
        expected = Path(ALEXNET.path)
        if (path.parent.name, path.name) != (expected.parent.name, expected.name):
            raise ValueError(
                f"torchvision loads AlexNet from {expected.parent.name}/{expected.name} only, got "
                f"{shortened(path)}"
            )
        self._network = _load(path).to(device)
        self._device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, videos: Tensor, references: Tensor, *, batch_size: int = 16) -> Tensor:
        """Compute the distance of each video to its reference: the mean over frames of LPIPS.

        Args:
            videos: ``[N, F, C, H, W]`` with H, W >= 31, floating-point in [0, 1] or uint8; C is 1
                or 3.
            references: videos of the same shape.
            batch_size: pairs of frames in one call of the network.

        Returns:
            ``[N]`` float32 on the CPU; lower is closer, 0 for equal videos.

        Raises:
            ValueError: shapes that differ, a batch size below 1, or videos of another shape, dtype
                or range.
        """
        first = unit_videos(videos, least_side=LEAST_SIDE)
        second = unit_videos(references, "references", least_side=LEAST_SIDE)
        require_equal_shapes(first, second)
        require_whole("batch_size", batch_size)
        pairs = zip(_rgb_frames(first, batch_size), _rgb_frames(second, batch_size), strict=True)
        distances = [
            self._network(a.to(self._device), b.to(self._device), normalize=True).flatten().cpu()
            for a, b in pairs
        ]
        return torch.cat(distances).view(first.shape[:2]).mean(dim=1)


def video_reference_metrics(
    videos: Tensor, references: Tensor, *, lpips: Lpips | None = None, batch_size: int = 16
) -> dict[str, Tensor]:
    """Compare videos with references, such as the same model's videos of 50 steps.

    Args:
        videos: ``[N, F, C, H, W]``, floating-point in [0, 1] or uint8; C is 1 or 3.
        references: videos of the same shape.
        lpips: computes LPIPS, which is left out without it.
        batch_size: pairs of frames in one call of the network.

    Returns:
        ``psnr`` ``[N]`` in dB, see :func:`psnr`; and with ``lpips`` its distances ``[N]``.

    Raises:
        ValueError: see :func:`psnr` and :class:`Lpips`.
    """
    found = {"psnr": psnr(videos, references)}
    if lpips is not None:
        found["lpips"] = lpips(videos, references, batch_size=batch_size)
    return found


def _rgb_frames(videos: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    return videos.float().flatten(0, 1).expand(-1, 3, -1, -1).split(batch_size)


def _load(path: Path) -> torch.nn.Module:
    """Build the network of torchmetrics with AlexNet's weights from a file that torch.hub finds."""
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    require_content(path)
    try:
        # which torch.hub's loading is not
        weights = torch.load(path, map_location="cpu", weights_only=True)
        if "features.0.weight" not in weights:
            raise ValueError("it has no features.0.weight")
    except Exception as error:  # pickle, zipfile and torch raise errors of many kinds
        raise ValueError(f"{shortened(path)} is no file of AlexNet's weights: {error}") from error
    folder = torch.hub.get_dir()
    torch.hub.set_dir(path.parent.parent)
    try:
        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    except RuntimeError as error:  # keys or shapes do not fit
        raise ValueError(f"{shortened(path)} is no file of AlexNet's weights: {error}") from error
    finally:
        torch.hub.set_dir(folder)
    return metric.net
