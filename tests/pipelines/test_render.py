"""`anyflow sample` as a function: real files from a tiny model, resuming, failures, and what it
refuses.
"""

import dataclasses
import importlib.metadata
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import av
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.pipelines import AnyFlowPipeline
from anyflow.pipelines.prompts import Prompt
from anyflow.pipelines.render import SampleReport, parse_numbers, sample_command
from anyflow.pipelines.results import folder_name
from anyflow.pipelines.sample_settings import SampleSettings
from anyflow.pipelines.video import write_video

# as the model's vocabulary begins, after three special tokens
WORDS = ["a", "red", "blue", "disc", "cross"]
PROMPTS = ["a red disc moves slowly", "a blue cross: stops!"]
STEPS = (1, 2, 4)


@pytest.fixture
def settings(model: Path) -> SampleSettings:
    return SampleSettings(str(model), height=32, width=48, num_frames=9, fps=8, dtype="float32")


def run(
    settings: SampleSettings, out: Path, prompts=PROMPTS, steps=STEPS, seeds=(3,), **options: Any
) -> SampleReport:
    return sample_command(settings, prompts, steps, out, seeds=seeds, device="cpu", **options)


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
        assert (
            set(entry["seconds"]) == {"encode", "sample", "decode"}
            and min(entry["seconds"].values()) > 0
        )
        assert entry["peak_memory_bytes"] > 2**20
    folder = folder_of(tmp_path / "out", "a-blue-cross-stops")
    assert sorted(p.name for p in folder.iterdir()) == [
        "comparison-seed-3.mp4", "steps-01-seed-3.mp4", "steps-02-seed-3.mp4",
        "steps-04-seed-3.mp4",
    ]  # fmt: skip
    scale = 4  # to be at least 160 pixels wide
    assert probe(folder / "comparison-seed-3.mp4") == (
        9,
        32 * scale + 24 + 16,
        3 * (48 * scale + 8) + 8,
        8,
    )


def test_a_file_is_what_the_pipeline_makes(settings, model, tmp_path: Path) -> None:
    """In brightness: H.264 halves the resolution of colors, and these are noise."""
    run(settings, tmp_path / "out", PROMPTS[:1])
    pipe = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")
    folder = folder_of(tmp_path / "out", "a-red")
    errors = {}
    for steps in STEPS:
        (images,) = pipe(
            PROMPTS[0], height=32, width=48, num_frames=9, num_inference_steps=steps, seed=3
        ).frames
        expected = 255 * images
        for written in STEPS:
            with av.open(str(folder / f"steps-{written:02d}-seed-3.mp4")) as container:
                pixels = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
            errors[steps, written] = float(
                np.abs((pixels - expected) @ [0.2126, 0.7152, 0.0722]).mean()
            )
    assert all(
        errors[s, s] < 2 and errors[s, s] == min(errors[s, w] for w in STEPS) for s in STEPS
    ), errors


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


def test_one_failure_does_not_stop_the_others(settings, tmp_path: Path) -> None:
    """A file stands where the folder of a prompt should be."""
    out = tmp_path / "out"
    run(settings, out, PROMPTS[:1], (1,))
    folder = folder_of(out, "a-red")
    shutil.rmtree(folder)
    folder.write_text("in the way")
    report = run(settings, out)
    assert report.done == 3 and [(f.prompt, f.steps) for f in report.failed] == [
        (PROMPTS[0], s) for s in STEPS
    ]
    assert all("FileExistsError" in failure.reason for failure in report.failed)
    folder.unlink()
    report = run(settings, out)
    assert (report.done, report.skipped, report.failed) == (3, 3, ())


