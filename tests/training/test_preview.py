"""Preview real runs: labels, prompts of one's own, and the VAE, all from files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from anyflow.data import SyntheticVideos, VideoDataset
from anyflow.data.encoders import TextEncoder
from anyflow.data.latent_dataset import LatentDataset
from anyflow.pipelines.frames import uint8_pixels
from anyflow.pipelines.wan import decode_latents, load_vae
from anyflow.training.config import MetricsConfig, PreviewConfig, Recipe
from anyflow.training.decoding import Decoder
from anyflow.training.distributed import Mesh
from anyflow.training.preview import Previews
from anyflow.training.preview_grid import write_grid
from anyflow.training.prompts import sampled_prompts
from anyflow.training.trainer import _build_updates, train

Make = Callable[..., Recipe]
CPU = Mesh(torch.device("cpu"))


def _previews(recipe: Recipe, data: VideoDataset) -> Previews:
    decoder = Decoder(recipe, CPU, data, everywhere=False)
    return Previews(recipe, CPU, data, sampled_prompts(recipe, CPU, data).preview, decoder)


def _frames(file: Path) -> list[Tensor]:
    """Return each frame as ``[H, W, 3]``."""
    if file.suffix == ".mp4":
        with av.open(str(file)) as container:
            return [
                torch.from_numpy(frame.to_ndarray(format="rgb24"))
                for frame in container.decode(video=0)
            ]
    with Image.open(file) as image:
        frames = []
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(
                torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            )
        return [frame.view(image.height, image.width, 3) for frame in frames]


@pytest.fixture
def recipe(latents_recipe: Recipe) -> Recipe:
    return latents_recipe


def test_previews_are_animated_grids_and_change_nothing(small_recipe: Make, tmp_path: Path) -> None:
    preview = PreviewConfig(every=2, step_counts=(1, 3), num_samples=3)
    train(small_recipe(tmp_path / "with", steps=3, preview=preview))
    train(small_recipe(tmp_path / "without", steps=3))
    files = sorted((tmp_path / "with" / "previews").iterdir())
    assert [file.name for file in files] == ["step-00000002.gif", "step-00000003.gif"]
    frames = _frames(files[0])
    assert len(frames) == 8
    # Three prompts, two step counts and the real videos, of 132 x 132 pixels, text to the left and
    # above.
    height, width = frames[0].shape[:2]
    assert 3 * 132 + 8 < width < 3 * 132 + 100 and 3 * 132 + 8 < height < 3 * 132 + 60
    models = [
        tmp_path / name / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
        for name in _BOTH
    ]
    assert models[0].read_bytes() == models[1].read_bytes()


_BOTH = ("with", "without")


def test_a_preview_samples_the_average_in_a_plain_model_too(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(
        tmp_path, stage="teacher", preview=PreviewConfig(every=1, step_counts=(2,), num_samples=2)
    )
    data = SyntheticVideos()
    step, previews = _build_updates(recipe, CPU, data), _previews(recipe, data)
    before = {name: p.detach().clone() for name, p in step.student.named_parameters()}
    first = previews.sample(step.student, step.ema)
    assert first.shape == (1, 2, *data.latent_shape)
    for average in step.ema.state_dict().values():
        average.mul_(0.5)
    second = previews.sample(step.student, step.ema)
    assert not torch.equal(first, second)
    assert all(torch.equal(p, before[name]) for name, p in step.student.named_parameters())


def test_a_preview_that_is_not_finite_is_said_and_not_written(
    small_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(
        tmp_path, preview=PreviewConfig(every=1, step_counts=(1, 2), num_samples=2)
    )
    data = SyntheticVideos()
    step = _build_updates(recipe, CPU, data)
    next(iter(step.ema.state_dict().values())).fill_(3e38)
    assert _previews(recipe, data).write(step, 1, Console(soft_wrap=True)) is None
    assert "step-00000001.gif was not written: the latents" in capsys.readouterr().out
    assert not (tmp_path / "previews").exists()


def test_the_vae_decodes_prompts_of_ones_own(
    recipe: Recipe, wan_model: Path, tmp_path: Path
) -> None:
    """Embed as ``anyflow preprocess`` does, and decode as the VAE does."""
    prompts = ("a blue cross moves slowly", "a red disc")
    preview = PreviewConfig(1, (1, 2), prompts=prompts, model=str(wan_model), vae=str(wan_model))
    recipe = dataclasses.replace(recipe, preview=preview)
    data = LatentDataset(Path(recipe.data.path))
    previews, step = _previews(recipe, data), _build_updates(recipe, CPU, data)
    encoder = TextEncoder(wan_model, CPU.device, dtype=torch.bfloat16, text_length=8)
    for prompt, text in zip(previews.prompts, prompts, strict=True):
        own = encoder(text)
        assert prompt.caption == text and torch.equal(prompt.embeds[0, : len(own)], own)
        assert prompt.embeds.shape == (1, 8, 16) and not prompt.embeds[0, len(own) :].any()

    file = previews.write(step, 1, Console(quiet=True))
    frames = _frames(file)
    assert file.name == "step-00000001.mp4" and len(frames) == 5  # two latent frames
    latents = previews.sample(step.student, step.ema)
    expected = uint8_pixels(decode_latents(load_vae(wan_model), latents[1, 1:]))[0]
    # 48 pixels wide: 144 on the picture
    enlarged = expected.repeat_interleave(3, 1).repeat_interleave(3, 2)
    height, width = enlarged.shape[1:3]
    # The last cell ends where the picture does, but for the even size.
    bottom, right = frames[0].shape[:2]
    differences = [
        (frames[4][y : y + height, x : x + width].float() - enlarged[4].float()).abs().mean().item()
        for y in (bottom - height, bottom - height - 1)
        for x in (right - width, right - width - 1)
    ]
    assert min(differences) < 6  # of 255: H.264 halves the resolution of colors


def _decoded_by_diffusers(folder: Path, latents: Tensor) -> Tensor:
    """Decode normalized ``latents[F, C, h, w]`` by diffusers' classes and numpy alone."""
    from diffusers import AutoencoderKLWan
    from diffusers.video_processor import VideoProcessor

    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    mean, std = (
        np.array(vae.config[f"latents_{name}"], np.float32)[:, None, None, None]
        for name in ("mean", "std")
    )
    stretched = torch.from_numpy(latents.numpy().transpose(1, 0, 2, 3) * std + mean)
    with torch.no_grad():
        video = vae.decode(stretched[None]).sample
    (frames,) = VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="np")
    return torch.from_numpy((frames * 255).round().astype(np.uint8))


