"""Choose what can be measured of a run's sampled videos, and measure it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyflow.evaluation.frechet import frechet_distance
from anyflow.evaluation.metrics import RandomConv3dFeatures
from anyflow.evaluation.video_metrics import (
    MAX_PSNR,
    VIDEO_METRICS,
    available_metrics,
    dynamic_degree,
    flicker,
    frechet_video_distance,
    load_network,
    psnr,
    relative_motion,
)

if TYPE_CHECKING:
    from anyflow.training.sample_metrics import MetricsConfig

_PROBE_FRAMES = 16
_LATENT_MOTION, _LATENT_DISTANCE = "latent_motion", "latent_distance"
_LATENT_FRECHET = "latent_frechet_distance"
_TITLES = {
    **{name: metric.title for name, metric in VIDEO_METRICS.items()},
    _LATENT_MOTION: "Motion of latents",
    _LATENT_FRECHET: "Fréchet distance of latents",
}
_NETWORKS = ("clip", "lpips", "fvd")


@dataclass(frozen=True)
class Video:
    """Hold a video, sampled or of the data.

    Args:
        latents: ``[F, C, H, W]`` fp32.
        pixels: ``[1, F', 3, H', W']`` uint8; None where nothing decodes the latents.
        caption: what it should show.
    """

    latents: Tensor
    pixels: Tensor | None
    caption: str


class Measures:
    """Measure a run's sampled videos, as far as its recipe, data and packages allow.

    A video has motion, flicker and, with OpenCV, a dynamic degree; PSNR compares it with the same
    model's video of many steps. Networks in ``metrics.models`` add CLIP similarity, LPIPS and the
    Fréchet video distance to the data's own videos. Where nothing decodes latents, their motion and
    their distance to those of many steps take the place of these. In any case, all latents together
    are compared with the data's by the Fréchet distance of random features.

    Each metric is tried once when it is chosen, so that one that cannot be had is known before
    training.

    Args:
        config: settings of the metrics.
        device: device to measure on.
        latent_shape: ``(F, C, H, W)``.
        pixel_shape: ``(F', H', W')`` of decoded videos; None where nothing decodes.
        num_videos: sampled videos at each number of steps.
        num_real: videos of the data that they are compared with.

    Attributes:
        names: names of the metrics, in the order of reports, and whether a video has it by itself,
            a real one too.
        left_out: a sentence on each metric that cannot be had.
        compares: whether videos are compared with those of many steps.

    Raises:
        ValueError: ``metrics.models`` is no folder.
    """

    def __init__(
        self,
        config: MetricsConfig,
        device: torch.device,
        latent_shape: tuple[int, int, int, int],
        pixel_shape: tuple[int, int, int] | None,
        *,
        num_videos: int,
        num_real: int,
    ) -> None:
        if config.models is not None and not Path(config.models).expanduser().is_dir():
            raise ValueError(f"metrics.models: {config.models} is not a folder")
        self._models, self._device = config.models, device
        self.left_out: list[str] = []
        self._measures: dict[str, Callable[[Video], float]] = {}
        self._comparisons: dict[str, Callable[[Video, Video], float]] = {}
        self._features: dict[str, Callable[[Video], Tensor]] = {}
        self._needed: list[str] = []  # networks
        self._networks: dict[str, Any] = {}
        if pixel_shape is None:
            self._choose_latent_metrics()
        else:
            self._choose_pixel_metrics()
        random_features = RandomConv3dFeatures(latent_shape[1])
        self._features[_LATENT_FRECHET] = lambda video: random_features(video.latents[None])[0]
        if not config.reference_steps:
            self._comparisons.clear()
        if min(num_videos, num_real) < 2:
            self._leave_out_sets(num_videos, num_real)
        self._try(latent_shape, pixel_shape)
        of_one = self._measures
        self.names = {
            name: name in of_one for name in (*of_one, *self._comparisons, *self._features)
        }
        self.compares = bool(self._comparisons)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Have the networks on the device, for one evaluation: training needs its memory.

        Raises:
            ValueError, ImportError: a network cannot be loaded any more.
        """
        self._load(self._needed)
        try:
            yield
        finally:
            self._networks = {}
            if self._needed and self._device.type == "cuda":
                torch.cuda.empty_cache()

    def of_video(self, video: Video, reference: Video | None) -> dict[str, float]:
        """Measure a video, and compare it with another of the same prompt and noise, if given."""
        values = {name: measure(video) for name, measure in self._measures.items()}
        if reference is not None:
            values |= {
                name: compare(video, reference) for name, compare in self._comparisons.items()
            }
        return values

    def features(self, video: Video) -> dict[str, Tensor]:
        """Return the vectors by which sets of videos are compared, on the CPU, by metric."""
        return {name: features(video) for name, features in self._features.items()}

    def of_set(self, metric: str, features: Tensor, real: Tensor) -> float:
        """Compare a set's ``features[N, D]`` with those of real videos, ``[M, D]``."""
        if metric != _LATENT_FRECHET:
            return frechet_video_distance(features, real)
        features, real = features.double(), real.double()
        spread = real.std(0)  # the unit; of what all real videos share there is none
        scale = torch.where(spread > 1e-9, spread, 1.0)
        return frechet_distance(features / scale, real / scale)

    def _choose_pixel_metrics(self) -> None:
        available = available_metrics(self._models)
        self._measures["motion"] = self._motion
        self._measures["flicker"] = lambda video: flicker(_pixels(video)).item()
        if (problem := available["dynamic_degree"]) is None:
            self._measures["dynamic_degree"] = lambda video: dynamic_degree(_pixels(video)).item()
        else:
            self.left_out.append(problem)
        self._comparisons["psnr"] = _psnr
        if self._models is None:
            return
        self._measures["clip"] = lambda video: self._networks["clip"](
            _pixels(video), [video.caption]
        ).item()
        self._comparisons["lpips"] = lambda video, other: self._networks["lpips"](
            _pixels(video), _pixels(other)
        ).item()
        self._features["fvd"] = lambda video: self._networks["fvd"](_pixels(video))[0]
        for name in _NETWORKS:
            if (problem := available[name]) is None:
                self._needed.append(name)
            else:
                self._leave_out(name, problem)

    def _motion(self, video: Video) -> float:
        """Return the mean speed in shorter sides per frame, on the device of the networks."""
        return relative_motion(_pixels(video).to(self._device)).item()

    def _choose_latent_metrics(self) -> None:
        self.left_out.append(
            "metrics of decoded videos need preview.vae; those of latents take their place"
        )
        self._measures[_LATENT_MOTION] = _latent_motion
        self._comparisons[_LATENT_DISTANCE] = _latent_distance

    def _leave_out_sets(self, num_videos: int, num_real: int) -> None:
        for name in list(self._features):
            reason = (
                f"needs two prompts and two videos of the data, there are {num_videos} and "
                f"{num_real}"
            )
            self._leave_out(name, f"{_TITLES[name]} {reason}")

    def _leave_out(self, name: str, sentence: str) -> None:
        for table in (self._measures, self._comparisons, self._features):
            table.pop(name, None)
        self._needed = [needed for needed in self._needed if needed != name]
        self.left_out.append(sentence)

    def _load(self, names: list[str]) -> None:
        self._networks = {
            name: load_network(name, self._models, device=self._device) for name in names
        }

    def _try(
        self, latent_shape: tuple[int, int, int, int], pixel_shape: tuple[int, int, int] | None
    ) -> None:
        """Measure a video of few frames, and leave out what refuses it."""
        generator = torch.Generator().manual_seed(0)
        latents, pixels = torch.randn(latent_shape, generator=generator), None
        if pixel_shape is not None:
            frames, *size = pixel_shape
            shape = (1, min(frames, _PROBE_FRAMES), 3, *size)
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        video = Video(latents, pixels, "a video")
        tries: dict[str, Callable[[], object]] = {
            **{name: partial(measure, video) for name, measure in self._measures.items()},
            **{name: partial(compare, video, video) for name, compare in self._comparisons.items()},
            **{name: partial(features, video) for name, features in self._features.items()},
        }
        for name, attempt in tries.items():
            try:
                self._load([name] if name in self._needed else [])
                attempt()
            except (ValueError, ImportError) as error:
                self._leave_out(name, f"{_TITLES[name]}: {error}")
        self._networks = {}


def _pixels(video: Video) -> Tensor:
    assert video.pixels is not None
    return video.pixels


def _psnr(video: Video, reference: Video) -> float:
    return min(psnr(_pixels(video), _pixels(reference)).item(), MAX_PSNR)


def _latent_motion(video: Video) -> float:
    """Return the mean absolute difference between successive frames of latents.

    The latents' channels have variance 1.
    """
    if len(video.latents) < 2:
        raise ValueError("latents must have two frames at least, got one")
    return video.latents.double().diff(dim=0).abs().mean().item()


def _latent_distance(video: Video, reference: Video) -> float:
    """Return the root of the mean square of the difference of two latents."""
    return (video.latents.double() - reference.latents.double()).square().mean().sqrt().item()