def test_the_command_goes_on_and_tells_what_failed(model: Path, tmp_path: Path) -> None:
    """Exit status 0 with nothing left to do, 1 with a list of what failed, 2 for a mistake."""

    def command(*more: str) -> tuple[int, str, str]:
        size = [
            "--height",
            "16",
            "--width",
            "32",
            "--num-frames",
            "5",
            "--dtype",
            "fp32",
            "--device",
            "cpu",
        ]
        fixed = [
            "sample",
            "--model",
            str(model),
            "--out",
            str(tmp_path / "out"),
            *size,
            "--prompt",
            PROMPTS[0],
        ]
        result = CliRunner().invoke(app, [*fixed, *more])
        return result.exit_code, result.stdout, result.stderr

    status, out, _ = command("--steps", "1,2")
    assert (
        status == 0 and "2 videos made, 0 there already" in out and out.count(" s to sample") == 2
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPTS[1]}\n")
    assert command("--steps", "1,2")[1].endswith("0 videos made, 2 there already\n")

    in_the_way = tmp_path / "out" / folder_name(Prompt(PROMPTS[1]))
    in_the_way.write_text("a file")
    status, out, err = command("--steps", "1,2,4", "--prompts", str(prompts))
    assert status == 1 and "1 video made, 2 there already" in out
    assert [line.split(": File")[0] for line in err.splitlines() if line.startswith("failed")] == [
        f"failed: {PROMPTS[1]} ({steps} steps, seed 0)" for steps in (1, 2, 4)
    ]
    in_the_way.unlink()
    status, out, _ = command("--steps", "1,2,4", "--prompts", str(prompts))
    assert status == 0 and "3 videos made, 3 there already" in out
    status, out, _ = command("--steps", "1,2", "--seed", "1,0", "--seed", "2")
    assert status == 0 and "4 videos made, 2 there already" in out
    folder = tmp_path / "out" / folder_name(Prompt(PROMPTS[0]))
    assert (
        f"{folder / 'steps-02-seed-2.mp4'}: " in out
        and f"{folder / 'comparison-seed-1.mp4'}: 2 step counts" in out
    )
    status, _, err = command("--fps", "9")
    assert status == 2 and "fps 16.0 is now 9.0" in err and err.count("\n") == 1


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
    assert [e["prompt"] for e in json.loads((out / "results.json").read_text())["videos"]] == [
        PROMPTS[0]
    ] * 2
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
    half = dataclasses.replace(settings, model=str(model), dtype="float16")
    report = run(half, tmp_path / "fp16", PROMPTS[:1], (2,))
    assert (
        report.done == 0
        and "step 1 of 2" in report.failed[0].reason
        and "use bf16" in report.failed[0].reason
    )
    assert not list((tmp_path / "fp16").rglob("*.mp4"))
    for dtype in ("bfloat16", "float32"):
        assert (
            run(dataclasses.replace(half, dtype=dtype), tmp_path / dtype, PROMPTS[:1], (2,)).failed
            == ()
        )


