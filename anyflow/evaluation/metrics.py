"""Measure sample quality by Fréchet distance, template error, position coverage and motion.

Layout of videos is ``[N, F, C, H, W]`` throughout; labels are ``[N]`` int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyflow.evaluation.frechet import frechet_distance
from anyflow.evaluation.video_metrics import motion

# per class; more would cost more time than all other metrics
_MOTION_VIDEOS = 16


@dataclass(frozen=True)
class Metrics:
    """Hold the numbers of one set of videos; lower is better in all but ``motion``.

    Args:
        fd: per-class Frechet distance (mean over the classes); lower is better.
        template_mse: mean squared distance per pixel to the nearest real video of the same class,
            in units of the data's variance; lower is better.
        coverage_tv: total variation distance in [0, 1] between the positions found and the uniform
            distribution; lower is better.
        motion: mean speed of what can be seen to move, in pixels per frame
            (:func:`anyflow.evaluation.video_metrics.motion`, over the first 16 videos of each
            class); to be compared with that of real videos. None where it was not measured.
    """

    fd: float
    template_mse: float
    coverage_tv: float
    motion: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Return the numbers as ``metrics.json`` holds them, without motion if not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def mean(cls, scores: Sequence[Metrics]) -> Metrics:
        """Return the mean of each number over ``scores``; motion is None where a score has none."""
        if not scores:
            raise ValueError("scores must hold at least one set's metrics")
        motion = [score.motion for score in scores if score.motion is not None]
        return cls(
            fd=_mean([score.fd for score in scores]),
            template_mse=_mean([score.template_mse for score in scores]),
            coverage_tv=_mean([score.coverage_tv for score in scores]),
            motion=_mean(motion) if len(motion) == len(scores) else None,
        )


class RandomConv3dFeatures(nn.Module):
    """Compute fixed random features of videos, ``dim`` numbers of each.

    Two ReLU convolutions over space-time are averaged.

    Random convolutions react to sharpness, contrast,
    shape and the direction of motion, and unlike a trained network they need no download. The
    global average makes them nearly blind to position, which :func:`coverage_tv` measures instead.
    The same ``seed`` gives the same weights on every machine; the global random state is not
    touched.

    ``forward(videos[N, F, C, H, W]) -> [N, dim]`` float32. Needs F, H, W >= 2.
    """

    conv1_weight: Tensor
    conv1_bias: Tensor
    conv2_weight: Tensor
    conv2_bias: Tensor

    def __init__(
        self, in_channels: int = 1, dim: int = 16, *, hidden_dim: int = 16, seed: int = 0
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("dim", dim), ("hidden_dim", hidden_dim)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.in_channels, self.dim = in_channels, dim
        generator = torch.Generator().manual_seed(seed)
        for name, fan_in, width in (("conv1", in_channels, hidden_dim), ("conv2", hidden_dim, dim)):
            weight = torch.randn(width, fan_in, 3, 3, 3, generator=generator) * math.sqrt(
                2 / (27 * fan_in)
            )
            self.register_buffer(f"{name}_weight", weight)
            self.register_buffer(f"{name}_bias", torch.randn(width, generator=generator) * 0.3)

    @torch.no_grad()
    def forward(self, videos: Tensor) -> Tensor:
        """Return features ``[N, dim]`` of ``videos[N, F, C, H, W]``.

        Raises ``ValueError`` for another shape.
        """
        if (
            videos.ndim != 5
            or videos.shape[2] != self.in_channels
            or min(videos.shape[1], *videos.shape[3:]) < 2
        ):
            raise ValueError(
                f"videos must be [N, F, {self.in_channels}, H, W] with F, H, W >= 2, got shape "
                f"{tuple(videos.shape)}"
            )
        x = videos.transpose(1, 2).to(self.conv1_weight.dtype)
        x = F.relu(F.conv3d(x, self.conv1_weight, self.conv1_bias, padding=1))
        x = F.relu(F.conv3d(F.avg_pool3d(x, 2), self.conv2_weight, self.conv2_bias, padding=1))
        return x.mean(dim=(2, 3, 4))


def per_class_frechet_distance(
    features_a: Tensor, labels_a: Tensor, features_b: Tensor, labels_b: Tensor
) -> float:
    """Average :func:`frechet_distance` over the classes, each between samples of that class.

    Unlike one distance over all classes, the mean notices a sample of the wrong class. Raises
    ``ValueError`` when the two sets do not hold the same classes.
    """
    _check_labels(features_a, labels_a, "features_a", "labels_a")
    _check_labels(features_b, labels_b, "features_b", "labels_b")
    classes = labels_a.unique().tolist()
    if classes != labels_b.unique().tolist():
        raise ValueError(
            f"both sets need the same classes, got {classes} and {labels_b.unique().tolist()}"
        )
    if not classes:
        raise ValueError("both sets are empty")
    distances = [
        frechet_distance(features_a[labels_a == c], features_b[labels_b == c]) for c in classes
    ]
    return sum(distances) / len(distances)


def nearest_template(videos: Tensor, labels: Tensor, templates: Tensor) -> Tensor:
    """Return the index ``[N]`` of the template of the same class nearest to each video.

    Distance is the mean square over a video of ``videos[N, F, C, H, W]``. ``templates`` is
    ``[num_classes, P, F, C, H, W]``. Raises ``ValueError`` for mismatched shapes, labels out of
    range, and NaN or infinity.
    """
    _check_labels(videos, labels, "videos", "labels")
    if (
        templates.ndim != videos.ndim + 1
        or templates.shape[2:] != videos.shape[1:]
        or templates.shape[1] == 0
    ):
        raise ValueError(
            f"templates must be [num_classes, P >= 1, ...] over videos {tuple(videos.shape[1:])}, "
            f"got shape {tuple(templates.shape)}"
        )
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < templates.shape[0]):
        raise ValueError(
            f"labels must lie in 0..{templates.shape[0] - 1}, the classes of templates"
        )
    if not torch.isfinite(videos).all():
        raise ValueError("videos contain NaN or infinity")
    flat, bank = videos.flatten(1), templates.flatten(2)
    index = torch.empty_like(labels)
    for c in labels.unique().tolist():
        picked = labels == c
        # |a - b|^2 without |a|^2, which does not change the order
        index[picked] = (bank[c].square().sum(1) - 2 * flat[picked] @ bank[c].T).argmin(dim=1)
    return index


def nearest_template_mse(videos: Tensor, labels: Tensor, templates: Tensor) -> float:
    """Return the mean squared difference to the nearest template of the class, averaged.

    Shapes and errors are those of :func:`nearest_template`; an empty set is a ``ValueError`` too.
    """
    if videos.shape[0] == 0:
        raise ValueError("videos must hold at least one video")
    return _template_mse(videos, labels, templates, nearest_template(videos, labels, templates))


def coverage_tv(indices: Tensor, labels: Tensor, grid: tuple[int, int], *, bins: int = 3) -> float:
    """Return the total variation distance of positions from uniform, averaged over classes.

    ``indices[N]`` number positions on ``grid`` = (rows, columns) in row-major order, as
    :func:`nearest_template` returns them; they are counted on ``bins x bins`` cells. 0 is perfectly
    even, ``1 - 1/bins^2`` is everything in one cell. Even perfect samples score above 0, about
    ``0.4 * bins / sqrt(N per class)``, so compare with real data.

    Raises ``ValueError`` for an empty set, indices outside the grid, or a grid that ``bins`` does
    not divide.
    """
    rows, columns = grid
    if bins < 1 or rows < 1 or columns < 1 or rows % bins or columns % bins:
        raise ValueError(f"bins ({bins}) must be >= 1 and divide both sides of grid {grid}")
    _check_labels(indices, labels, "indices", "labels")
    if indices.ndim != 1 or indices.numel() == 0:
        raise ValueError(f"indices must be [N] with N >= 1, got shape {tuple(indices.shape)}")
    if not (0 <= int(indices.min()) and int(indices.max()) < rows * columns):
        raise ValueError(
            f"indices must lie in 0..{rows * columns - 1}, got "
            f"{int(indices.min())}..{int(indices.max())}"
        )
    cell = (indices // columns) // (rows // bins) * bins + (indices % columns) // (columns // bins)
    distances = []
    for c in labels.unique().tolist():
        share = torch.bincount(cell[labels == c], minlength=bins * bins).double()
        distances.append(0.5 * (share / share.sum() - 1 / (bins * bins)).abs().sum().item())
    return sum(distances) / len(distances)


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Turn videos and labels into :class:`Metrics`, against held-out real videos.

    Build an evaluator with :meth:`from_videos`. ``heldout_features[M, D]`` are standardized by
    ``feature_mean[D]`` and ``feature_std[D]``, their own statistics over all classes, which gives
    the Frechet distance its unit. ``black_white`` are the values of black and white in the videos;
    without them, motion is not measured.
    """

    extractor: nn.Module
    heldout_features: Tensor
    heldout_labels: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    templates: Tensor
    grid: tuple[int, int]
    bins: int = 3
    black_white: tuple[float, float] | None = None

    @classmethod
    def from_videos(
        cls,
        videos: Tensor,
        labels: Tensor,
        templates: Tensor,
        grid: tuple[int, int],
        *,
        bins: int = 3,
        extractor: nn.Module | None = None,
        black_white: tuple[float, float] | None = None,
    ) -> Evaluator:
        """Make an evaluator from held-out videos and the templates of their classes.

        The videos are ``[M, F, C, H, W]`` and the templates ``[num_classes, rows*columns, ...]``.
        Templates lie on ``grid`` = (rows, columns) positions in row-major order. ``extractor`` maps
        videos to ``[M, D]`` (default: :class:`RandomConv3dFeatures`). ``black_white`` are two
        values of the videos, such as ``(0.0, 1.0)``: motion is measured between them. Raises
        ``ValueError`` for mismatched shapes, a feature that does not vary over the held-out videos,
        or ``black_white`` that are not finite and ascending.
        """
        if black_white is not None and not -math.inf < black_white[0] < black_white[1] < math.inf:
            raise ValueError(
                f"black_white must be two finite values, black below white, got {black_white}"
            )
        if templates.ndim != videos.ndim + 1 or templates.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"templates must be [num_classes, {grid[0] * grid[1]}, ...] for grid {grid}, "
                f"got shape {tuple(templates.shape)}"
            )
        _check_labels(videos, labels, "videos", "labels")
        if videos.shape[0] < 2:
            raise ValueError(f"held-out videos must be at least 2, got {videos.shape[0]}")
        if extractor is None:
            extractor = RandomConv3dFeatures(videos.shape[2]).to(videos.device)
        features = _features(extractor, videos)
        mean, std = features.mean(0), features.std(0)
        if not (std > 1e-9).all():
            raise ValueError(
                "every feature must vary over the held-out videos; use more, or another extractor"
            )
        return cls(
            extractor,
            (features - mean) / std,
            labels,
            mean,
            std,
            templates,
            grid,
            bins,
            black_white,
        )

    def evaluate(self, videos: Tensor, labels: Tensor) -> Metrics:
        """Return all metrics of ``videos[N, F, C, H, W]``.

        The errors are those of the functions that compute them.
        """
        index = nearest_template(videos, labels, self.templates)
        features = (_features(self.extractor, videos) - self.feature_mean) / self.feature_std
        return Metrics(
            fd=per_class_frechet_distance(
                features, labels, self.heldout_features, self.heldout_labels
            ),
            template_mse=_template_mse(videos, labels, self.templates, index),
            coverage_tv=coverage_tv(index, labels, self.grid, bins=self.bins),
            motion=self._motion(videos, labels),
        )

    def floor(self, real_sets: Iterable[tuple[Tensor, Tensor]]) -> Metrics:
        """Return the mean score of other real sets ``(videos, labels)``.

        A perfect model would score as much with as many samples.
        """
        scores = [self.evaluate(videos, labels) for videos, labels in real_sets]
        if not scores:
            raise ValueError("real_sets must hold at least one (videos, labels) pair")
        return Metrics.mean(scores)

    def _motion(self, videos: Tensor, labels: Tensor) -> float | None:
        if self.black_white is None:
            return None
        black, white = self.black_white
        picked = torch.cat([(labels == c).nonzero()[:_MOTION_VIDEOS, 0] for c in labels.unique()])
        return (
            motion(((videos[picked].float() - black) / (white - black)).clamp(0, 1)).mean().item()
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _features(extractor: nn.Module, videos: Tensor) -> Tensor:
    """Compute features in float64, in pieces that bound the memory of the convolutions."""
    return torch.cat([extractor(piece) for piece in videos.split(256)]).double()


def _template_mse(videos: Tensor, labels: Tensor, templates: Tensor, index: Tensor) -> float:
    return (videos - templates[labels, index]).double().square().mean().item()


def _check_labels(items: Tensor, labels: Tensor, items_name: str, labels_name: str) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64 or labels.shape[0] != items.shape[0]:
        raise ValueError(
            f"{labels_name} must be [{items.shape[0]}] int64 to match {items_name}, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
