"""Test preprocessing into a folder that has samples already: resumed, refused, warned of."""

import dataclasses
import importlib.metadata
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from captioned import SIZE, table
from safetensors.torch import load_file, save_file

from anyflow.data import open_dataset
from anyflow.data.latent_dataset import LatentDataset, shards
from anyflow.data.latent_format import read_record, write_record
from anyflow.data.preprocess import (
    NothingEncodedError,
    PreprocessReport,
    preprocess,
)
from anyflow.training.config import DataConfig


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
