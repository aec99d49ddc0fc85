"""Run several real processes on a Wan-shaped pipeline, some of which are killed and resumed."""

import shutil
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
from anyflow.utils.threads import torch_threads

PROMPTS = ["a red disc moves", "blue cross to the right/left"]
SIZES = ["--steps", "1,2", "--num-samples", "2", "--reference-steps", "3", "--num-frames", "5"]
PIXELS = ["--height", "32", "--width", "32", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def arguments(wan_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command line without its folder.

    Its real videos are one that stands still and one that moves by two pixels a frame, each a file
    of its own size and length.
    """
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
    (folder / "real").mkdir()
    texture = gaussian_filter(np.random.default_rng(0).random((64, 96)), 2, mode="wrap")
    levels = (255 * (texture - texture.min()) / np.ptp(texture)).astype(np.uint8)
    for name, speed in (("frozen", 0), ("moving", 4)):
        frames = np.stack([np.roll(levels, speed * index, axis=1)[:, :64] for index in range(9)])
        write_video(np.repeat(frames[..., None], 3, axis=-1), folder / "real" / f"{name}.mp4", 16)
    model = ["--model", str(folder / "tiny"), "--prompts", str(folder / "prompts.txt")]
    return ["evaluate", *model, *SIZES, *PIXELS, "--references", str(folder / "real"), "--out"]


@pytest.fixture(scope="module")
def alone(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that one process makes, with one thread as each rank has."""
    out = tmp_path_factory.mktemp("alone") / "out"
    with torch_threads(1):
        result = CliRunner().invoke(app, [*arguments, str(out)])
    assert result.exit_code == 0, result.output
    return out


def start_ranks(
    arguments: list[str], environment: dict[str, str]
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Start two ranks without torchrun, which would end both with the first."""
    command = [sys.executable, "-m", "anyflow", *arguments]

    def start(rank: int) -> subprocess.Popen[str]:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        return subprocess.Popen(
            command,
            env=environment | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start(0), start(1)


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
    alone: Path,
    process_environment: Callable[[], dict[str, str]],
    torchrun: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    ranks = start_ranks([*arguments, str(out)], process_environment())
    wait_for_videos(out, 2, *ranks)
    for rank in ranks:
        rank.kill()
        rank.communicate()
    assert 2 <= len(list(out.glob("samples/*/*/*.mp4"))) < 12
    job = torchrun(2, "-m", "anyflow", *arguments, out)
    output, _ = job.communicate()
    assert job.returncode == 0, output
    assert content(out) == content(alone)
    assert output.count("Report: ") == 1


@pytest.mark.slow
def test_a_rank_makes_what_a_killed_one_leaves(
    arguments: list[str],
    alone: Path,
    process_environment: Callable[[], dict[str, str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    ranks = start_ranks([*arguments, str(out)], process_environment())
    wait_for_videos(out, 1, *ranks)
    ranks[1].kill()
    ranks[1].communicate()
    output, _ = ranks[0].communicate()
    assert ranks[0].returncode == 0, output
    assert content(out) == content(alone)


@pytest.mark.slow
def test_real_videos_are_measured_beside_those_of_a_pipeline(
    arguments: list[str], alone: Path, tmp_path: Path
) -> None:
    record = EvaluationRecord.load(alone / "evaluation.json")
    frozen, moving = record.references["motion"]
    # of the shorter side, at 32 x 32
    assert frozen < 0.002 and moving == pytest.approx(2 / 32, rel=0.1)
    assert record.references["flicker"][0] < 0.01 < record.references["flicker"][1]
    assert "real videos" in (alone / "report.html").read_text()
    other = [*arguments[:-2], str(tmp_path / "no"), "--out", str(tmp_path / "other")]
    missing = CliRunner().invoke(app, other)
    assert missing.exit_code == 2 and "is not a folder" in missing.output
