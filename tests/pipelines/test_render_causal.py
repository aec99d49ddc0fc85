"""Test `anyflow sample` with a causal model: budgets, streams, switches, first frames, a kill."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_causal import write_causal_model
from tiny_runs import PROMPTS, folder_of, run
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.evaluation.runs.models import PipelineModel
from anyflow.pipelines import AnyFlowFARPipeline, write_video
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.pipelines.sample_settings import SampleSettings

HEIGHT, WIDTH, NUM_FRAMES = 32, 64, 13
BRIGHTNESS = np.array([0.2126, 0.7152, 0.0722])


@pytest.fixture(scope="module")
def causal(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal_model(model, tmp_path_factory.mktemp("causal") / "model")


@pytest.fixture
def settings(causal: Path) -> SampleSettings:
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES}
    return SampleSettings(str(causal), **size, fps=8, dtype="float32")


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def distance(video: np.ndarray, other: np.ndarray) -> float:
    """Return the mean difference in brightness; H.264 halves the resolution of colors."""
    return float(np.abs((video.astype(float) - other) @ BRIGHTNESS).mean())


def entries(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["videos"]


def test_budgets_make_the_videos_of_the_pipeline(
    settings: SampleSettings, causal: Path, tmp_path: Path
) -> None:
    budgets = {(3, 1): [3, 1, 1], 2: 2}
    assert run(settings, tmp_path, PROMPTS[:1], tuple(budgets)).done == 2
    assert [entry["steps"] for entry in entries(tmp_path)] == [[3, 1], 2]
    folder = folder_of(tmp_path, "a-red")
    assert sorted(p.name for p in folder.iterdir()) == [
        "comparison-seed-3.mp4", "steps-02-seed-3.mp4", "steps-03+01-seed-3.mp4"
    ]  # fmt: skip
    pipe = AnyFlowFARPipeline.from_pretrained(causal, dtype=torch.float32, device="cpu")
    size = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES}
    made = {
        name: 255 * pipe(PROMPTS[0], num_inference_steps=steps, seed=3, **size).frames[0]
        for name, steps in zip(("steps-03+01", "steps-02"), budgets.values(), strict=True)
    }
    written = {name: frames_of(folder / f"{name}-seed-3.mp4") for name in made}
    same = [distance(written[name], made[name]) for name in made]
    assert distance(written["steps-02"], made["steps-03+01"]) > 1.5 * max(same), same
    report = run(settings, tmp_path, PROMPTS[:1], (2, (3, 1, 1)))
    assert (report.done, report.skipped) == (0, 2)


def test_a_stream_writes_the_same_video_and_tells_when_each_chunk_is_there(
    settings: SampleSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings, tmp_path / "whole", PROMPTS[:1], ((2, 1), 1))
    console = Console(soft_wrap=True)
    report = run(settings, tmp_path / "out", PROMPTS[:1], ((2, 1),), stream=True, console=console)
    assert report.failed == () and report.done == 1
    files = [
        folder_of(tmp_path / out, "a-red") / "steps-02+01-seed-3.mp4" for out in ("whole", "out")
    ]
    whole, streamed = map(frames_of, files)
    other = frames_of(files[0].with_name("steps-01-seed-3.mp4"))
    assert streamed.shape == (13, HEIGHT, WIDTH, 3)
    assert distance(other, streamed) > 1.5 * distance(whole, streamed)
    assert [p.name for p in files[1].parent.iterdir()] == ["steps-02+01-seed-3.mp4"]
    (entry,) = entries(tmp_path / "out")
    assert [chunk["frames"] for chunk in entry["chunks"]] == [1, 8, 4]
    seconds = [chunk["seconds"] for chunk in entry["chunks"]]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert set(entry["seconds"]) == {"encode", "sample", "decode"}
    assert 0 < entry["seconds"]["sample"] + entry["seconds"]["decode"] < seconds[2]
    lines = [line for line in capsys.readouterr().out.splitlines() if "partial" in line]
    said = [line.partition(".partial.mp4: ")[2].partition(" after ")[0] for line in lines]
    assert said == [
        "chunk 0, 1 of 13 frames",
        "chunk 1, 9 of 13 frames",
        "chunk 2, 13 of 13 frames",
    ]


@pytest.mark.slow
def test_a_killed_stream_leaves_frames_to_see_and_is_made_anew(
    causal: Path, tmp_path: Path
) -> None:
    """Kill the command in its last chunk, which takes long."""
    size = ["--height", str(HEIGHT), "--width", str(WIDTH), "--num-frames", str(NUM_FRAMES)]
    command = [
        "sample", "--model", str(causal), "--out", str(tmp_path), "--prompt", PROMPTS[0], *size,
        "--device", "cpu", "--dtype", "fp32", "--stream", "--steps", "1+1+150",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "anyflow", *command],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "chunk 1, 9 of 13 frames" in line:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    (partial,) = tmp_path.glob("*/*.mp4")
    assert partial.name == "steps-01+01+150-seed-0.partial.mp4"
    assert frames_of(partial).shape == (9, HEIGHT, WIDTH, 3) and entries(tmp_path) == []
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "1 video made, 0 there already" in result.output
    (file,) = tmp_path.glob("*/*.mp4")
    assert file.name == "steps-01+01+150-seed-0.mp4" and len(frames_of(file)) == NUM_FRAMES
    assert "0 videos made, 1 there already" in CliRunner().invoke(app, command).output


def test_a_stream_that_fails_leaves_no_file(settings: SampleSettings, tmp_path: Path) -> None:
    """Let the text of the last chunk be NaN: chunks before it are written by then."""
    from safetensors.torch import load_file, save_file

    folder = write_causal_model(Path(settings.model), tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["shared.weight"][3 + 4] = float("nan")  # of the word "cross"
    save_file(weights, file, {"format": "pt"})
    broken = dataclasses.replace(settings, model=str(folder), prompt_switches=((2, "a cross"),))
    report = run(broken, tmp_path / "out", PROMPTS[:1], (1,), stream=True)
    assert report.done == 0 and "NaN" in report.failed[0].reason
    assert not list((tmp_path / "out").rglob("*.mp4")) and entries(tmp_path / "out") == []


def test_a_switch_of_the_prompt_changes_the_chunks_from_it_on(
    settings: SampleSettings, tmp_path: Path
) -> None:
    switched = dataclasses.replace(settings, prompt_switches=((2, "bad quality"),))
    for name, one in (("plain", settings), ("switched", switched)):
        assert run(one, tmp_path / name, PROMPTS[:1], (2,)).failed == ()
    plain, other = (
        frames_of(folder_of(tmp_path / name, "a-red") / "steps-02-seed-3.mp4")
        for name in ("plain", "switched")
    )
    assert distance(plain[:9], other[:9]) < 0.5 < 1 < distance(plain[9:], other[9:])
    content = json.loads((tmp_path / "switched" / "results.json").read_text())
    assert content["settings"]["prompt_switches"] == [[2, "bad quality"]]
    assert run(switched, tmp_path / "switched", PROMPTS[:1], (2,)).skipped == 1
    with pytest.raises(ValueError, match="prompt_switches .* is now None"):
        run(settings, tmp_path / "switched", PROMPTS[:1], (2,))


def test_chunks_and_the_cache_are_chosen(settings: SampleSettings, tmp_path: Path) -> None:
    """Expect other videos of other chunks and a window, and the same one of another device."""
    four = dataclasses.replace(settings, chunks=(1, 1, 1, 1))
    ways = {
        "three": (settings, {}),
        "four": (four, {}),
        "waiting": (four, {"cache_device": "cpu"}),
        "window": (dataclasses.replace(four, cache_window=1), {}),
    }
    videos = {}
    for name, (one, options) in ways.items():
        assert run(one, tmp_path / name, PROMPTS[:1], (1,), **options).failed == ()
        (file,) = (tmp_path / name).glob("*/steps-01-seed-3.mp4")
        videos[name] = frames_of(file)
    assert distance(videos["three"], videos["four"]) > 0.1
    assert distance(videos["window"], videos["four"]) > 0
    assert distance(videos["waiting"], videos["four"]) == 0
    content = json.loads((tmp_path / "window" / "results.json").read_text())
    assert content["settings"]["chunks"] == [1, 1, 1, 1]
    assert content["settings"]["cache_window"] == 1


def test_a_folder_without_settings_of_chunks_is_continued(
    settings: SampleSettings, tmp_path: Path
) -> None:
    run(settings, tmp_path, PROMPTS[:1], (1,))
    file = tmp_path / "results.json"
    content = json.loads(file.read_text())
    for name in ("chunks", "cache_window", "prompt_switches"):
        del content["settings"][name]
    file.write_text(json.dumps(content))
    assert run(settings, tmp_path, PROMPTS[:1], (1, 2)).skipped == 1


@pytest.mark.parametrize(
    ("given", "first"), [("image", 1), ("video", 9), ("two frames of a video", 1)]
)
def test_videos_begin_with_frames_that_fill_chunks(
    given: str, first: int, causal: Path, tmp_path: Path
) -> None:
    """Take as many frames of a file as end with a chunk; the video goes on from them."""
    source = np.zeros((2 if given.startswith("two") else 12, HEIGHT, WIDTH, 3), np.uint8)
    source[..., 0] = 220
    options = ["--video", str(tmp_path / "clip.mp4"), "--fps", "8"]
    if given == "image":
        Image.fromarray(source[0]).save(tmp_path / "first.png")
        options = ["--image", str(tmp_path / "first.png")]
    else:
        write_video(source, tmp_path / "clip.mp4", fps=8)
    size = ["--height", str(HEIGHT), "--width", str(WIDTH), "--num-frames", "21"]
    fixed = ["--chunks", "1,2,3", "--device", "cpu", "--dtype", "fp32", "--steps", "1", "--stream"]
    result = CliRunner().invoke(
        app,
        ["sample", "--model", str(causal), "--out", str(tmp_path / "out"), "--prompt", PROMPTS[0],
         *size, *fixed, *options],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (entry,) = entries(tmp_path / "out")
    assert [chunk["frames"] for chunk in entry["chunks"]] == [1, 8, 12]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["settings"]["video_frames"] == (None if given == "image" else first)


def test_an_evaluation_samples_a_causal_model_and_counts_its_steps(
    settings: SampleSettings,
) -> None:
    chosen = dataclasses.replace(settings, chunks=(1, 3))
    model = PipelineModel(chosen, device="cpu")
    prompt = VideoPrompt(PROMPTS[0])
    model.check([prompt])
    assert model.sampler()["chunks"] == [1, 3]
    seen: list[int] = []
    frames = model.load([prompt]).frames(prompt, 2, 0, lambda index, t, x: seen.append(index))
    assert len(frames) == NUM_FRAMES and seen == [0, 1]
    with pytest.raises(ValueError, match="cuda_graph is not available for causal models"):
        dataclasses.replace(model, cuda_graph=True).check([prompt])
