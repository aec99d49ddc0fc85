"""`anyflow sample` as a function: real files from a tiny model, resuming, failures, and what it refuses."""

import dataclasses
import importlib.metadata
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.pipelines import AnyFlowPipeline
from anyflow.pipelines.render import (
    SampleReport,
    SampleSettings,
    _folder_name,
    parse_steps,
    read_prompts,
    sample_command,
)

WORDS = ["a", "red", "blue", "disc", "cross"]  # as the model's vocabulary begins, after three special tokens
PROMPTS = ["a red disc moves slowly", "a blue cross: stops!"]
STEPS = (1, 2, 4)


@pytest.fixture
def settings(model: Path) -> SampleSettings:
    return SampleSettings(str(model), height=32, width=48, num_frames=9, fps=8, dtype="fp32", seed=3)


def run(settings: SampleSettings, out: Path, prompts=PROMPTS, steps=STEPS, **options: Any) -> SampleReport:
    return sample_command(settings, prompts, steps, out, device="cpu", **options)


def folder_of(out: Path, start: str) -> Path:
    (folder,) = out.glob(f"{start}-*")
    return folder


def probe(path: Path) -> tuple[int, int, int, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return len(frames), stream.height, stream.width, float(stream.average_rate)


def test_every_prompt_at_every_step_count_and_a_comparison(settings, tmp_path: Path) -> None:
    report = run(settings, tmp_path / "out")
    assert (report.done, report.skipped, report.failed) == (6, 0, ())
    entries = json.loads((tmp_path / "out" / "results.json").read_text())["videos"]
    assert [(e["prompt"], e["steps"]) for e in entries] == [(p, s) for p in PROMPTS for s in STEPS]
    for entry in entries:
        assert probe(tmp_path / "out" / entry["file"]) == (9, 32, 48, 8)
        assert set(entry["seconds"]) == {"encode", "sample", "decode"} and min(entry["seconds"].values()) > 0
        assert entry["peak_memory_bytes"] > 2**20
    folder = folder_of(tmp_path / "out", "a-blue-cross-stops")
    assert sorted(p.name for p in folder.iterdir()) == [
        "comparison.mp4", "steps-01.mp4", "steps-02.mp4", "steps-04.mp4",
    ]  # fmt: skip
    scale = 4  # to be at least 160 pixels wide
    assert probe(folder / "comparison.mp4") == (9, 32 * scale + 24 + 16, 3 * (48 * scale + 8) + 8, 8)


def test_a_file_is_what_the_pipeline_makes(settings, model, tmp_path: Path) -> None:
    """In brightness: H.264 halves the resolution of colors, and these are noise."""
    run(settings, tmp_path / "out", PROMPTS[:1])
    pipe = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")
    folder = folder_of(tmp_path / "out", "a-red")
    errors = {}
    for steps in STEPS:
        (images,) = pipe(PROMPTS[0], height=32, width=48, num_frames=9, num_inference_steps=steps, seed=3).frames
        expected = 255 * images
        for written in STEPS:
            with av.open(str(folder / f"steps-{written:02d}.mp4")) as container:
                pixels = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
            errors[steps, written] = float(np.abs((pixels - expected) @ [0.2126, 0.7152, 0.0722]).mean())
    assert all(errors[s, s] < 2 and errors[s, s] == min(errors[s, w] for w in STEPS) for s in STEPS), errors


def test_what_is_there_is_skipped_and_the_rest_made(settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(settings, out, PROMPTS[:1], (1, 2))
    folder = folder_of(out, "a-red")
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    report = run(settings, out)
    assert (report.done, report.skipped, report.failed) == (4, 2, ())
    again = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert all(again[name] == times[name] for name in ("steps-01.mp4", "steps-02.mp4"))
    assert again["comparison.mp4"] > times["comparison.mp4"]  # it has three now
    assert len(json.loads((out / "results.json").read_text())["videos"]) == 6

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    report = run(settings, out, [*PROMPTS, PROMPTS[0]])
    assert (report.done, report.skipped) == (0, 6)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")} == before


def test_one_failure_does_not_stop_the_others(settings, tmp_path: Path) -> None:
    """A file stands where the folder of a prompt should be."""
    out = tmp_path / "out"
    run(settings, out, PROMPTS[:1], (1,))
    folder = folder_of(out, "a-red")
    shutil.rmtree(folder)
    folder.write_text("in the way")
    report = run(settings, out)
    assert report.done == 3 and [(f.prompt, f.steps) for f in report.failed] == [(PROMPTS[0], s) for s in STEPS]
    assert all("FileExistsError" in failure.reason for failure in report.failed)
    folder.unlink()
    report = run(settings, out)
    assert (report.done, report.skipped, report.failed) == (3, 3, ())


def test_the_command_goes_on_and_tells_what_failed(model: Path, tmp_path: Path) -> None:
    """Exit status 0 with nothing left to do, 1 with a list of what failed, 2 for a mistake."""

    def command(*more: str) -> tuple[int, str, str]:
        size = ["--height", "16", "--width", "32", "--num-frames", "5", "--dtype", "fp32", "--device", "cpu"]
        fixed = ["sample", "--model", str(model), "--out", str(tmp_path / "out"), *size, "--prompt", PROMPTS[0]]
        result = CliRunner().invoke(app, [*fixed, *more])
        return result.exit_code, result.stdout, result.stderr

    status, out, _ = command("--steps", "1,2")
    assert status == 0 and "2 videos made, 0 there already" in out and out.count(" s to sample") == 2
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPTS[1]}\n")
    assert command("--steps", "1,2")[1].endswith("0 videos made, 2 there already\n")

    in_the_way = tmp_path / "out" / _folder_name(PROMPTS[1])
    in_the_way.write_text("a file")
    status, out, err = command("--steps", "1,2,4", "--prompts", str(prompts))
    assert status == 1 and "1 video made, 2 there already" in out
    assert [line.split(": File")[0] for line in err.splitlines() if line.startswith("failed")] == [
        f"failed: {PROMPTS[1]} ({steps} steps)" for steps in (1, 2, 4)
    ]
    in_the_way.unlink()
    status, out, _ = command("--steps", "1,2,4", "--prompts", str(prompts))
    assert status == 0 and "3 videos made, 3 there already" in out
    status, _, err = command("--seed", "1")
    assert status == 2 and "seed 0 is now 1" in err and err.count("\n") == 1


def test_nan_is_a_failure_of_its_videos_only(settings, tmp_path: Path) -> None:
    """The text encoder gives NaN for a word that only one of the prompts has."""
    model = tmp_path / "model"
    shutil.copytree(settings.model, model)
    file = model / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights["shared.weight"][3 + WORDS.index("cross")] = float("nan")
    save_file(weights, file, {"format": "pt"})
    broken = dataclasses.replace(settings, model=str(model))
    out = tmp_path / "out"
    report = run(broken, out, steps=(1, 2))
    assert (report.done, report.skipped) == (2, 0)
    assert [(f.prompt, f.steps) for f in report.failed] == [(PROMPTS[1], 1), (PROMPTS[1], 2)]
    assert all("prompt_embeds holds NaN" in f.reason and "bf16" in f.reason for f in report.failed)
    assert sorted(p.parent.name[:5] for p in out.glob("*/steps-*.mp4")) == ["a-red", "a-red"]
    assert [e["prompt"] for e in json.loads((out / "results.json").read_text())["videos"]] == [PROMPTS[0]] * 2
    report = run(broken, out, steps=(1, 2))
    assert (report.done, report.skipped, len(report.failed)) == (0, 2, 2)


def test_latents_that_overflow_in_fp16_write_no_video(settings, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(settings.model, model)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["blocks.0.ffn.net.0.proj.weight"] *= 1e3
    weights["blocks.0.ffn.net.2.weight"] *= 1e6
    save_file(weights, file, {"format": "pt"})
    half = dataclasses.replace(settings, model=str(model), dtype="fp16")
    report = run(half, tmp_path / "fp16", PROMPTS[:1], (2,))
    assert report.done == 0 and "step 1 of 2" in report.failed[0].reason and "use bf16" in report.failed[0].reason
    assert not list((tmp_path / "fp16").rglob("*.mp4"))
    for dtype in ("bf16", "fp32"):
        assert run(dataclasses.replace(half, dtype=dtype), tmp_path / dtype, PROMPTS[:1], (2,)).failed == ()


def pixels_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(np.float32)


def test_low_memory_gives_the_same_videos(settings, tmp_path: Path) -> None:
    """Nearly: their pixels are the same to the bit, but libx264 on several threads has been seen to vary."""
    for memory in ("fast", "low"):
        run(settings, tmp_path / memory, memory=memory)
    files = sorted(p.relative_to(tmp_path / "fast") for p in (tmp_path / "fast").rglob("*.mp4"))
    assert len(files) == 8
    videos = {f: [pixels_of(tmp_path / memory / f) for memory in ("fast", "low")] for f in files}
    assert all(np.abs(fast - low).mean() < 0.5 for fast, low in videos.values())
    fast = [pixels_of(tmp_path / "fast" / f) for f in files if f.name == "steps-04.mp4"]
    assert np.abs(fast[0] - fast[1]).mean() > 1  # other videos would not pass
    entries = json.loads((tmp_path / "low" / "results.json").read_text())["videos"]
    assert {entry["memory"] for entry in entries} == {"low"}


def test_guidance_changes_the_video(settings, tmp_path: Path) -> None:
    guided = dataclasses.replace(settings, guidance_scale=4.0, negative_prompt="bad quality")
    for name, one in (("plain", settings), ("guided", guided)):
        assert run(one, tmp_path / name, PROMPTS[:1], (2,)).done == 1
    files = [folder_of(tmp_path / name, "a-red") / "steps-02.mp4" for name in ("plain", "guided")]
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 40}, "height must be a multiple of 16, got 40"),
        ({"num_frames": 8}, r"num_frames must be 4k \+ 1, got 8"),
        ({"width": 16 * 40}, "makes 80 latents"),
        ({"guidance_scale": 3.0}, "needs a negative_prompt"),
        ({"dtype": "int8"}, "dtype must be one of bf16, fp16, fp32, got 'int8'"),
        ({"fps": 0}, "fps must be >= 0.01"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"fps": 1e-9}, "fps must be >= 0.01"),
        ({"fps": float("nan")}, "fps must be a finite number, got nan"),
        ({"seed": 2**63}, "seed must be a whole number from 0 to 9223372036854775807"),
        ({"height": 10**9}, "height=1000000000 makes 125000000 latents"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
        ({"lora": "/no/such/lora"}, "LoRA: /no/such/lora does not exist"),
        ({"model": "/no/such/model"}, "there is no folder /no/such/model"),
        ({"transformer": "/no/such/model"}, "there is no folder /no/such/model"),
    ],
)
def test_what_cannot_work_is_refused_before_loading(change, message, settings, tmp_path: Path) -> None:
    """The weights of this copy are gone: loading them would be another error."""
    copy = tmp_path / "model"
    shutil.copytree(settings.model, copy)
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    wrong = dataclasses.replace(settings, **{"model": str(copy), **change})
    with pytest.raises(ValueError, match=message):
        run(wrong, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_steps_and_prompts_are_checked_before_loading(settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        run(settings, tmp_path / "out", steps=(0,))
    with pytest.raises(ValueError, match="no prompts"):
        run(settings, tmp_path / "out", prompts=[])


def test_a_folder_of_other_settings_is_refused(settings, tmp_path: Path) -> None:
    run(settings, tmp_path / "out", PROMPTS[:1], (1,))
    with pytest.raises(ValueError, match=r"other settings \(seed 3 is now 4\)"):
        run(dataclasses.replace(settings, seed=4), tmp_path / "out")
    file = tmp_path / "out" / "results.json"
    sound = json.loads(file.read_text())
    broken = ["{}", "[]", "", '{"settings": {}, "videos": [], "videos": []}', json.dumps(sound | {"more": 1})]
    broken += [json.dumps(sound | change) for change in ({"videos": [{"steps": 1}]}, {"videos": {}}, {"settings": []})]
    for content in broken:
        file.write_text(content)
        with pytest.raises(ValueError, match=r"results\.json is no results file"):
            run(settings, tmp_path / "out")
    file.write_text(json.dumps(sound | {"settings": sound["settings"] | {"cfg": 2}}))
    with pytest.raises(ValueError, match=r"other settings \(cfg 2 is now None\)"):
        run(settings, tmp_path / "out")


def test_videos_have_the_versions_that_made_them_and_a_change_is_said(settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(settings, out, PROMPTS[:1], (1,))
    results = json.loads((out / "results.json").read_text())
    (entry,) = results["videos"]
    assert entry["packages"]["ftfy"] == importlib.metadata.version("ftfy")
    assert entry["packages"]["torch"] == torch.__version__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(settings, out, PROMPTS[:1], (1,))
    entry["packages"]["diffusers"] = "0.30.0"
    old = {name: value for name, value in entry.items() if name != "packages"} | {"file": "old/steps-01.mp4"}
    (out / "results.json").write_text(json.dumps(results | {"videos": [entry, old]}))
    with pytest.warns(UserWarning, match=r"other versions \(diffusers 0\.30\.0, here .*; unknown versions\)") as said:
        run(settings, out, PROMPTS[:1], (1,))
    assert len(said) == 1 and "\n" not in str(said[0].message)


def test_prompts_are_lines_and_steps_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa red disc\r\n\n  熊猫  \n", encoding="utf-8")
    assert read_prompts(file) == ["a red disc", "熊猫"]
    file.write_bytes(b"one\rtwo\rthree")
    assert read_prompts(file) == ["one", "two", "three"]
    wrong_files = {
        b"\n": "has no prompts",
        "sch\u00f6n\n".encode("latin-1"): "line 1: byte 0xf6 is not UTF-8",
        "a red disc\n".encode("utf-16"): "not UTF-8",
        "a\nb\n".encode("utf-16-le"): "line 1: the prompt has a null character",
        b"a\n" + b"x" * 200_000: "line 2: the prompt has 200000 characters",
    }
    for content, message in wrong_files.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"prompts: .*prompts\.txt.*{message}"):
            read_prompts(file)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
    assert parse_steps("8, 1,2,2") == (1, 2, 8)
    for wrong in ("", "0", "1,,2", "-1", "two"):
        with pytest.raises(ValueError, match="steps must be whole numbers"):
            parse_steps(wrong)


def test_prompts_in_any_script_have_their_own_folders(settings, tmp_path: Path) -> None:
    prompts = ["熊猫吃竹子", "熊猫吃竹子。", "!!!", "a " * 200]
    assert run(settings, tmp_path / "out", prompts, (1,)).done == 4
    assert len([p for p in (tmp_path / "out").iterdir() if p.is_dir()]) == 4