def test_decoded_pixels_are_those_of_diffusers(recipe: Recipe, wan_model: Path) -> None:
    """Vary means and deviations by channel; decode a second video as the first."""
    recipe = dataclasses.replace(recipe, preview=PreviewConfig(every=1, vae=str(wan_model)))
    data = LatentDataset(Path(recipe.data.path))
    latents = torch.stack([data[0].latents, 2 * data[3].latents])
    pixels = Decoder(recipe, CPU, data, everywhere=True).pixels(latents)
    for video, own in zip(pixels, latents, strict=True):
        expected = _decoded_by_diffusers(wan_model, own)
        assert video.shape == expected.shape == (5, 32, 48, 3) and expected.float().std() > 5
        assert (video.int() - expected.int()).abs().max() <= 1  # a rounding of fp32


def test_the_data_s_own_videos_are_beside_the_samples(recipe: Recipe, wan_model: Path) -> None:
    """Show in the last line of each column the video of its caption, decoded."""
    preview = PreviewConfig(1, (1, 2), num_samples=2, vae=str(wan_model))
    recipe = dataclasses.replace(recipe, preview=preview)
    data = LatentDataset(Path(recipe.data.path))
    previews, step = _previews(recipe, data), _build_updates(recipe, CPU, data)
    frames = _frames(previews.write(step, 1, Console(quiet=True)))
    height, width = 96, 144  # 32 x 48 pixels, enlarged
    bottom, right = frames[0].shape[:2]
    assert bottom > 3 * height + 8
    for column, index in enumerate((0, 2)):
        expected = _decoded_by_diffusers(wan_model, data[index].latents)
        enlarged = expected.repeat_interleave(3, 1).repeat_interleave(3, 2)
        differences = [
            (frames[4][y : y + height, x : x + width].float() - enlarged[4].float())
            .abs()
            .mean()
            .item()
            for y in (bottom - height, bottom - height - 1)
            for x in (right - (2 - column) * width - 4 * (1 - column) - i for i in range(2))
        ]
        assert min(differences) < 6  # of 255: H.264 halves the resolution of colors


