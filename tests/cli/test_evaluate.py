"""Test `anyflow evaluate` on a small model of moving shapes, as a user runs it."""

import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from anyflow.cli import app
from anyflow.data import MovingShapes, SyntheticVideos, pixel_shuffle_3d
from anyflow.evaluation import frechet_distance
from anyflow.evaluation.runs import EvaluationRecord
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.sampling import sample
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

CLASSES = ["disc right", "disc down", "cross right", "cross down"]
SMALL = ["--steps", "2,1", "--num-samples", "2", "--reference-steps", "3"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def grays(file: Path) -> np.ndarray:
    """Read the gray levels ``[F, H, W]`` of a video."""
    with av.open(str(file)) as container:
        return np.stack(
            [frame.to_ndarray(format="rgb24").mean(-1) for frame in container.decode(video=0)]
        )


@pytest.fixture(scope="module")
def finished(shapes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished evaluation and its output."""
    out = tmp_path_factory.mktemp("evaluation") / "out"
    result = run("--model", shapes_model, *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    (out.parent / "output.txt").write_text(result.output)
    return out


@pytest.mark.slow
def test_a_run_leaves_videos_record_and_report(finished: Path, shapes_model: Path) -> None:
    record = EvaluationRecord.load(finished / "evaluation.json")
    assert (
        list(record.prompts) == CLASSES and record.step_counts == (1, 2) and record.num_samples == 2
    )
    assert record.models["student"].path == str(shapes_model)
    names = [f"{prompt}-{index}.mp4" for prompt in CLASSES for index in range(2)]
    for steps in (1, 2, 3):
        folder = finished / "samples" / "student" / str(steps)
        assert sorted(file.name for file in folder.iterdir()) == sorted(names)
    assert list(json.loads((finished / "prompts.json").read_text())) == names
    values, sets = record.values["student"], record.sets["student"]
    for metric in ("motion", "dynamic_degree", "flicker", "psnr"):
        assert list(values[metric]) == [1, 2] and all(len(values[metric][n]) == 8 for n in (1, 2))
        assert record.metrics[metric].needs is None
    assert set(sets) == {"fd", "template_mse", "coverage_tv"} and list(sets["fd"]) == [1, 2]
    assert len(record.references["motion"]) == 8 and len(record.references["fd"]) == 8
    assert np.allclose(record.references["motion"], 1 / 12, rtol=0.02)  # a pixel per frame, of 12
    output = (finished.parent / "output.txt").read_text()
    assert "24 videos made, 0 there already" in output
    assert (
        output.splitlines()[-1] == f"Report: {finished / 'report.html'}"
        and (finished / "report.html").is_file()
    )
    for metric, where in (("clip", "clip-vit-base-patch32"), ("lpips", ""), ("fvd", "i3d")):
        needs = record.metrics[metric].needs
        assert needs is not None and where in needs and needs in output and "\n" not in needs
    assert not (finished / ".work").exists() and not list(finished.rglob("*.tmp"))


@pytest.mark.slow
def test_a_video_is_what_the_model_makes_of_its_own_noise(
    finished: Path, shapes_model: Path
) -> None:
    """Derive the noise's seed by hand: a hash of the seed, the index and the prompt."""
    import hashlib

    model = AnyFlowTransformer3DModel.from_pretrained(shapes_model / "transformer")
    scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(shapes_model / "scheduler")
    shapes, data = MovingShapes(), SyntheticVideos()
    digest = hashlib.blake2b(b"0\x001\x00cross right", digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") % 2**63)
    noise = torch.randn(1, *data.latent_shape, generator=generator)
    prompt = data[2 * len(data) // 4].prompt_embeds[None]
    errors = {}
    with torch.inference_mode():
        for made in (1, 2, 3):
            latents = sample(model, scheduler, noise, prompt, num_inference_steps=made)
            expected = shapes.to_uint8(pixel_shuffle_3d(latents))[0].double().numpy()
            for written in (1, 2, 3):
                pixels = grays(
                    finished / "samples" / "student" / str(written) / "cross right-1.mp4"
                )
                assert pixels.shape == (8, 96, 96)
                errors[made, written] = np.abs(pixels[:, 4::8, 4::8] - expected).mean()
    assert all(
        errors[n, n] < 2 and errors[n, n] == min(errors[n, m] for m in (1, 2, 3)) for n in (1, 2, 3)
    ), errors


@pytest.mark.slow
def test_the_numbers_are_those_of_the_files(finished: Path) -> None:
    record = EvaluationRecord.load(finished / "evaluation.json")
    files = [
        finished / "samples" / "student" / "2" / f"{prompt}-{i}.mp4"
        for prompt in CLASSES
        for i in range(2)
    ]
    videos = [grays(file) for file in files]
    references = [grays(file.parents[1] / "3" / file.name) for file in files]
    flicker = [np.abs(np.diff(video, axis=0)).mean() / 255 for video in videos]
    assert np.allclose(record.values["student"]["flicker"][2], flicker, atol=2e-3)
    errors = [np.square((a - b) / 255).mean() for a, b in zip(videos, references, strict=True)]
    assert np.allclose(record.values["student"]["psnr"][2], -10 * np.log10(errors), atol=0.1)
    assert record.sets["student"]["fd"][2] > max(record.references["fd"])  # it is untrained
    assert frechet_distance(torch.randn(8, 2), torch.randn(8, 2)) >= 0


@pytest.mark.slow
def test_a_second_run_makes_nothing_and_a_resumed_one_the_same_bytes(
    finished: Path, shapes_model: Path, tmp_path: Path
) -> None:
    before, out = content(finished), tmp_path / "out"
    shutil.copytree(finished, out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    result = run("--model", shapes_model, *SMALL, "--out", out)
    assert result.exit_code == 0 and "0 videos made, 24 there already" in result.output
    assert (
        content(out) == before
        and {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == times
    )

    # as a run leaves it that is killed while it samples
    record = json.loads((out / "evaluation.json").read_text())
    for table in ("values", "sets"):
        for cells in record[table]["student"].values():
            cells.pop("2", None)
    record["references"] = {}
    (out / "evaluation.json").write_text(json.dumps(record))
    for name in ("2/disc down-1.mp4", "2/cross right-0.mp4"):
        (out / "samples" / "student" / name).unlink()
    (out / ".work" / "rank-0").mkdir(parents=True)
    (out / ".work" / "rank-0" / ".video.mp4.tmp").write_bytes(b"half a video")
    result = run("--model", shapes_model, *SMALL, "--out", out)
    assert result.exit_code == 0 and "2 videos made, 22 there already" in result.output
    assert content(out) == before


@pytest.mark.slow
def test_another_model_and_more_steps_join_and_other_settings_are_refused(
    finished: Path, shapes_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    small = [*SMALL[2:], "--out", out]
    result = run("--model", f"velocity={shapes_model}", "--euler", "--steps", "4", *small)
    assert result.exit_code == 0 and "16 videos made" in result.output, result.output
    record = EvaluationRecord.load(out / "evaluation.json")
    assert list(record.models) == ["student", "velocity"] and record.step_counts == (1, 2, 4)
    assert record.models["velocity"].sampler["euler"] is True and list(
        record.values["velocity"]["psnr"]
    ) == [4]
    assert (
        record.values["student"]
        == EvaluationRecord.load(finished / "evaluation.json").values["student"]
    )

    before = content(out)
    for arguments, message in (
        ([*small, "--euler"], "(euler False is now True)"),
        ([*small, "--seed", "1"], "(--seed 0 is now 1)"),
        (
            ["--num-samples", "3", "--reference-steps", "3", "--out", out],
            "(--num-samples 2 is now 3)",
        ),
    ):
        result = run("--model", f"student={shapes_model}", "--steps", "1", *arguments)
        assert (
            result.exit_code == 2
            and message in result.output
            and len(result.output.splitlines()) == 1
        )
    assert content(out) == before


@pytest.mark.slow
def test_report_only(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    result = run("--report-only", out)
    assert result.exit_code == 0 and result.output == f"Report: {out / 'report.html'}\n"
    assert (out / "report.html").read_bytes() == page
    for arguments, message in (
        (["--report-only", tmp_path / "missing"], "holds no evaluation"),
        (["--report-only", out, "--model", "x"], "goes with no --model"),
    ):
        result = run(*arguments)
        assert (
            result.exit_code == 2
            and message in result.output
            and len(result.output.splitlines()) == 1
        )


@pytest.mark.slow
def test_a_run_of_the_demo_is_its_last_stage(shapes_model: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    shutil.copytree(shapes_model, demo / "checkpoints" / "on_policy")
    (demo / "state.json").write_text(json.dumps({"config": {"seed": 3}, "finished": {}}))
    out = tmp_path / "out"
    small = ["--steps", "1", "--num-samples", "1", "--reference-steps", "0", "--out", out]
    result = run("--model", demo, *small)
    assert result.exit_code == 0, result.output
    record = EvaluationRecord.load(out / "evaluation.json")
    assert (
        list(record.models) == ["demo"] and not record.sets and "psnr" not in record.values["demo"]
    )
    assert "at least 2 videos each" in str(record.metrics["fd"].needs)
    assert "--reference-steps is 0" in str(record.metrics["psnr"].needs)
    # the same model by another path
    result = run("--model", f"demo={demo / 'checkpoints' / 'on_policy'}", *small)
    assert result.exit_code == 0 and "0 videos made, 4 there already" in result.output
    shutil.rmtree(demo / "checkpoints" / "on_policy")
    result = run("--model", demo, *small)
    assert result.exit_code == 2 and "without a model of stage 2" in result.output


def test_what_cannot_be_evaluated(
    shapes_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expect one line and exit status 2 for each, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red panda\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    model, out = ["--model", shapes_model], ["--out", "out"]
    before = content(tmp_path)
    for arguments, message in (
        (model, "--model and --out must be given"),
        (out, "--model and --out must be given"),
        (
            [*model, *out, "--prompts", "prompts.txt"],
            "which knows the prompts disc right, disc down",
        ),
        ([*model, *out, "--prompts", "missing.txt"], "prompts: missing.txt cannot be read"),
        ([*model, *out, "--steps", "0"], "steps must be whole numbers >= 1"),
        ([*model, *out, "--num-samples", "0"], "num_samples must be a whole number from 1"),
        ([*model, *out, "--height", "64"], "--height cannot be chosen"),
        ([*model, *out, "--references", "full"], "--references is not for models of moving shapes"),
        ([*model, *model, *out], "two models have the name 'student'"),
        (
            [*model, "--model", "b=full", "--transformer", "x", *out],
            "--transformer and --lora go with one --model",
        ),
        ([*model, *out, "--vbench-dimensions", "color"], "those of --vbench-python"),
        ([*model, *out, "--vbench-python", "full"], "is not a program that can be run"),
        ([*model, "--out", "full"], "is not empty and holds no evaluation"),
        ([*model, "--out", "prompts.txt"], "prompts.txt is not a folder"),
        (["--model", "full", *out], "--prompts must be given"),
        (["--model", "full", *out, "--prompts", "prompts.txt"], "full"),
        (["--model", "missing", *out, "--prompts", "prompts.txt"], "no folder missing"),
        (["--model", ".=full", *out, "--prompts", "prompts.txt"], "cannot be the name of a model"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.output and len(result.output.splitlines()) == 1, (
            arguments,
            result.output,
        )
        assert content(tmp_path) == before and not os.path.lexists(tmp_path / "out"), arguments
