"""Test preprocessing with a tiny Wan model, against diffusers' own pipeline."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnyFlowPipeline, AutoencoderKLWan
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.data import open_dataset
from anyflow.data.captions import Broken
from anyflow.data.encoders import LatentEncoder, TextEncoder
from anyflow.data.latent_dataset import LatentDataset, shards
from anyflow.data.latent_format import read_record, write_record
from anyflow.data.preprocess import (
    WAN_NEGATIVE_PROMPT,
    NothingEncodedError,
    PreprocessReport,
    preprocess,
)
from anyflow.data.video import read_video
from anyflow.pipelines.wan import clean_prompt
from anyflow.training.config import DataConfig

WriteVideo = Callable[..., Path]
SIZE: dict[str, Any] = {
    "num_frames": 9,
    "height": 64,
    "width": 64,
    "text_length": 12,
    "dtype": "fp32",
}
CAPTIONS = {
    "0.mp4": "a red disc moves slowly",
    "1.mp4": "the  blue\ncross &amp; a disc",
    "2.mp4": "a cross",
}


@pytest.fixture(scope="module")
def videos(write_video: WriteVideo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write twelve videos of noise, ``0.mp4`` to ``11.mp4``."""
    folder = tmp_path_factory.mktemp("videos")
    random = np.random.default_rng(0)
    for i in range(12):
        blocks = random.integers(0, 256, (9, 8, 8, 3), np.uint8)
        write_video(folder / f"{i}.mp4", list(blocks.repeat(8, axis=1).repeat(8, axis=2)))
    return folder


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


def table(path: Path, captions: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("file", "caption"), *captions.items()])
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


