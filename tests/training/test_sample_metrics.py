"""Compare metrics of videos sampled during training with their definitions."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from anyflow.data import MovingShapes, SyntheticVideos, VideoDataset, pixel_shuffle_3d
from anyflow.data.latent_dataset import LatentDataset
from anyflow.evaluation import RandomConv3dFeatures
from anyflow.evaluation.video_metrics import dynamic_degree, motion
from anyflow.sampling import sample
from anyflow.training.config import MetricsConfig, PreviewConfig, Recipe
from anyflow.training.distributed import Mesh
from anyflow.training.draws import draw_generator
from anyflow.training.sample_metrics import SampleMetrics
from anyflow.training.trainer import _build_samples, _build_updates, train
from anyflow.training.updates import StageUpdates, build_scheduler

Make = Callable[..., Recipe]
CPU = Mesh(torch.device("cpu"))
QUIET = Console(quiet=True)
TIMING = {
    "seconds",
    "samples_per_second",
    "tokens_per_second",
    "tflops_per_second",
    "peak_memory_gb",
}


def _metrics_of(recipe: Recipe, data: VideoDataset, console: Console = QUIET) -> SampleMetrics:
    found = _build_samples(recipe, CPU, data, console).metrics
    assert found is not None
    return found


def _moved(step: StageUpdates) -> StageUpdates:
    """Move parameters and averages apart, and the end of the network away from zero."""
    with torch.no_grad():
        for parameter in step.student.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            )
    for average, parameter in zip(
        step.ema.state_dict().values(), step.student.parameters(), strict=True
    ):
        average.copy_(0.9 * parameter.detach())
    return step


def _samples(
    recipe: Recipe, step: StageUpdates, data: VideoDataset, embeds: list[Tensor], count: int
) -> Tensor:
    """Return what the averages give from the noise of each place, ``[N, F, C, H, W]``."""
    with step.ema.applied(step.student):
        return torch.cat(
            [
                sample(
                    step.student,
                    build_scheduler(recipe),
                    torch.randn(
                        data.latent_shape, generator=draw_generator(0, "metrics noise", 0, place)
                    )[None],
                    prompt,
                    num_inference_steps=count,
                )
                for place, prompt in enumerate(embeds)
            ]
        )


def _frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Take the eigenvalues of the product of the covariances, as the FID is defined."""
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    return float(
        np.square(first.mean(0) - second.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * root
    )


def test_values_are_those_of_the_averaged_student_s_videos(
    small_recipe: Make, tmp_path: Path
) -> None:
    config = MetricsConfig(every=1, step_counts=(1, 3), num_samples=4, reference_steps=5)
    recipe = small_recipe(tmp_path, metrics=config, seed=5)
    data = SyntheticVideos()
    step = _moved(_build_updates(recipe, CPU, data))
    before = {name: p.detach().clone() for name, p in step.student.named_parameters()}
    metrics = _metrics_of(recipe, data)
    found = metrics.evaluate(step, 7, QUIET)
    assert all(torch.equal(p, before[name]) for name, p in step.student.named_parameters())
    assert found.keys() == {
        *(
            f"metrics/{name}/{steps}_steps"
            for name in (*_OF_ONE, "psnr", _FRECHET)
            for steps in (1, 3)
        ),
        *(f"metrics/{name}/real" for name in _OF_ONE),
        "metrics/seconds",
    }
    picked = [i * len(data) // 4 for i in range(4)]
    real = torch.stack([data[i].latents for i in picked])
    latents = {
        n: _samples(recipe, step, data, [data[i].prompt_embeds[None] for i in picked], n)
        for n in (1, 3, 5)
    }
    videos = {
        n: MovingShapes().to_uint8(pixel_shuffle_3d(x))
        for n, x in (*latents.items(), ("real", real))
    }
    for steps in (1, 3, "real"):
        name = steps if steps == "real" else f"{steps}_steps"
        levels = videos[steps].numpy().astype(np.float64) / 255
        assert found[f"metrics/flicker/{name}"] == pytest.approx(
            np.abs(np.diff(levels, axis=1)).mean(), rel=1e-6
        )
        gray = videos[steps][:, :, None]
        assert found[f"metrics/motion/{name}"] == pytest.approx(
            motion(gray).mean().item() / 12, rel=1e-4
        )
        assert found[f"metrics/dynamic_degree/{name}"] == pytest.approx(
            dynamic_degree(gray).mean().item(), rel=1e-4
        )
    features = RandomConv3dFeatures(8)
    own = features(real).double().numpy()
    for steps in (1, 3):
        errors = (videos[steps].numpy().astype(np.float64) - videos[5].numpy()) / 255
        ratios = -10 * np.log10(np.square(errors).mean(axis=(1, 2, 3)))
        assert found[f"metrics/psnr/{steps}_steps"] == pytest.approx(ratios.mean(), rel=1e-6)
        other = features(latents[steps]).double().numpy()
        mean, std = own.mean(0), own.std(0, ddof=1)
        expected = _frechet((other - mean) / std, (own - mean) / std)
        assert found[f"metrics/{_FRECHET}/{steps}_steps"] == pytest.approx(expected, rel=1e-4)
    assert found["metrics/psnr/3_steps"] != found["metrics/psnr/1_steps"]
    assert {**metrics.evaluate(step, 8, QUIET), "metrics/seconds": 0} == {
        **found,
        "metrics/seconds": 0,
    }


_OF_ONE = ("motion", "flicker", "dynamic_degree")
_FRECHET = "latent_frechet_distance"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "on_policy"])
def test_a_run_trains_as_without_them(stage: str, small_recipe: Make, tmp_path: Path) -> None:
    """Compare every number of the training, and the model at the end, bit for bit."""
    config = MetricsConfig(every=2, step_counts=(1, 2), num_samples=2, reference_steps=3)
    train(small_recipe(tmp_path / "with", stage=stage, steps=3, metrics=config), console=QUIET)
    train(small_recipe(tmp_path / "without", stage=stage, steps=3), console=QUIET)
    measured, plain = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    )
    assert [sum(name.startswith("metrics/") for name in line) for line in measured] == [0, 14, 14]
    for line, other in zip(measured, plain, strict=True):
        for name in other.keys() - TIMING:
            assert line[name] == other[name], name
        assert all(name.startswith("metrics/") for name in line.keys() - other.keys())
    models = [
        tmp_path / name / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
        for name in _BOTH
    ]
    assert models[0].read_bytes() == models[1].read_bytes()


