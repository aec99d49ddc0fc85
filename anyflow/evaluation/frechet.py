"""Compute the Fréchet distance between two sets of features."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Compute the squared Fréchet (2-Wasserstein) distance of Gaussians fitted to features.

    The features are ``[N, D]`` and ``[M, D]``, and the distance is
    ``|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2))`` with the unbiased covariances A and B, in
    float64. With ``A = R_a^T R_a`` (R from the QR factorization of the centered features) the last
    trace is the nuclear norm of ``R_a R_b^T``: no matrix square root, exact for rank-deficient
    covariances, zero for equal inputs up to rounding.

    Raises ``ValueError`` for inputs that are not matrices of equal width, fewer than two rows, or
    NaN and infinity.
    """
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2:
            raise ValueError(f"{name} must be [N, D], got shape {tuple(features.shape)}")
        if features.shape[0] < 2:
            raise ValueError(
                f"{name} needs at least 2 samples for a covariance, got {features.shape[0]}"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} contains NaN or infinity")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"features must have equal width, got {features_a.shape[1]} and {features_b.shape[1]}"
        )
    mean_a, root_a = _mean_and_root(features_a)
    mean_b, root_b = _mean_and_root(features_b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (
        (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    )
    return max(distance.item(), 0.0)


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ``[D]`` and a matrix R with ``R^T R`` the unbiased covariance, in float64."""
    features = features.double()
    mean = features.mean(0)
    centered = (features - mean) / math.sqrt(features.shape[0] - 1)
    return mean, torch.linalg.qr(centered, mode="r").R
