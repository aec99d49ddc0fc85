"""Test what `anyflow sample` does in a folder that has videos, and what it refuses."""

import dataclasses
import importlib.metadata
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import PROMPTS, folder_of, probe, run

from anyflow.pipelines.render import parse_numbers


def test_what_is_there_is_skipped_and_the_rest_made(settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(settings, out, PROMPTS[:1], (1, 2))
    folder = folder_of(out, "a-red")
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    report = run(settings, out)
    assert (report.done, report.skipped, report.failed) == (4, 2, ())
    again = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert all(
        again[name] == times[name] for name in ("steps-01-seed-3.mp4", "steps-02-seed-3.mp4")
    )
    assert again["comparison-seed-3.mp4"] > times["comparison-seed-3.mp4"]  # it has three now
    assert len(json.loads((out / "results.json").read_text())["videos"]) == 6

    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    report = run(settings, out, [*PROMPTS, PROMPTS[0]])
    assert (report.done, report.skipped) == (0, 6)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 40}, "height must be a multiple of 16, got 40"),
        ({"num_frames": 8}, r"num_frames must be 4k \+ 1, got 8"),
        ({"width": 16 * 40}, "width must be <= 512 pixels for this model, got 640"),
        ({"num_frames": 129}, "num_frames must be <= 125 for this model, got 129"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        ({"fps": 0}, "fps must be >= 0.01"),
        ({"fps": 1e-9}, "fps must be >= 0.01"),
        ({"fps": float("nan")}, "fps must be a finite number, got nan"),
        ({"height": 10**9}, "height must be <= 512 pixels for this model, got 1000000000"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
        ({"lora": "/no/such/lora"}, "LoRA: /no/such/lora does not exist"),
        ({"model": "/no/such/model"}, "no folder /no/such/model"),
        ({"transformer": "/no/such/model"}, "no folder /no/such/model"),
    ],
)
def test_what_cannot_work_is_refused_before_loading(
    change, message, settings, tmp_path: Path
) -> None:
    """Use a copy without weights: loading them would be another error."""
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
    for seed in (-1, 2**63):
        with pytest.raises(
            ValueError, match="seed must be a whole number from 0 to 9223372036854775807"
        ):
            run(settings, tmp_path / "out", seeds=(seed,))
    with pytest.raises(ValueError, match="name 0 first frames"):
        run(settings, tmp_path / "out", first_frames=[Image.new("RGB", (48, 32))])


def test_a_folder_of_other_settings_is_refused(settings, tmp_path: Path) -> None:
    run(settings, tmp_path / "out", PROMPTS[:1], (1,))
    with pytest.raises(ValueError, match=r"other settings \(fps 8 is now 4\)"):
        run(dataclasses.replace(settings, fps=4), tmp_path / "out")
    file = tmp_path / "out" / "results.json"
    sound = json.loads(file.read_text())
    broken = [
        "{}",
        "[]",
        "",
        '{"settings": {}, "videos": [], "videos": []}',
        json.dumps(sound | {"more": 1}),
    ]
    broken += [
        json.dumps(sound | change)
        for change in ({"videos": [{"steps": 1}]}, {"videos": {}}, {"settings": []})
    ]
    for content in broken:
        file.write_text(content)
        with pytest.raises(ValueError, match=r"results\.json is no results file"):
            run(settings, tmp_path / "out")
    file.write_text(json.dumps(sound | {"settings": sound["settings"] | {"cfg": 2}}))
    with pytest.raises(ValueError, match=r"other settings \(cfg 2 is now None\)"):
        run(settings, tmp_path / "out")


def test_videos_have_the_versions_that_made_them_and_a_change_is_said(
    settings, tmp_path: Path
) -> None:
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
    old = {name: value for name, value in entry.items() if name != "packages"} | {
        "file": "old/steps-01-seed-3.mp4"
    }
    (out / "results.json").write_text(json.dumps(results | {"videos": [entry, old]}))
    with pytest.warns(
        UserWarning, match=r"other versions \(diffusers 0\.30\.0, here .*; unknown versions\)"
    ) as said:
        run(settings, out, PROMPTS[:1], (1,))
    assert len(said) == 1 and "\n" not in str(said[0].message)


def test_numbers_are_given_with_commas() -> None:
    assert parse_numbers("steps", "8, 1,2,2") == (1, 2, 8)
    assert parse_numbers("seed", "0,9223372036854775807", low=0) == (0, 2**63 - 1)
    for wrong in ("", "0", "1,,2", "-1", "two", "\u0661", "1" * 5000):
        with pytest.raises(ValueError, match="steps must be whole numbers >= 1"):
            parse_numbers("steps", wrong)


def test_a_folder_of_names_without_seeds_goes_on(settings, tmp_path: Path) -> None:
    """Write a folder as version 0.1 did: one seed for the folder, in the settings."""
    out = tmp_path / "out"
    run(settings, out, PROMPTS[:1], (1, 2))
    folder = folder_of(out, "a-red")
    for name in ("steps-01", "steps-02", "comparison"):
        (folder / f"{name}-seed-3.mp4").rename(folder / f"{name}.mp4")
    content = json.loads(
        (out / "results.json").read_text().replace("-seed-3", "").replace("float32", "fp32")
    )
    new = {"euler", "image", "video", "video_frames"}
    content["settings"] = {k: v for k, v in content["settings"].items() if k not in new} | {
        "seed": 3
    }
    for video in content["videos"]:
        del video["seed"], video["negative_prompt"]
    (out / "results.json").write_text(json.dumps(content))
    report = run(settings, out, PROMPTS[:1], (1, 2, 4), seeds=(3, 5))
    assert (report.done, report.skipped, report.failed) == (4, 2, ())
    assert probe(folder / "comparison-seed-3.mp4") == probe(folder / "comparison-seed-5.mp4")
    assert (
        not (folder / "steps-01-seed-3.mp4").exists() and (folder / "steps-04-seed-3.mp4").is_file()
    )
    assert run(settings, out, PROMPTS[:1], (1, 2, 4), seeds=(3, 5)).skipped == 6


def test_prompts_in_any_script_have_their_own_folders(settings, tmp_path: Path) -> None:
    prompts = ["熊猫吃竹子", "熊猫吃竹子。", "!!!", "a " * 200]
    assert run(settings, tmp_path / "out", prompts, (1,)).done == 4
    assert len([p for p in (tmp_path / "out").iterdir() if p.is_dir()]) == 4
