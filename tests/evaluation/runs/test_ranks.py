"""Run several real processes on a Wan-shaped pipeline, some of which are killed and resumed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.evaluation.runs import EvaluationRecord
from anyflow.pipelines import write_video

PROMPTS = ["a red disc moves", "blue cross to the right/left"]
SIZES = ["--steps", "1,2", "--num-samples", "2", "--reference-steps", "3", "--num-frames", "5"]
PIXELS = ["--height", "32", "--width", "32", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def arguments(wan_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command line without its folder."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(1)
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(wan_model / part, folder / "tiny" / part)
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    transformer = diffusers.AnyFlowTransformer3DModel(**sizes, text_dim=16, freq_dim=32, ffn_dim=32)
    transformer.save_pretrained(folder / "tiny" / "transformer")
    diffusers.FlowMapEulerDiscreteScheduler(shift=5.0).save_pretrained(
        folder / "tiny" / "scheduler"
    )
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    model = ["--model", str(folder / "tiny"), "--prompts", str(folder / "prompts.txt")]
    return ["evaluate", *model, *SIZES, *PIXELS, "--out"]


@pytest.fixture(scope="module")
def expected(
    arguments: list[str],
    process_environment: Callable[[], dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, bytes]:
    """Return what one process leaves that nobody stops."""
    out = tmp_path_factory.mktemp("alone") / "out"
    command = [sys.executable, "-m", "anyflow", *arguments, str(out)]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of an evaluation but the page, which is made of the others."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != "report.html"
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def wait_for_videos(out: Path, count: int, *processes: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 600
    while len(list(out.glob("samples/*/*/*.mp4"))) < count:
        assert time.monotonic() < until and all(process.poll() is None for process in processes)
        time.sleep(0.005)


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_leave_the_bytes_of_one(
    arguments: list[str],
    expected: dict[str, bytes],
    torchrun: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    job = torchrun(2, "-m", "anyflow", *arguments, out)
    wait_for_videos(out, 2, job)
    for worker in workers(job.pid):
        os.kill(worker, signal.SIGKILL)
    job.communicate()
    assert job.returncode != 0 and 2 <= len(list(out.glob("samples/*/*/*.mp4"))) < 12
    job = torchrun(2, "-m", "anyflow", *arguments, out)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert content(out) == expected
    assert output.count("Report: ") == 1


@pytest.mark.slow
def test_a_rank_makes_what_a_killed_one_leaves(
    arguments: list[str],
    expected: dict[str, bytes],
    process_environment: Callable[[], dict[str, str]],
    tmp_path: Path,
) -> None:
    """Kill a rank without torchrun, which would end both."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "anyflow", *arguments, str(out)]
    ranks = [
        subprocess.Popen(
            command,
            env={
                **process_environment(),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    wait_for_videos(out, 1, *ranks)
    ranks[1].kill()
    ranks[1].communicate()
    output, _ = ranks[0].communicate()
    assert ranks[0].returncode == 0, output
    assert content(out) == expected


def workers(parent: int) -> list[int]:
    """List the processes that a process has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.slow
def test_real_videos_are_measured_beside_those_of_a_pipeline(
    arguments: list[str], tmp_path: Path
) -> None:
    """Give a video that stands still and one that moves by two pixels a frame.

    Each is a file of its own size and length.
    """
    folder = tmp_path / "real"
    folder.mkdir()
    texture = gaussian_filter(np.random.default_rng(0).random((64, 96)), 2, mode="wrap")
    levels = (255 * (texture - texture.min()) / np.ptp(texture)).astype(np.uint8)
    for name, speed in (("frozen", 0), ("moving", 4)):
        frames = np.stack([np.roll(levels, speed * index, axis=1)[:, :64] for index in range(9)])
        write_video(np.repeat(frames[..., None], 3, axis=-1), folder / f"{name}.mp4", fps=16)
    result = CliRunner().invoke(
        app, [*arguments, str(tmp_path / "out"), "--references", str(folder)]
    )
    assert result.exit_code == 0, result.output
    record = EvaluationRecord.load(tmp_path / "out" / "evaluation.json")
    frozen, moving = record.references["motion"]
    # of the shorter side, at 32 x 32
    assert frozen < 0.002 and moving == pytest.approx(2 / 32, rel=0.1)
    assert record.references["flicker"][0] < 0.01 < record.references["flicker"][1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "real videos" in page
    missing = CliRunner().invoke(
        app, [*arguments, str(tmp_path / "other"), "--references", str(tmp_path / "no")]
    )
    assert missing.exit_code == 2 and "is not a folder" in missing.output
