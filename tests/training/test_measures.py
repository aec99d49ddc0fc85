"""Choose metrics, and load those of networks from a folder, with random weights."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from anyflow.evaluation.video_metrics import Clip, I3DFeatures, model_path, psnr
from anyflow.training.config import MetricsConfig
from anyflow.training.measures import Measures, Video

CPU = torch.device("cpu")
LATENTS, PIXELS = (4, 16, 4, 6), (13, 32, 48)


class _Detector(nn.Module):
    """Take the arguments of the published I3D, and return channel means over thirds of time."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool3d(x.float() / 127.5 - 1, [3, 1, 1]).flatten(1)


def _save_detector(models: Path) -> None:
    file = model_path("fvd", models)
    file.parent.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the published file is TorchScript
        torch.jit.script(_Detector()).save(str(file))


def _save_clip(models: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = model_path("clip", models)
    words = [
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    layers = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ends = {
        "bos_token_id": len(words),
        "eos_token_id": len(words) + 1,
        "pad_token_id": len(words) + 1,
    }
    config = CLIPConfig(
        text_config={
            **layers,
            **ends,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 16,
        },
        vision_config={**layers, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():  # the usual start gives all inputs nearly one output
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)


def _videos(count: int, generator: torch.Generator) -> list[Video]:
    frames, *size = PIXELS
    return [
        Video(
            torch.randn(LATENTS, generator=generator),
            torch.randint(
                0, 40 * (i + 2), (1, frames, 3, *size), dtype=torch.uint8, generator=generator
            ),
            "a red cat" if i else "blue",
        )
        for i in range(count)
    ]


def test_networks_of_a_folder_are_called_and_leave_the_random_state_alone(
    tmp_path: Path, generator: torch.Generator
) -> None:
    """Compare each with what it gives alone; LPIPS is left out, whose file is not there."""
    _save_detector(tmp_path)
    _save_clip(tmp_path)
    state = torch.get_rng_state()
    config = MetricsConfig(every=1, models=str(tmp_path))
    measures = Measures(config, CPU, LATENTS, PIXELS, num_videos=3, num_real=4)
    expected = (
        "motion",
        "flicker",
        "dynamic_degree",
        "clip",
        "psnr",
        "fvd",
        "latent_frechet_distance",
    )
    assert tuple(measures.names) == expected
    (lpips,) = measures.left_out
    assert lpips.startswith("LPIPS") and "needs" in lpips
    videos, real = _videos(3, generator), _videos(4, generator)
    with measures.loaded():
        values = [measures.of_video(video, videos[0]) for video in videos]
        own, theirs = (
            [measures.features(video)["fvd"] for video in part] for part in (videos, real)
        )
    assert torch.equal(torch.get_rng_state(), state)
    clip = Clip(model_path("clip", tmp_path))
    assert [value["clip"] for value in values] == pytest.approx(
        [clip(video.pixels, [video.caption]).item() for video in videos]
    )
    assert values[0]["psnr"] == 100.0 and math.isinf(
        psnr(videos[0].pixels, videos[0].pixels).item()
    )
    assert values[1]["psnr"] == pytest.approx(psnr(videos[1].pixels, videos[0].pixels).item())
    features = I3DFeatures(model_path("fvd", tmp_path))
    assert all(
        torch.equal(vector, features(video.pixels)[0])
        for vector, video in zip(own, videos, strict=True)
    )
    first, second = (torch.stack(part).double().numpy() for part in (own, theirs))
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    distance = (
        np.square(first.mean(0) - second.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * root
    )
    assert measures.of_set("fvd", torch.stack(own), torch.stack(theirs)) == pytest.approx(
        distance, rel=1e-4
    )


def test_what_refuses_the_videos_is_left_out_before_training(tmp_path: Path) -> None:
    """Give too few frames for I3D, too small ones for OpenCV's flow, files that are no networks."""
    _save_detector(tmp_path)
    model_path("clip", tmp_path).mkdir()
    config = MetricsConfig(every=1, models=str(tmp_path))
    short = Measures(config, CPU, (2, 16, 4, 6), (5, 32, 48), num_videos=3, num_real=4)
    assert "fvd" not in short.names and any("10 frames" in sentence for sentence in short.left_out)
    assert any("config.json" in sentence for sentence in short.left_out)
    still = Measures(
        MetricsConfig(every=1), CPU, (1, 16, 4, 6), (1, 32, 48), num_videos=3, num_real=4
    )
    assert tuple(still.names) == ("psnr",) and len(still.left_out) == 4
    small = Measures(
        MetricsConfig(every=1), CPU, (2, 16, 2, 2), (5, 8, 8), num_videos=3, num_real=4
    )
    assert tuple(small.names) == ("motion", "flicker", "psnr", "latent_frechet_distance")
    model_path("fvd", tmp_path).write_text("no network")
    broken = Measures(config, CPU, LATENTS, PIXELS, num_videos=3, num_real=4)
    assert "fvd" not in broken.names and any(
        "TorchScript" in sentence for sentence in broken.left_out
    )
    with pytest.raises(ValueError, match=r"metrics\.models: .*nowhere is not a folder"):
        Measures(
            MetricsConfig(every=1, models=str(tmp_path / "nowhere")),
            CPU,
            LATENTS,
            None,
            num_videos=2,
            num_real=2,
        )


def test_features_that_all_real_videos_share_do_not_blow_the_distance_up() -> None:
    measures = Measures(MetricsConfig(every=1), CPU, LATENTS, None, num_videos=3, num_real=3)
    same = torch.ones(3, 5)
    assert measures.of_set("latent_frechet_distance", same, same) == 0
    assert measures.of_set("latent_frechet_distance", same + 1, same) == pytest.approx(5)
