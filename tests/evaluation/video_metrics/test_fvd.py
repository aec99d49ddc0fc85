"""Test the Fréchet video distance against the textbook, and the call of the I3D network."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import Tensor, nn

from anyflow.evaluation.video_metrics import I3DFeatures, frechet_video_distance
from anyflow.evaluation.video_metrics.models import I3D


class _Detector(nn.Module):
    """Stand in for StyleGAN-V's I3D by means over thirds of time, called in the same way."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        x = x.float()
        if resize:
            x = F.interpolate(x, size=[x.shape[2], 224, 224], mode="trilinear", align_corners=False)
        if rescale:
            x = x / 127.5 - 1
        features = F.adaptive_avg_pool3d(x, [3, 1, 1]).flatten(1)
        if not return_features:
            features = features.softmax(dim=1)
        return features.squeeze(0) if len(features) == 1 else features


class _Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _save(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the published file is TorchScript
        torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(_Detector(), tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt")


def _videos(n: int, frames: int = 12, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        0, 256, (n, frames, channels, 5, 7), dtype=torch.uint8, generator=generator
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_network_is_called_as_stylegan_v_does(file: Path, batch_size: int) -> None:
    videos = _videos(3)
    found = I3DFeatures(file)(videos, batch_size=batch_size)
    large = F.interpolate(
        videos.transpose(1, 2).float(), size=(12, 224, 224), mode="trilinear", align_corners=False
    )
    expected = (large / 127.5 - 1).unflatten(2, (3, 4)).mean(dim=(3, 4, 5)).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dtype_and_gray_videos(file: Path) -> None:
    features, videos = I3DFeatures(file), _videos(3, channels=1)
    torch.testing.assert_close(features(videos.double() / 255), features(videos))
    torch.testing.assert_close(features(videos.repeat(1, 1, 3, 1, 1)), features(videos))


def test_the_distance_is_the_textbook_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    b = torch.randn(50, 6, generator=generator) * 1.5 + torch.randn(6, generator=generator)
    cov_a, cov_b = (
        np.cov(a.double().numpy(), rowvar=False),
        np.cov(b.double().numpy(), rowvar=False),
    )
    root = np.real(sqrtm(cov_a @ cov_b))
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum().item()
    expected = mean + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_video_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_equal_sets_shifted_sets_and_fewer_videos_than_features(file: Path) -> None:
    features = I3DFeatures(file)(_videos(6))
    assert frechet_video_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)
    assert frechet_video_distance(features, features + 0.5) == pytest.approx(
        0.25 * features.shape[1], rel=1e-6
    )
    other = I3DFeatures(file)(_videos(6, seed=1) // 2)
    assert frechet_video_distance(features, other) > 1
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_video_distance(features, other[:1])


def test_what_cannot_be_measured_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="videos must have at least 10 frames, got 9"):
        I3DFeatures(file)(_videos(2, frames=9))
    with pytest.raises(ValueError, match="batch_size must be a positive number, got 0"):
        I3DFeatures(file)(_videos(2), batch_size=0)
    missing = tmp_path / "none.pt"
    with pytest.raises(
        ValueError, match=rf"distance needs the file {missing}, published at {I3D.source}"
    ):
        I3DFeatures(missing)
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(ValueError, match=r"damaged\.pt is no TorchScript file"):
        I3DFeatures(tmp_path / "damaged.pt")
    (tmp_path / "page.pt").write_text("<!doctype html>")
    with pytest.raises(ValueError, match=r"page\.pt is a web page"):
        I3DFeatures(tmp_path / "page.pt")
    other = I3DFeatures(_save(_Other(), tmp_path / "other.pt"))
    with pytest.raises(
        ValueError, match=r"the network in .*other\.pt failed: .*expected at most 2 argument"
    ):
        other(_videos(2))


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Broken(_Detector):
        def forward(
            self,
            x: Tensor,
            rescale: bool = False,
            resize: bool = False,
            return_features: bool = False,
        ) -> Tensor:
            return x.float().mean(dim=(2, 3, 4)) * math.nan

    with pytest.raises(ValueError, match="gives NaN or infinity"):
        I3DFeatures(_save(Broken(), tmp_path / "broken.pt"))(_videos(2))
