"""Test the real loggers without a network."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from anyflow.training.trackers import Trackers, check_loggers, run_id

CONFIG = {
    "stage": "pretrain",
    "optimizer.lr": 1e-4,
    "student.path": None,
    "optimizer.betas": (0.9, 0.95),
}


@pytest.fixture
def gif(tmp_path: Path) -> Path:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "preview.gif", save_all=True, append_images=frames[1:])
    return tmp_path / "preview.gif"


def _log(folder: Path, loggers: tuple[Any, ...], start: int, steps: range, video: Path) -> None:
    with Trackers(loggers, folder, "project", CONFIG, start) as trackers:
        for step in steps:
            trackers.log(step, {"loss": step / 10, "metrics/psnr/4_steps": 20.0 + step})
        trackers.log_video(steps[-1], "preview", video)


def test_tensorboard_has_the_scalars_the_recipe_and_the_preview(tmp_path: Path, gif: Path) -> None:
    """Resume after step 2 with a second run, which drops the first run's later values."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    run.mkdir()
    _log(run, ("tensorboard",), 0, range(1, 5), gif)
    _log(run, ("tensorboard",), 2, range(3, 4), gif)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (s, pytest.approx(s / 10)) for s in (1, 2, 3)
    ]
    (image,) = events.Images("preview")
    assert (
        image.step == 3
        and image.encoded_image_string == gif.read_bytes()
        and (image.width, image.height) == (8, 6)
    )
    (settings,) = (run / "tensorboard").glob("*/hparams.yml")
    assert "optimizer.betas: '[0.9, 0.95]'" in settings.read_text()


def _wandb_records(folder: Path) -> list[Any]:
    """Return what an offline run holds, when its service has written the last record."""
    (file,) = folder.glob("run-*.wandb")
    deadline = time.monotonic() + 60
    while True:
        records = _parsed(file.read_bytes())
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _parsed(content: bytes) -> list[Any]:
    """Parse records in the format of LevelDB's log, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, head = 2**15, 7
    records, position, parts = [], head, b""
    while position + head <= len(content):
        left = block - position % block
        if left < head:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + head : position + head + length]
        position += head + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.slow
def test_weights_and_biases_knows_a_run_that_goes_on(
    tmp_path: Path, gif: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    run.mkdir()
    _log(run, ("wandb",), 0, range(1, 4), gif)
    _log(run, ("wandb",), 3, range(4, 6), gif)
    first, second = sorted(
        (run / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_ctime
    )
    started = [next(r.run for r in _wandb_records(f) if r.HasField("run")) for f in (first, second)]
    assert {r.run_id for r in started} == {run_id(run)} and {r.project for r in started} == {
        "project"
    }
    config = {item.key: json.loads(item.value_json) for item in started[0].config.update}
    assert {name: config[name] for name in ("optimizer.lr", "student.path")} == {
        "optimizer.lr": 1e-4,
        "student.path": None,
    }
    lines = [r.history for r in _wandb_records(second) if r.HasField("history")]
    logged = [
        {i.key or i.nested_key[0]: json.loads(i.value_json) for i in line.item} for line in lines
    ]
    assert [line["loss"] for line in logged if "loss" in line] == [0.4, 0.5]
    assert [line["metrics/psnr/4_steps"] for line in logged if "loss" in line] == [24.0, 25.0]
    assert [line["_step"] for line in logged if "preview" in line] == [5]
    (video,) = (second / "files" / "media" / "videos").rglob("*.gif")
    assert video.read_bytes() == gif.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"trackio needs the package trackio, which is not installed: pip install trackio$",
    ):
        check_loggers(("trackio",))
    check_loggers(())


def test_a_run_has_one_id(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first and len(first) == 8
    (tmp_path / "run_id").write_text("../elsewhere\n")
    with pytest.raises(ValueError, match=r"run_id must hold 1 to 64 letters.*delete it"):
        run_id(tmp_path)


STATE = """
import os, sys, torch.distributed as dist
from pathlib import Path
os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")
from anyflow.training.trackers import Trackers
from accelerate.state import PartialState
with Trackers(("tensorboard",), Path(sys.argv[1]), "project", {}, 0) as trackers:
    trackers.log(1, {"loss": 1.0})
    state = PartialState()
    print(dist.is_initialized(), state.num_processes, state.device.type, os.environ["LOCAL_RANK"])
print(PartialState._shared_state == {}, "ACCELERATE_TORCH_DEVICE" in os.environ)
"""


@pytest.mark.slow
def test_accelerate_gets_no_process_group_and_leaves_no_state(tmp_path: Path) -> None:
    """Set the variables of torchrun for one process, for which training has no process group."""
    pytest.importorskip("tensorboard")
    result = subprocess.run(
        [sys.executable, "-c", STATE, str(tmp_path)], capture_output=True, text=True, env=os.environ
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["False 1 cpu 0", "True False"]


def test_a_logger_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("no folder")
    with pytest.raises(ValueError, match="loggers: tensorboard does not start: ") as raised:
        Trackers(("tensorboard",), tmp_path, "project", {}, 0)
    assert "\n" not in str(raised.value)
