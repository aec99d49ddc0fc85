"""Test LPIPS against the ``lpips`` package with the same weights, and its errors.

What needs torchvision is skipped without it. The weights of AlexNet are random; those of the linear
layers come with the packages.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from anyflow.evaluation.video_metrics import Lpips, psnr, video_reference_metrics
from anyflow.evaluation.video_metrics.models import ALEXNET
from anyflow.utils.packages import is_missing


def _videos(seed: int, n: int = 2, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, channels, 33, 40), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torchvision = pytest.importorskip("torchvision", reason="LPIPS needs torchvision")
    path = tmp_path_factory.mktemp("models") / ALEXNET.path
    path.parent.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


def test_without_torchvision_the_error_says_what_to_install() -> None:
    if not is_missing("torchvision"):
        pytest.skip("torchvision is installed")
    if is_missing("torchmetrics"):
        pytest.skip("the error names torchmetrics, which is missing, too")
    expected = (
        r"LPIPS needs the package torchvision, which is not installed: pip install torchvision "
        r"\(the build for "
    )
    with pytest.raises(ImportError, match=expected):
        Lpips("anything")


def test_the_distance_is_that_of_the_lpips_package(file: Path) -> None:
    package = pytest.importorskip("lpips")
    weights = torch.load(file, weights_only=True)
    theirs = package.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    backbone = {key: weights["features." + key.split(".", 1)[1]] for key in theirs.net.state_dict()}
    theirs.net.load_state_dict(backbone)
    first, second = _videos(0), _videos(1)
    with torch.no_grad():
        expected = (
            theirs(first.flatten(0, 1) / 255, second.flatten(0, 1) / 255, normalize=True)
            .view(2, 3)
            .mean(1)
        )
    for batch_size in (1, 4, 16):
        torch.testing.assert_close(
            Lpips(file)(first, second, batch_size=batch_size), expected, rtol=1e-4, atol=1e-6
        )


def test_equal_videos_gray_videos_and_dtypes(file: Path) -> None:
    directory = torch.hub.get_dir()
    lpips, first, second = Lpips(file), _videos(0, channels=1), _videos(1, channels=1)
    assert torch.hub.get_dir() == directory
    assert lpips(first, first).tolist() == [0, 0]
    expected = lpips(first, second)
    assert expected.min() > 0
    torch.testing.assert_close(lpips(second.double() / 255, first), expected)
    torch.testing.assert_close(
        lpips(first.repeat(1, 1, 3, 1, 1), second.repeat(1, 1, 3, 1, 1)), expected
    )
    found = video_reference_metrics(first, second, lpips=lpips)
    assert torch.equal(found["lpips"], expected) and torch.equal(found["psnr"], psnr(first, second))


def test_references_without_lpips() -> None:
    found = video_reference_metrics(_videos(0), _videos(1))
    assert list(found) == ["psnr"] and torch.equal(found["psnr"], psnr(_videos(0), _videos(1)))


def test_files_that_are_no_weights_and_videos_that_are_too_small(
    file: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"LPIPS needs the file .*alexnet-owt-7be5be79\.pth, published at https"
    ):
        Lpips(tmp_path / ALEXNET.path)
    other = tmp_path / "alexnet.pth"
    other.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"checkpoints/alexnet-owt-7be5be79\.pth only, got .*/alexnet\.pth"
    ):
        Lpips(other)
    damaged = tmp_path / ALEXNET.path
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"alexnet-owt-7be5be79\.pth is no file of AlexNet's weights"
    ):
        Lpips(damaged)
    torch.save({"features.0.weight": torch.zeros(1)}, damaged)
    with pytest.raises(ValueError, match="is no file of AlexNet's weights"):
        Lpips(damaged)
    with pytest.raises(ValueError, match="videos must be at least 31 pixels high and wide"):
        Lpips(file)(_videos(0)[..., :30], _videos(0)[..., :30])
    assert Lpips(file)(_videos(0)[..., :31, :31], _videos(1)[..., :31, :31]).isfinite().all()