def pixels_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack(
            [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        ).astype(np.float32)


def test_low_memory_gives_the_same_videos(settings, tmp_path: Path) -> None:
    """Nearly: their pixels are the same to the bit, but libx264 on several threads has been seen to
    vary.
    """
    for memory in ("fast", "low"):
        run(settings, tmp_path / memory, memory=memory)
    files = sorted(p.relative_to(tmp_path / "fast") for p in (tmp_path / "fast").rglob("*.mp4"))
    assert len(files) == 8
    videos = {f: [pixels_of(tmp_path / memory / f) for memory in ("fast", "low")] for f in files}
    assert all(np.abs(fast - low).mean() < 0.5 for fast, low in videos.values())
    fast = [pixels_of(tmp_path / "fast" / f) for f in files if f.name == "steps-04-seed-3.mp4"]
    assert np.abs(fast[0] - fast[1]).mean() > 1  # other videos would not pass
    entries = json.loads((tmp_path / "low" / "results.json").read_text())["videos"]
    assert {entry["memory"] for entry in entries} == {"low"}


def test_guidance_changes_the_video(settings, tmp_path: Path) -> None:
    guided = dataclasses.replace(settings, guidance_scale=4.0, negative_prompt="bad quality")
    for name, one in (("plain", settings), ("guided", guided)):
        assert run(one, tmp_path / name, PROMPTS[:1], (2,)).done == 1
    files = [
        folder_of(tmp_path / name, "a-red") / "steps-02-seed-3.mp4" for name in ("plain", "guided")
    ]
    assert files[0].read_bytes() != files[1].read_bytes()


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


def test_each_prompt_has_a_negative_of_its_own(settings, tmp_path: Path) -> None:
    """The same text with another negative prompt is another video; one without takes the run's."""
    guided = dataclasses.replace(settings, guidance_scale=4.0, negative_prompt="bad quality")
    text = PROMPTS[0]
    prompts = [Prompt(text), Prompt(text, "blue cross"), Prompt(text, "")]
    assert run(guided, tmp_path / "all", prompts, (2,)).done == 3
    entries = json.loads((tmp_path / "all" / "results.json").read_text())["videos"]
    assert [entry["negative_prompt"] for entry in entries] == ["bad quality", "blue cross", ""]
    videos = [pixels_of(tmp_path / "all" / entry["file"]) for entry in entries]
    assert np.abs(videos[0] - videos[1]).mean() > 0.1 and np.abs(videos[1] - videos[2]).mean() > 0.1
    alone = dataclasses.replace(guided, negative_prompt="blue cross")
    run(alone, tmp_path / "alone", [text], (2,))
    (file,) = (tmp_path / "alone").glob("*/steps-02-seed-3.mp4")
    assert np.abs(pixels_of(file) - videos[1]).mean() < 0.01


def test_a_folder_of_names_without_seeds_goes_on(settings, tmp_path: Path) -> None:
    """As version 0.1 wrote it: one seed for the folder, in the settings."""
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


def test_videos_begin_with_the_frames_of_a_file(settings, tmp_path: Path, model: Path) -> None:
    """As the pipeline makes them of the same frames; results name the file."""
    from anyflow.data.first_frames import read_first_frames

    frames = np.zeros((7, 64, 96, 3), np.uint8)
    frames[..., 0], frames[:, :, 48:, 1] = 200, 255
    write_video(frames, tmp_path / "clip.mp4", fps=8)
    first_frames = read_first_frames(
        tmp_path / "clip.mp4", 5, num_frames=9, height=32, width=48, fps=8
    )
    onward = dataclasses.replace(settings, video=str(tmp_path / "clip.mp4"), video_frames=5)
    assert run(onward, tmp_path / "out", PROMPTS[:1], (2,), first_frames=first_frames).done == 1
    (file,) = (tmp_path / "out").glob("*/steps-02-seed-3.mp4")
    pipe = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")
    call = {
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 2,
        "seed": 3,
        "output_type": "np",
    }
    expected = pipe(PROMPTS[0], video=first_frames, **call).frames[0] * 255
    free = pipe(PROMPTS[0], **call).frames[0] * 255
    brightness = np.array([0.2126, 0.7152, 0.0722])
    error, other = (
        float(np.abs((pixels_of(file) - video) @ brightness).mean()) for video in (expected, free)
    )
    assert error < 2 < other
    with pytest.raises(ValueError, match="video_frames 5 is now None"):
        run(settings, tmp_path / "out", PROMPTS[:1], (2,))


def test_a_plain_wan_model_is_named_and_euler_samples_it(
    settings, tmp_path: Path, model: Path, capsys
) -> None:
    """Refused before anything is written; sampled with r = t; told of guidance."""
    wan = tmp_path / "wan"
    shutil.copytree(model, wan)
    small = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 32,
    }
    diffusers.WanTransformer3DModel(**small, num_layers=2, rope_max_seq_len=32).save_pretrained(
        wan / "transformer"
    )
    unipc = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    unipc.save_pretrained(wan / "scheduler")
    plain = dataclasses.replace(settings, model=str(wan))
    with pytest.raises(
        ValueError, match="is a plain Wan model.*many .about 50, with guidance.*--euler"
    ):
        run(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    by_euler = dataclasses.replace(plain, euler=True)
    assert (
        run(by_euler, tmp_path / "out", PROMPTS[:1], (2,), console=Console(soft_wrap=True)).done
        == 1
    )
    assert "note: " in (said := capsys.readouterr().out) and "--guidance 5 --steps 50" in said
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["euler"] is True
    with pytest.raises(ValueError, match="euler True is now False"):
        run(
            dataclasses.replace(settings, model=str(wan), transformer=str(model)),
            tmp_path / "out",
            PROMPTS[:1],
            (2,),
        )
    for name, euler in (("map", False), ("euler", True)):  # a flow map, by its velocity at r = t
        run(dataclasses.replace(settings, euler=euler), tmp_path / name, PROMPTS[:1], (1,))
    (first,), (second,) = (
        (tmp_path / name).glob("*/steps-01-seed-3.mp4") for name in ("map", "euler")
    )
    assert np.abs(pixels_of(first) - pixels_of(second)).mean() > 0.1


def test_prompts_in_any_script_have_their_own_folders(settings, tmp_path: Path) -> None:
    prompts = ["熊猫吃竹子", "熊猫吃竹子。", "!!!", "a " * 200]
    assert run(settings, tmp_path / "out", prompts, (1,)).done == 4
    assert len([p for p in (tmp_path / "out").iterdir() if p.is_dir()]) == 4
