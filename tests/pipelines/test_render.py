"""Test `anyflow sample` as a function and a command: real files, failures, first frames."""

import dataclasses
import json
import shutil
from pathlib import Path

import av
import diffusers
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_runs import PROMPTS, STEPS, folder_of, probe, run
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.pipelines import AnyFlowPipeline
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.pipelines.results import folder_name
from anyflow.pipelines.video import write_video

# as the model's vocabulary begins, after three special tokens
WORDS = ["a", "red", "blue", "disc", "cross"]


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
    """Compare in brightness: H.264 halves the resolution of colors, and these are noise."""
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


def test_one_failure_does_not_stop_the_others(settings, tmp_path: Path) -> None:
    """Put a file where the folder of a prompt should be."""
    out = tmp_path / "out"
    run(settings, out, PROMPTS[:1], (1,))
    folder = folder_of(out, "a-red")
    shutil.rmtree(folder)
    folder.write_text("in the way")
    report = run(settings, out)
    assert report.done == 3 and [(f.prompt, f.num_inference_steps) for f in report.failed] == [
        (PROMPTS[0], s) for s in STEPS
    ]
    assert all("FileExistsError" in failure.reason for failure in report.failed)
    folder.unlink()
    report = run(settings, out)
    assert (report.done, report.skipped, report.failed) == (3, 3, ())


@pytest.mark.slow
def test_the_command_goes_on_and_tells_what_failed(model: Path, tmp_path: Path) -> None:
    """Expect exit status 0 with nothing left to do, 1 with a list of failures, 2 for a mistake."""

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

    in_the_way = tmp_path / "out" / folder_name(VideoPrompt(PROMPTS[1]))
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
    folder = tmp_path / "out" / folder_name(VideoPrompt(PROMPTS[0]))
    assert (
        f"{folder / 'steps-02-seed-2.mp4'}: " in out
        and f"{folder / 'comparison-seed-1.mp4'}: 2 step counts" in out
    )
    status, _, err = command("--fps", "9")
    assert status == 2 and "fps 16.0 is now 9.0" in err and err.count("\n") == 1


def test_nan_is_a_failure_of_its_videos_only(settings, tmp_path: Path) -> None:
    """Let the text encoder give NaN for a word that only one of the prompts has."""
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
    assert [(f.prompt, f.num_inference_steps) for f in report.failed] == [
        (PROMPTS[1], 1),
        (PROMPTS[1], 2),
    ]
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


@pytest.mark.slow
def test_low_memory_gives_the_same_videos(settings, tmp_path: Path) -> None:
    """Compare pixels, which are the same to the bit; libx264 on several threads may vary."""
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


def test_each_prompt_has_a_negative_of_its_own(settings, tmp_path: Path) -> None:
    """Expect another video for another negative prompt; a prompt without one takes the run's."""
    guided = dataclasses.replace(settings, guidance_scale=4.0, negative_prompt="bad quality")
    text = PROMPTS[0]
    prompts = [VideoPrompt(text), VideoPrompt(text, "blue cross"), VideoPrompt(text, "")]
    assert run(guided, tmp_path / "all", prompts, (2,)).done == 3
    entries = json.loads((tmp_path / "all" / "results.json").read_text())["videos"]
    assert [entry["negative_prompt"] for entry in entries] == ["bad quality", "blue cross", ""]
    videos = [pixels_of(tmp_path / "all" / entry["file"]) for entry in entries]
    assert np.abs(videos[0] - videos[1]).mean() > 0.1 and np.abs(videos[1] - videos[2]).mean() > 0.1
    alone = dataclasses.replace(guided, negative_prompt="blue cross")
    run(alone, tmp_path / "alone", [text], (2,))
    (file,) = (tmp_path / "alone").glob("*/steps-02-seed-3.mp4")
    assert np.abs(pixels_of(file) - videos[1]).mean() < 0.01


def test_videos_begin_with_the_frames_of_a_file(settings, tmp_path: Path, model: Path) -> None:
    """Compare with the pipeline on the same frames; the results name the file."""
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
    """Refuse before anything is written; sample with r = t; advise guidance."""
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
