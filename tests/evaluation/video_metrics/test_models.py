"""Test which metrics can be computed, and what is said about the others."""

import re
import sys
from pathlib import Path

import pytest
import torch

from anyflow.evaluation.video_metrics import (
    VIDEO_METRICS,
    available_metrics,
    model_path,
    models_folder,
)
from anyflow.evaluation.video_metrics.models import ALEXNET, CLIP, I3D, package_problem
from anyflow.utils.packages import is_missing


def test_the_folder_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_folder() == tmp_path / ".cache/anyflow/evaluation"
    assert models_folder("~/other") == tmp_path / "other" and models_folder(Path("here")) == Path(
        "here"
    )
    assert model_path("clip", "m") == Path("m/clip-vit-base-patch32")
    assert model_path("lpips", "m") == Path("m/lpips/checkpoints/alexnet-owt-7be5be79.pth")
    assert model_path("fvd", "m") == Path("m/i3d/i3d_torchscript.pt")
    for metric in ("psnr", "nonsense"):
        with pytest.raises(
            ValueError, match=rf"pretrained model \(clip, lpips, fvd\), got '{metric}'"
        ):
            model_path(metric)


def test_what_needs_no_model_runs_without_one_and_the_others_say_where_it_is_expected(
    tmp_path: Path,
) -> None:
    pytest.importorskip("cv2")
    found = available_metrics(tmp_path)
    assert list(found) == list(VIDEO_METRICS)
    assert [name for name, reason in found.items() if reason is None] == [
        "psnr",
        "flicker",
        "motion",
        "dynamic_degree",
    ]
    assert found["clip"] == (
        f"CLIP similarity to the text needs the folder {tmp_path}/clip-vit-base-patch32 with the "
        f"files of {CLIP.source}"
    )
    assert (
        found["fvd"]
        == f"Fréchet video distance needs the file {tmp_path}/{I3D.path}, published at {I3D.source}"
    )
    file = (
        f"LPIPS to the reference needs the file {tmp_path}/{ALEXNET.path}, published at "
        f"{ALEXNET.source}"
    )
    assert found["lpips"].endswith(file)


def test_a_model_that_is_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "i3d").mkdir()
    (tmp_path / I3D.path).write_bytes(b"any")
    clip = tmp_path / CLIP.path
    clip.mkdir()
    for name in ("config.json", "preprocessor_config.json", "vocab.json"):
        (clip / name).touch()
    found = available_metrics(tmp_path)
    assert found["fvd"] is None
    assert found["clip"] == (
        "CLIP similarity to the text needs model.safetensors or pytorch_model.bin "
        f"in the folder {clip}, from {CLIP.source}"
    )
    (clip / "pytorch_model.bin").touch()
    assert available_metrics(tmp_path)["clip"] is None


def test_a_package_that_is_missing_or_broken_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    reason = available_metrics(tmp_path)["dynamic_degree"]
    assert reason.startswith(
        "Dynamic degree needs the package opencv-python-headless, which is not installed: pip"
    )
    assert "pip install opencv-python-headless" in reason
    if is_missing("torchvision"):
        assert re.search(
            rf"needs the package torchvision, which is not installed: pip install torchvision "
            rf"\(the build for torch {re.escape(torch.__version__)}\); "
            "LPIPS to the reference needs the file ",
            available_metrics(tmp_path)["lpips"],
        )
    monkeypatch.delitem(sys.modules, "cv2")
    (tmp_path / "cv2.py").write_text(
        "raise RuntimeError('operator torchvision::nms\\ndoes not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    problem = package_problem("it", "opencv-python-headless")
    assert problem == (
        "it needs the package opencv-python-headless; the one installed does not import: "
        "operator torchvision::nms does not exist"
    )
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
