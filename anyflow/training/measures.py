"""Chooses what can be measured of a run's sampled videos, and measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow.evaluation.metrics import RandomConv3dFeatures, frechet_distance
from anyflow.evaluation.video_metrics import dynamic_degree, flicker, motion, psnr
from anyflow.packages import is_missing, missing
from anyflow.training.config import Recipe
from anyflow.training.distributed import Mesh

_MAX_PSNR = 100.0  # dB; videos that are equal have infinity, which JSON and loggers' charts lack

_OPENCV = "opencv-python-headless"
_MOTION, _FLICKER, _DYNAMIC_DEGREE, _PSNR = "motion", "flicker", "dynamic_degree", "psnr"
_LATENT_MOTION = "latent_motion"
_LATENT_DISTANCE = "latent_distance"
_LATENT_FRECHET = "latent_frechet_distance"


@dataclass(frozen=True)
class Video:
    """Holds a video, sampled or of the data.

    Args:
        latents: ``[F, C, H, W]`` fp32.
        pixels: ``[1, F', 3, H', W']`` uint8; None where nothing decodes the latents.
        caption: what it should show.
    """

    latents: Tensor
    pixels: Tensor | None
    caption: str


Measure = Callable[[Video], float]
Comparison = Callable[[Video, Video], float]
Features = Callable[[Video], Tensor]


class Measures:
    """The metrics of a run's sampled videos, as far as its recipe, its data and the packages installed allow.

    A video has motion, flicker and, with OpenCV, a dynamic degree; PSNR compares it with the same model's video of many
    steps. Where nothing decodes latents, their own motion and their distance to those of many steps take the place of
    these. All videos together are compared with the data's by the Frechet distance of their latents.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        latent_shape: ``(F, C, H, W)``.
        num_videos: at each number of steps.
        num_real: videos of the data that they are compared with.
        has_pixels: videos are decoded.

    Attributes:
        names: of the metrics, in the order of reports, and whether a video has it by itself, a real one too.
        left_out: a sentence on each metric that cannot be had.
        compares: whether videos are compared with those of many steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        latent_shape: tuple[int, ...],
        *,
        num_videos: int,
        num_real: int,
        has_pixels: bool,
    ) -> None:
        self.left_out: list[str] = []
        self._measures: dict[str, Measure] = {}
        self._comparisons: dict[str, Comparison] = {}
        self._features: dict[str, Features] = {}
        self._latent_shape = latent_shape
        if has_pixels:
            self._choose_pixel_metrics(mesh.device)
        else:
            self._choose_latent_metrics()
        if not recipe.metrics.reference_steps:
            self._comparisons = {}
        self._choose_set_metrics(num_videos, num_real)
        of_one = self._measures
        self.names = {name: name in of_one for name in (*of_one, *self._comparisons, *self._features)}
        self.compares = bool(self._comparisons)

    def of_video(self, video: Video, reference: Video | None) -> dict[str, float]:
        """Measure a video, and compare it with another of the same prompt and noise where there is one."""
        values = {name: measure(video) for name, measure in self._measures.items()}
        if reference is not None:
            values |= {name: compare(video, reference) for name, compare in self._comparisons.items()}
        return values

    def features(self, video: Video) -> dict[str, Tensor]:
        """Return the vectors by which sets of videos are compared, on the CPU, by metric."""
        return {name: features(video) for name, features in self._features.items()}

    def of_set(self, metric: str, features: Tensor, real: Tensor) -> float:
        """Compare a set's ``features[N, D]`` with those of real videos, ``[M, D]``."""
        features, real = features.double(), real.double()
        if (
            metric == _LATENT_FRECHET
        ):  # in units of the real videos' spread; features that all of them share tell nothing
            mean, std = real.mean(0), real.std(0)
            varies = std > 1e-9
            features, real = (((x - mean) / std)[:, varies] for x in (features, real))
        return frechet_distance(features, real)

    def _choose_pixel_metrics(self, device: torch.device) -> None:
        if self._latent_shape[0] > 1:
            self._measures[_MOTION] = lambda video: motion(_pixels(video).to(device)).item()
            self._measures[_FLICKER] = lambda video: flicker(_pixels(video)).item()
            if is_missing("cv2"):
                self.left_out.append(missing("dynamic degree", _OPENCV))
            else:
                self._measures[_DYNAMIC_DEGREE] = lambda video: dynamic_degree(_pixels(video)).item()
        else:
            self.left_out.append("motion, flicker and dynamic degree need two frames, the data's videos have one")
        self._comparisons[_PSNR] = lambda video, reference: min(
            psnr(_pixels(video), _pixels(reference)).item(), _MAX_PSNR
        )

    def _choose_latent_metrics(self) -> None:
        if self._latent_shape[0] > 1:
            self._measures[_LATENT_MOTION] = _latent_motion
        else:
            self.left_out.append("latent motion needs two frames of latents, the data's videos have one")
        self._comparisons[_LATENT_DISTANCE] = _latent_distance

    def _choose_set_metrics(self, num_videos: int, num_real: int) -> None:
        frames, channels, *size = self._latent_shape
        if min(frames, *size) < 2:
            self.left_out.append(
                f"{_words(_LATENT_FRECHET)} needs latents of 2 x 2 x 2 at least, the data's are {frames} x "
                f"{' x '.join(map(str, size))}"
            )
        elif min(num_videos, num_real) < 2:
            self.left_out.append(
                f"{_words(_LATENT_FRECHET)} needs two prompts and two videos of the data at least, "
                f"there are {num_videos} and {num_real}"
            )
        else:
            network = RandomConv3dFeatures(channels)
            self._features[_LATENT_FRECHET] = lambda video: network(video.latents[None])[0]


def _pixels(video: Video) -> Tensor:
    assert video.pixels is not None
    return video.pixels


def _latent_motion(video: Video) -> float:
    """Return the mean absolute difference between successive frames of latents, whose channels have variance 1."""
    return video.latents.double().diff(dim=0).abs().mean().item()


def _latent_distance(video: Video, reference: Video) -> float:
    """Return the root of the mean square of the difference of two latents."""
    return (video.latents.double() - reference.latents.double()).square().mean().sqrt().item()


def _words(name: str) -> str:
    return name.replace("_", " ").replace("frechet", "Frechet")