def test_a_dataset_has_the_versions_that_made_it_and_a_change_is_said_once(
    videos: Path, wan_model: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    out, captions = tmp_path / "out", table(tmp_path / "c.csv", {"0.mp4": "a"})
    preprocess(videos, captions, wan_model, out, **SIZE)
    record = read_record(out)
    assert record.packages is not None
    assert record.packages["ftfy"] == [importlib.metadata.version("ftfy")]
    assert {"av", "libswscale", "transformers", "diffusers", "tokenizers", "torch"} <= set(
        record.packages
    )
    open_dataset(DataConfig(path=str(out)))
    assert not [warning for warning in recwarn if str(out) in str(warning.message)]

    write_record(
        out,
        dataclasses.replace(record, packages={**record.packages, "ftfy": [None], "av": ["9.0"]}),
    )
    with pytest.warns(UserWarning, match="may have been encoded without ftfy"):
        open_dataset(DataConfig(path=str(out)))
    with pytest.warns(
        UserWarning,
        match=rf"{out} was begun with other versions \(ftfy not installed, here .*; av 9\.0",
    ) as said:
        preprocess(videos, table(captions, {"0.mp4": "a", "1.mp4": "b"}), wan_model, out, **SIZE)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    mixed = read_record(out).packages
    assert mixed is not None and mixed["ftfy"] == [importlib.metadata.version("ftfy"), None]

    packages = {**record.packages, "transformers": ["4.50.0"]}
    write_record(out, dataclasses.replace(read_record(out), packages=packages))
    with pytest.warns(
        UserWarning, match=r"encoded with other versions \(transformers 4\.50\.0, here"
    ):
        open_dataset(DataConfig(path=str(out)))
    write_record(out, dataclasses.replace(read_record(out), packages=None))
    with pytest.warns(UserWarning, match="does not say what made it"):
        open_dataset(DataConfig(path=str(out)))


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


def test_the_command_verifies_every_row(videos: Path, wan_model: Path, tmp_path: Path) -> None:
    out, runner = tmp_path / "out", CliRunner()
    preprocess(videos, table(tmp_path / "c.csv", CAPTIONS), wan_model, out, **SIZE)
    verify = ["preprocess", "--verify", "--out", str(out)]
    result = runner.invoke(app, verify)
    assert result.exit_code == 0 and "every sample is what was written" in result.output
    (shard,) = shards(out)
    content = bytearray(shard.read_bytes())
    content[content.index(LatentDataset(out)[1].latents.numpy().tobytes())] ^= 1
    shard.write_bytes(content)
    result = runner.invoke(app, verify)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "shard-000000.arrow, sample 1 of it (1.mp4) is damaged" in result.stderr
    assert runner.invoke(app, [*verify[:-1], str(tmp_path / "none")]).exit_code == 2
    result = runner.invoke(app, ["preprocess", "--out", str(out)])
    assert result.exit_code == 2 and "--videos is missing" in result.stderr


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


def test_a_finished_run_is_not_repeated_and_can_be_added_to(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    out, captions = tmp_path / "out", tmp_path / "c.csv"
    preprocess(videos, table(captions, {"0.mp4": "a", "1.mp4": "red"}), wan_model, out, **SIZE)
    before = contents(out)
    assert preprocess(videos, captions, wan_model, out, **SIZE) == PreprocessReport(0, 2, ())
    assert contents(out) == before
    table(captions, {"0.mp4": "a", "2.mp4": "disc", "1.mp4": "red"})
    assert preprocess(videos, captions, wan_model, out, **SIZE) == PreprocessReport(1, 2, ())
    assert [LatentDataset(out).file(i) for i in range(3)] == ["0.mp4", "1.mp4", "2.mp4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 5}, "num_frames: 9 there, 5 now"),
        ({"height": 32}, "height: 64 there, 32 now"),
        ({"fps": 8}, "fps: 16 there, 8 now"),
        ({"negative_prompt": ""}, "negative_prompt: "),
        ({"dtype": "bf16"}, "dtype: 'fp32' there, 'bf16' now"),
    ],
)
def test_another_run_with_other_settings_is_refused(
    videos: Path, wan_model: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    captions = table(tmp_path / "c.csv", {"0.mp4": "a"})
    preprocess(videos, captions, wan_model, tmp_path / "out", **SIZE)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=f"other settings.*{message}"):
        preprocess(videos, captions, wan_model, tmp_path / "out", **SIZE | change)
    assert contents(tmp_path / "out") == before


def test_another_run_with_another_model_is_refused(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    captions = table(tmp_path / "c.csv", {"0.mp4": "a"})
    preprocess(videos, captions, wan_model, tmp_path / "out", **SIZE)
    other = shutil.copytree(wan_model, tmp_path / "other")
    assert preprocess(videos, captions, other, tmp_path / "out", **SIZE).skipped == 1
    weights = next((other / "vae").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="other settings.*model"):
        preprocess(videos, captions, other, tmp_path / "out", **SIZE)


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


def test_nothing_that_can_be_used_is_an_error_and_the_folder_is_free_for_a_mended_run(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    out, captions = (
        tmp_path / "out",
        table(tmp_path / "c.csv", {"none.mp4": "a", "1.mp4": "&nbsp;"}),
    )
    message = (
        r"none of the 2 captioned videos of .*c\.csv .*: line 2 of .* \(none\.mp4\): "
        "it is not in "
    )
    for size in (SIZE, SIZE | {"num_frames": 5}):
        with pytest.raises(NothingEncodedError, match=message):
            preprocess(videos, captions, wan_model, out, **size)
        assert [path.name for path in out.iterdir()] == ["broken.jsonl"]
        assert len((out / "broken.jsonl").read_text().splitlines()) == 2
    with pytest.raises(NothingEncodedError, match="too short: 9 frames"):
        preprocess(
            videos, table(captions, {"1.mp4": "a"}), wan_model, out, **SIZE | {"num_frames": 13}
        )
    assert preprocess(videos, captions, wan_model, out, **SIZE) == PreprocessReport(1, 0, ())
    before = contents(out)
    with pytest.raises(NothingEncodedError):
        preprocess(videos, table(captions, {"none.mp4": "a"}), wan_model, out, **SIZE)
    del before["broken.jsonl"]
    assert {
        name: content for name, content in contents(out).items() if name != "broken.jsonl"
    } == before
    assert LatentDataset(out).file(0) == "1.mp4"


def test_a_run_killed_before_its_first_shard_leaves_the_folder_free(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    out, captions = tmp_path / "out", table(tmp_path / "c.csv", {"1.mp4": "a"})
    preprocess(videos, captions, wan_model, out, **SIZE)
    write_record(out, dataclasses.replace(read_record(out), num_samples=None, shards={}))
    for path in shards(out):
        path.unlink()
    assert preprocess(videos, captions, wan_model, out, **SIZE | {"num_frames": 5}).done == 1
    assert LatentDataset(out).latent_shape[0] == 2


def test_the_command_says_what_an_empty_result_is_with_status_1(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    runner, out, empty = CliRunner(), tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    common = ["preprocess", "--model", str(wan_model), "--out", str(out)]

    def run(*arguments: object) -> tuple[int, str]:
        result = runner.invoke(app, [*common, *map(str, arguments)])
        assert result.exit_code and "Traceback" not in result.output
        return result.exit_code, result.stderr

    status, said = run(
        "--videos", videos, "--captions", table(tmp_path / "none.csv", {"none.mp4": "a"})
    )
    assert status == 1 and "none of the 1 captioned videos" in said
    assert [path.name for path in out.iterdir()] == ["broken.jsonl"]
    for arguments, message in (
        (
            ["--videos", videos, "--captions", table(tmp_path / "empty.csv", {})],
            "empty.csv has no captions",
        ),
        (["--videos", empty], "empty holds no videos"),
        (["--videos", videos], "no captions: "),
    ):
        status, said = run(*arguments)
        assert status == 1 and message in said and said.count("\n") == 1
    (tmp_path / "odd.csv").write_text("clip,words\n0.mp4,a\n")
    status, said = run("--videos", videos, "--captions", tmp_path / "odd.csv")
    assert status == 2 and "'clip', 'words'" in said and "'file_name'" in said


def test_the_command_takes_a_text_file_beside_each_video_and_columns_by_name(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("0.mp4", "1.mp4", "2.mp4"):
        shutil.copy(videos / name, folder)
    (folder / "0.txt").write_text("a red disc")
    (folder / "2.txt").write_text("a cross")
    (folder / "metadata.csv.off").write_text("")
    size = [
        "--num-frames",
        "9",
        "--height",
        "64",
        "--width",
        "64",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]
    common = ["preprocess", "--videos", str(folder), "--model", str(wan_model), *size]
    result = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "a b")])
    assert result.exit_code == 0, result.output
    assert "left out: 1.mp4: it has no caption" in result.output
    assert f"anyflow train anyflow_pretrain_t2v 'data.path={tmp_path / 'a b'}'" in result.output
    dataset = LatentDataset(tmp_path / "a b")
    assert [(dataset.file(i), dataset.caption(i)) for i in range(len(dataset))] == [
        ("0.mp4", "a red disc"), ("2.mp4", "a cross")
    ]  # fmt: skip
    (folder / "metadata.csv").write_text("clip,text,prompt\n1.mp4,a,red\n")
    columns = ["--file-column", "clip", "--caption-column", "prompt"]
    result = CliRunner().invoke(app, [*common, *columns, "--out", str(tmp_path / "c")])
    assert result.exit_code == 0, result.output
    assert LatentDataset(tmp_path / "c").caption(0) == "red"


def test_progress_is_shown_on_the_console_and_the_global_generator_left_alone(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    screen = StringIO()
    state = torch.get_rng_state()
    captions = table(tmp_path / "c.csv", CAPTIONS)
    preprocess(
        videos,
        captions,
        wan_model,
        tmp_path / "out",
        console=Console(file=screen, width=80),
        **SIZE,
    )
    assert "encoding" in screen.getvalue() and "100%" in screen.getvalue()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_negative_prompt_is_wans_by_default(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    preprocess(
        videos, table(tmp_path / "c.csv", {"0.mp4": "a"}), wan_model, tmp_path / "out", **SIZE
    )
    assert LatentDataset(tmp_path / "out").info.source["negative_prompt"] == WAN_NEGATIVE_PROMPT
    assert len(WAN_NEGATIVE_PROMPT.split("，")) == 28


@pytest.mark.slow
def test_a_run_that_is_killed_and_run_again_gives_the_dataset_of_one_that_was_not(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    captions = table(
        tmp_path / "c.csv", {f"{i}.mp4": f"a disc {i}" for i in (*range(5), 99, *range(5, 12))}
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    program = (
        "import sys, torch; from pathlib import Path; from anyflow.data.preprocess import "
        "preprocess;"
        "torch.set_num_threads(2);"
        "videos, captions, model, out = map(Path, sys.argv[1:]);"
        f"preprocess(videos, captions, model, out, samples_per_shard=2, **{SIZE!r})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, (videos, captions, wan_model, killed))]
    )
    while process.poll() is None and len(shards(killed)) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(shards(killed)) < 6
    with pytest.raises(ValueError, match="not finished"):
        LatentDataset(killed)
    first = contents(killed)["shard-000000.arrow"]

    for out in (killed, whole):
        preprocess(videos, captions, wan_model, out, samples_per_shard=2, **SIZE)
    assert contents(killed) == contents(whole)
    assert contents(killed)["shard-000000.arrow"] == first
    dataset = LatentDataset(killed)
    assert [dataset.file(i) for i in range(len(dataset))] == [f"{i}.mp4" for i in range(12)]


def test_the_command_makes_a_dataset_that_the_training_command_takes(
    videos: Path, wan_model: Path, tmp_path: Path
) -> None:
    runner, captions = CliRunner(), table(tmp_path / "c.csv", {**CAPTIONS, "none.mp4": "nothing"})
    places = [
        "--videos",
        videos,
        "--captions",
        captions,
        "--model",
        wan_model,
        "--out",
        tmp_path / "data",
    ]
    size = [
        "--num-frames",
        9,
        "--height",
        64,
        "--width",
        64,
        "--text-length",
        12,
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]
    result = runner.invoke(app, ["preprocess", *map(str, [*places, *size])])
    assert result.exit_code == 0, result.output
    assert "3 videos encoded" in result.output and "none.mp4" in result.output
    text_dim = LatentDataset(tmp_path / "data").text_shape[1]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"stage: pretrain\nout: {tmp_path / 'run'}\nsteps: 2\ndevice: cpu\nprecision: fp32\n"
        f"data: {{path: {tmp_path / 'data'}, batch_size: 2, num_workers: 0}}\n"
        "student: {architecture: {num_attention_heads: 2, attention_head_dim: 12, num_layers: 1, "
        "ffn_dim: 32, "
        f"freq_dim: 16, text_dim: {text_dim}}}}}\n"
    )
    result = runner.invoke(app, ["train", str(recipe)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "model" / "transformer" / "config.json").is_file()