def test_columns_have_the_captions_of_the_data(recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, preview=PreviewConfig(1, (1,), num_samples=2))
    data = LatentDataset(Path(recipe.data.path))
    prompts = _previews(recipe, data).prompts
    assert [prompt.caption for prompt in prompts] == [data.caption(0), data.caption(2)]
    assert torch.equal(prompts[1].embeds[0], data[2].prompt_embeds)
    synthetic = SyntheticVideos()
    assert synthetic.caption(0) == "disc right" != synthetic.caption(len(synthetic) - 1)


def test_a_model_that_does_not_fit_is_refused_before_training(
    recipe: Recipe, wan_model: Path, tmp_path: Path, small_recipe: Make
) -> None:
    """Refuse another width of text, other channels of latents, and a missing part."""
    for settings, message in (
        ({"prompts": ("a",), "model": str(tmp_path)}, r"preview\.model: .* has no text_encoder/"),
        ({"vae": str(tmp_path)}, r"preview\.vae: .* has no vae/"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(recipe, preview=PreviewConfig(every=1, **settings)))
    own = PreviewConfig(every=1, prompts=("a",), model=str(wan_model))
    with pytest.raises(
        ValueError,
        match=r"preview\.model: the text encoder of .* has width 16, the data's prompts 32",
    ):
        train(small_recipe(tmp_path / "run", preview=own))
    assert not (tmp_path / "run").exists()
    for settings in (
        {"preview": PreviewConfig(prompts=("a",))},
        {"metrics": MetricsConfig(prompts=("a",))},
    ):
        with pytest.raises(
            ValueError,
            match=rf"preview\.model is required with {next(iter(settings))}\.prompts: its",
        ):
            small_recipe(tmp_path, **settings)
    with pytest.raises(
        ValueError,
        match=r"preview\.model is required with preview\.prompts or metrics\.prompts, and",
    ):
        small_recipe(tmp_path, preview=PreviewConfig(model="x"))
    with pytest.raises(
        ValueError, match=r"preview\.vae must be left alone with data\.kind=synthetic"
    ):
        small_recipe(tmp_path, preview=PreviewConfig(vae="x"))


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_a_grid_has_its_videos_beside_their_labels(suffix: str, tmp_path: Path) -> None:
    """Draw plain colors that compression keeps apart; text stands only where labels are."""
    colors = torch.tensor([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]], dtype=torch.uint8)
    videos = colors[:, :, None, None, None].expand(2, 2, 3, 20, 200, 3)
    file = tmp_path / "folder" / f"grid.{suffix}"
    write_grid(
        videos,
        ["1 step", "16 steps"],
        ["short", "a caption that is too long for its column " * 5],
        file,
        8,
    )
    frames = _frames(file)
    assert len(frames) == (1 if suffix == "gif" else 3)  # a GIF has frames that are the same once
    picture = frames[-1].float()
    height, width = picture.shape[:2]
    cells = {(0, 0): (-34, -304), (0, 1): (-34, -100), (1, 0): (-10, -304), (1, 1): (-10, -100)}
    for (row, column), (y, x) in cells.items():
        assert (picture[height + y, width + x] - colors[row, column].float()).abs().max() < 40
    dark = picture.amax(2) < 100
    assert dark[: height - 46, -404:-204].any() and dark[: height - 46, -200:].any()  # captions
    assert (
        dark[height - 44 : height - 24, : width - 410].any()
        and dark[height - 20 :, : width - 410].any()
    )
    assert not dark[:, :2].any()


def test_a_picture_of_large_videos_is_at_most_as_wide_as_a_screen(tmp_path: Path) -> None:
    videos = torch.zeros(1, 3, 1, 300, 2000, 3, dtype=torch.uint8)
    write_grid(videos, ["1 step"], ["a", "b", "c"], tmp_path / "grid.mp4", 16)
    height, width = _frames(tmp_path / "grid.mp4")[0].shape[:2]
    assert 3840 < width < 4000 and 192 < height < 300
