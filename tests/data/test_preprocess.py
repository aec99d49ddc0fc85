"""Test preprocessing with a tiny Wan model, against diffusers' own pipeline."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned import CAPTIONS, SIZE, WriteVideo, table
from diffusers import AnyFlowPipeline, AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from anyflow.data.captions import Broken
from anyflow.data.encoders import LatentEncoder, TextEncoder
from anyflow.data.latent_dataset import LatentDataset
from anyflow.data.preprocess import (
    WAN_NEGATIVE_PROMPT,
    NothingEncodedError,
    PreprocessReport,
    preprocess,
)
from anyflow.data.video import read_video
from anyflow.pipelines.wan import clean_prompt


@pytest.fixture(scope="module")
def pipeline(wan_model: Path) -> AnyFlowPipeline:
    """Build diffusers' pipeline of the parts of the model that encode."""
    return AnyFlowPipeline(
        tokenizer=AutoTokenizer.from_pretrained(wan_model / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(wan_model / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(wan_model / "vae"),
        transformer=None,
        scheduler=None,
    )


def encode_pipeline(pipeline: AnyFlowPipeline, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=12
        )[0][0]


def test_stored_latents_are_those_of_the_anyflow_pipeline(
    videos: Path, wan_model: Path, pipeline: AnyFlowPipeline, tmp_path: Path
) -> None:
    assert preprocess(
        videos, table(tmp_path / "c.csv", CAPTIONS), wan_model, tmp_path / "out", **SIZE
    ) == (PreprocessReport(3, 0, ()))
    dataset = LatentDataset(tmp_path / "out")
    assert dataset.latent_shape == (3, 16, 8, 8)
    for i, file in enumerate(CAPTIONS):
        assert dataset.file(i) == file
        pixels = read_video(videos / file, num_frames=9, height=64, width=64, fps=16)
        with torch.no_grad():
            expected = pipeline.encode_video((pixels.float() / 255)[None], height=64, width=64)[0]
        torch.testing.assert_close(dataset[i].latents, expected, atol=1e-5, rtol=1e-5)


def test_latents_are_the_normalized_mean_of_the_posterior(videos: Path, wan_model: Path) -> None:
    pixels = read_video(videos / "4.mp4", num_frames=9, height=64, width=64, fps=16)
    vae = AutoencoderKLWan.from_pretrained(wan_model / "vae")
    with torch.no_grad():
        mean = vae.encode((pixels.float() / 127.5 - 1).transpose(0, 1)[None]).latent_dist.mean[0]
    latents = LatentEncoder(wan_model, torch.device("cpu"))(pixels)
    for channel in range(16):
        expected = (mean[channel] - vae.config.latents_mean[channel]) / vae.config.latents_std[
            channel
        ]
        torch.testing.assert_close(latents[:, channel], expected, atol=1e-6, rtol=1e-6)


def test_prompts_are_those_of_the_anyflow_pipeline(
    videos: Path, wan_model: Path, pipeline: AnyFlowPipeline, tmp_path: Path
) -> None:
    captions = {**CAPTIONS, "3.mp4": " ".join(["slowly to the right"] * 9)}
    out = tmp_path / "out"
    preprocess(
        videos,
        table(tmp_path / "c.csv", captions),
        wan_model,
        out,
        negative_prompt="bad quality",
        **SIZE,
    )
    dataset = LatentDataset(out)
    assert dataset.text_shape == (12, 16)
    for i, caption in enumerate(captions.values()):
        assert torch.equal(dataset[i].prompt_embeds, encode_pipeline(pipeline, caption))
    assert torch.equal(dataset.negative_prompt_embeds[0], encode_pipeline(pipeline, "bad quality"))
    assert load_file(out / "negative_prompt.safetensors")["prompt_embeds"].shape == (3, 16)


def test_the_text_encoder_runs_in_the_dtype_asked_for(
    wan_model: Path, pipeline: AnyFlowPipeline
) -> None:
    encoder = TextEncoder(wan_model, torch.device("cpu"), dtype=torch.bfloat16, text_length=12)
    embeds = encoder("a red disc")
    assert embeds.dtype == torch.float32 and torch.equal(embeds, embeds.bfloat16().float())
    torch.testing.assert_close(
        embeds, encode_pipeline(pipeline, "a red disc")[:4], atol=0.1, rtol=0.1
    )


def test_videos_that_cannot_be_used_are_listed_and_stop_nothing(
    videos: Path, wan_model: Path, write_video: WriteVideo, tmp_path: Path
) -> None:
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in ("0.mp4", "1.mp4", "2.mp4"):
        shutil.copy(videos / name, folder)
    (folder / "cut.mp4").write_bytes((videos / "3.mp4").read_bytes()[:3000])
    (folder / "text.mp4").write_text("not a video")
    write_video(folder / "short.mp4", [100] * 8)
    captions = {
        "text.mp4": "a", "0.mp4": "b", "cut.mp4": "c", "1.mp4": "d", "absent.mp4": "e",
        "short.mp4": "f", "2.mp4": " "
    }  # fmt: skip
    report = preprocess(folder, table(tmp_path / "c.csv", captions), wan_model, out, **SIZE)
    assert (report.done, report.skipped) == (2, 0)
    assert [(entry.line, entry.file, entry.reason.split(":")[0]) for entry in report.broken] == [
        (2, "text.mp4", "cannot be decoded"),
        (4, "cut.mp4", "cannot be decoded"),
        (6, "absent.mp4", f"it is not in {folder}"),
        (7, "short.mp4", "too short"),
        (8, "2.mp4", "the caption is empty"),
    ]
    listed = [
        Broken(**json.loads(line)) for line in (out / "broken.jsonl").read_text().splitlines()
    ]
    assert tuple(listed) == report.broken
    assert [LatentDataset(out).file(i) for i in range(2)] == ["0.mp4", "1.mp4"]

    for name in ("cut.mp4", "absent.mp4"):
        shutil.copy(videos / "3.mp4", folder / name)
    again = preprocess(folder, tmp_path / "c.csv", wan_model, out, **SIZE)
    assert (again.done, again.skipped, len(again.broken)) == (2, 2, 3)
    assert [LatentDataset(out).file(i) for i in range(4)] == [
        "0.mp4",
        "1.mp4",
        "cut.mp4",
        "absent.mp4",
    ]


def test_odd_files_and_lines_of_captions_are_one_line_each_and_stop_nothing(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in ("0.mp4", "new\nline.mp4", "ü" * 100 + ".mp4", "../outside.mp4"):
        shutil.copy(videos / "0.mp4", folder / name)
    os.mkfifo(folder / "fifo.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "inside.mp4").symlink_to("0.mp4")
    (folder / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    outside = "it lies outside the folder"
    sound = ["0.mp4", "new\nline.mp4", "ü" * 100 + ".mp4", "inside.mp4"]
    odd = {
        "fifo.mp4": "is a FIFO",
        "folder.mp4": "is a folder",
        "loop.mp4": "cannot be read: ",
        "x" * 300: "cannot be read: ",
        "../outside.mp4": outside,
        str(tmp_path / "outside.mp4"): outside,
        "link.mp4": outside,
        "/dev/zero": outside,
        "..": outside,
    }
    lines = [json.dumps({"file": name, "caption": "a red disc"}) for name in (*sound, *odd)]
    lines += [
        '{"file": "0.mp4", "caption": "\\ud800"}',
        "[" * 10_000,
        '{"file": "0.mp4", "caption": "&nbsp;"}',
    ]
    captions = tmp_path / "c.jsonl"
    captions.write_text("\n".join(lines), encoding="utf-8")
    report = preprocess(folder, captions, wan_model, out, **SIZE)
    dataset = LatentDataset(out)
    assert [dataset.file(i) for i in range(len(dataset))] == sound and report.done == 4
    reasons = [
        *odd.values(),
        "the line has a lone surrogate",
        "the line is nested",
        "the caption is empty once",
    ]
    assert [entry.line for entry in report.broken] == list(range(5, len(lines) + 1))
    for entry, reason in zip(report.broken, reasons, strict=True):
        assert entry.reason.startswith(reason)
    listed = [
        Broken(**json.loads(line))
        for line in (out / "broken.jsonl").read_text("utf-8").split("\n")[:-1]
    ]
    assert tuple(listed) == report.broken

    again = preprocess(folder, captions, wan_model, out, allow_outside=True, **SIZE)
    assert (again.done, again.skipped) == (3, 4)
    assert "is a device" in next(
        entry.reason for entry in again.broken if entry.file == "/dev/zero"
    )


def test_a_caption_with_a_comma_without_quotes_is_left_out_and_named(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    captions = tmp_path / "c.csv"
    captions.write_text("file,caption\n0.mp4,a disc, red\n1.mp4,a cross\n")
    report = preprocess(videos, captions, wan_model, tmp_path / "out", **SIZE)
    assert [(entry.line, entry.file) for entry in report.broken] == [(2, "0.mp4")]
    dataset = LatentDataset(tmp_path / "out")
    assert [(dataset.file(i), dataset.caption(i)) for i in range(len(dataset))] == [
        ("1.mp4", "a cross")
    ]


def test_prompts_are_cleaned_as_those_of_the_published_models(wan_model: Path) -> None:
    """Compare with what ftfy 6.3.1 documents: quotes, ligatures, full-width commas, mojibake."""
    pairs = {
        "a man\u2019s \u201cred\u201d disc": 'a man\'s "red" disc',
        "a \ufb01ne disc": "a fine disc",
        "sch\u00c3\u00b6n": "sch\u00f6n",
        "静态\uff0c静止": "静态,静止",
        " the  blue\ncross &amp;amp; a disc ": "the blue cross & a disc",
    }
    assert {raw: clean_prompt(raw) for raw in pairs} == pairs
    encoder = TextEncoder(wan_model, torch.device("cpu"), dtype=torch.float32, text_length=12)
    for raw, clean in pairs.items():
        assert torch.equal(encoder(raw), encoder(clean))


def test_a_video_may_have_several_captions_but_not_one_twice(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    lines = tmp_path / "c.jsonl"
    lines.write_text(
        "".join(json.dumps({"file": "0.mp4", "caption": text}) + "\n" for text in ("a", "red", "a"))
    )
    for done, skipped in ((2, 0), (0, 2)):
        report = preprocess(videos, lines, wan_model, tmp_path / "out", **SIZE)
        assert (report.done, report.skipped) == (done, skipped)
        assert report.broken == (Broken(3, "0.mp4", "the same file and caption as line 1"),)
    dataset = LatentDataset(tmp_path / "out")
    assert [dataset.caption(i) for i in range(2)] == ["a", "red"]
    assert torch.equal(dataset[0].latents, dataset[1].latents)


def test_a_model_with_missing_or_foreign_weights_is_refused(
    wan_model: Path, tmp_path: Path
) -> None:
    for part, load in (
        ("vae", lambda model: LatentEncoder(model, torch.device("cpu"))),
        (
            "text_encoder",
            lambda model: TextEncoder(
                model, torch.device("cpu"), dtype=torch.float32, text_length=12
            ),
        ),
    ):
        model = shutil.copytree(wan_model, tmp_path / part)
        weights = next((model / part).glob("*.safetensors"))
        tensors = load_file(weights)
        tensors["renamed"] = tensors.pop(sorted(tensors)[3])
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=rf"{part} does not hold.*(missing.*unexpected|unexpected.*missing)"
        ):
            load(model)
        shutil.rmtree(model / part)
        with pytest.raises(ValueError, match=f"has no {part}/"):
            load(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 8}, r"num_frames must be 4k \+ 1, got 8"),
        ({"num_frames": 0}, "num_frames must be a positive number, got 0"),
        ({"height": 72}, "height must be a multiple of 16, got 72"),
        ({"width": 8}, "width must be a multiple of 16, got 8"),
        ({"fps": float("nan")}, "fps must be a positive number, got nan"),
        ({"text_length": 0}, "text_length must"),
        ({"dtype": "fp8"}, "dtype must be one of bfloat16, float32, got 'fp8'"),
        ({"num_workers": 0}, "num_workers must be >= 1, got 0"),
        ({"samples_per_shard": 0}, "samples_per_shard must be >= 1, got 0"),
        ({"videos": Path("absent")}, "videos must be a folder, got absent"),
        ({"captions": Path("absent.csv")}, "captions: absent.csv does not exist"),
        ({"model": Path("absent")}, "no folder absent"),
    ],
)
def test_unusable_arguments_are_refused_before_anything_is_written(
    videos: Path, wan_model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arguments = {
        "videos": videos,
        "captions": table(tmp_path / "c.csv", CAPTIONS),
        "model": wan_model,
        **SIZE,
    }
    with pytest.raises(ValueError, match=message):
        preprocess(**arguments | change, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vae_that_gives_nan_breaks_its_videos_and_stores_none(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(wan_model, tmp_path / "model")
    weights = next((model / "vae").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"][0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(NothingEncodedError) as caught:
        preprocess(videos, table(tmp_path / "c.csv", CAPTIONS), model, tmp_path / "out", **SIZE)
    assert {entry.reason for entry in caught.value.report.broken} == {
        "its latents come out as NaN or infinity"
    }
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["broken.jsonl"]


def test_the_negative_prompt_is_wans_by_default(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    preprocess(
        videos, table(tmp_path / "c.csv", {"0.mp4": "a"}), wan_model, tmp_path / "out", **SIZE
    )
    assert LatentDataset(tmp_path / "out").info.source["negative_prompt"] == WAN_NEGATIVE_PROMPT
    assert len(WAN_NEGATIVE_PROMPT.split("，")) == 28