_BOTH = ("with", "without")


def test_latents_that_nothing_decodes_have_metrics_of_their_own(latents_recipe: Recipe) -> None:
    config = MetricsConfig(every=1, step_counts=(1, 4), num_samples=2, reference_steps=4)
    recipe = dataclasses.replace(latents_recipe, metrics=config)
    data = LatentDataset(Path(recipe.data.path))
    step = _moved(_build_updates(recipe, CPU, data))
    found = _metrics_of(recipe, data).evaluate(step, 1, QUIET)
    assert found.keys() == {
        *(
            f"metrics/{name}/{steps}_steps"
            for name in ("latent_motion", _FRECHET)
            for steps in (1, 4)
        ),
        "metrics/latent_motion/real",
        "metrics/latent_distance/1_steps",  # four steps are what they are compared with
        "metrics/seconds",
    }
    embeds = [data[i].prompt_embeds[None] for i in (0, 2)]
    one, four = (_samples(recipe, step, data, embeds, count).double().numpy() for count in (1, 4))
    distance = np.sqrt(np.square(one - four).mean(axis=(1, 2, 3, 4))).mean()
    assert found["metrics/latent_distance/1_steps"] == pytest.approx(distance, rel=1e-5)
    assert found["metrics/latent_motion/4_steps"] == pytest.approx(
        np.abs(np.diff(four, axis=1)).mean(), rel=1e-5
    )
    real = np.stack([data[i].latents.double().numpy() for i in (0, 2)])
    assert found["metrics/latent_motion/real"] == pytest.approx(
        np.abs(np.diff(real, axis=1)).mean(), rel=1e-6
    )


def test_a_vae_decodes_what_is_measured(latents_recipe: Recipe, wan_model: Path) -> None:
    """Sample prompts of one's own beside previews of others with one text encoder and one VAE."""
    own = {"prompts": ("a blue cross moves slowly", "a red disc", "a disc"), "reference_steps": 0}
    recipe = dataclasses.replace(
        latents_recipe,
        preview=PreviewConfig(
            1, (1,), prompts=("a red disc",), model=str(wan_model), vae=str(wan_model)
        ),
        metrics=MetricsConfig(every=1, step_counts=(2,), **own),
    )
    data = LatentDataset(Path(recipe.data.path))
    step = _moved(_build_updates(recipe, CPU, data))
    samples = _build_samples(recipe, CPU, data, QUIET)
    found = samples.metrics.evaluate(step, 1, QUIET)
    assert not any("psnr" in name or "latent_motion" in name for name in found)
    embeds = [prompt.embeds for prompt in samples.metrics.prompts]
    assert torch.equal(embeds[1], samples.previews.prompts[0].embeds) and not torch.equal(
        embeds[0], embeds[1]
    )
    decoded = samples.metrics.decoder.pixels(_samples(recipe, step, data, embeds, 2)).double() / 255
    assert found["metrics/flicker/2_steps"] == pytest.approx(
        decoded.diff(dim=1).abs().mean().item(), rel=1e-6
    )


def test_what_cannot_be_measured_is_said_once(
    small_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MetricsConfig(every=1, step_counts=(1,), num_samples=1, reference_steps=2)
    train(
        small_recipe(tmp_path, steps=2, metrics=config, log_every=9),
        console=Console(soft_wrap=True),
    )
    output = capsys.readouterr().out
    assert (
        output.count("Left out of the metrics: Fréchet distance of latents needs two prompts") == 1
    )
    assert output.count("metrics by sampling steps: motion ") == 2
    # with metrics alone, one line says it all
    assert "step 1: loss " in output and "step 2: \n" not in output


def test_samples_that_are_not_finite_are_said_and_training_goes_on(
    small_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(
        tmp_path, metrics=MetricsConfig(every=1, step_counts=(1, 2), num_samples=2)
    )
    data = SyntheticVideos()
    step = _build_updates(recipe, CPU, data)
    next(iter(step.ema.state_dict().values())).fill_(3e38)
    assert _metrics_of(recipe, data).evaluate(step, 3, Console(soft_wrap=True)) == {}
    assert (
        "The metrics of step 3 were not measured: at 1 steps, the latents"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": -1}, "^every must"),
        ({"step_counts": ()}, r"^step_counts must hold positive counts, got \(\)"),
        ({"step_counts": (0,)}, "^step_counts must"),
        ({"num_samples": 0}, "^num_samples must"),
        ({"prompts": ("",)}, "^prompts must"),
        ({"reference_steps": -1}, "^reference_steps must"),
        ({"models": ""}, "^models must"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetricsConfig(**settings)
