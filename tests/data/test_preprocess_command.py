"""Test the command `anyflow preprocess`."""

import shutil
from io import StringIO
from pathlib import Path

import torch
from captioned import CAPTIONS, SIZE, table
from rich.console import Console
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.data.latent_dataset import LatentDataset, shards
from anyflow.data.preprocess import (
    preprocess,
)


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
