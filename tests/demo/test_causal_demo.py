"""Run the causal act on tiny budgets: long clips, their scores, and a real kill."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.demo import (
    CausalDemoConfig,
    DemoConfig,
    DemoProgress,
    World,
    finished_causal_report,
    run_causal_demo,
)
from anyflow.demo.causal_results import LongClipResults
from anyflow.demo.evaluate import build_evaluator
from anyflow.demo.long_clips import real_long, sample_long, score_long, window_ends
from anyflow.evaluation import Evaluator
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel

# The same tiny configuration, for this process and for the one that is killed.
TINY = """
from dataclasses import replace
from anyflow.demo import CausalDemoConfig, DemoConfig
base = DemoConfig(num_layers=1, num_heads=2, heldout=64, checkpoint_every=2)
base = replace(base, flow_matching=replace(base.flow_matching, steps=4, batch_size=8))
tiny = CausalDemoConfig(base, step_counts=(1, 2), chunks=6, samples=32)
tiny = replace(tiny, pretrain=replace(tiny.pretrain, steps=6, batch_size=8))
"""

KILLED = (
    TINY
    + """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from rich.console import Console
from anyflow.demo import DemoProgress, run_causal_demo

class Killed(DemoProgress):
    @contextmanager
    def stage(self, name, steps, cost):
        with super().stage(name, steps, cost) as advance:
            losses = []
            def counted(loss):
                losses.append(loss)
                if (name, len(losses)) == ("causal_pretrain", 5):
                    os.kill(os.getpid(), signal.SIGKILL)
                advance(loss)
            yield counted

with Killed(Console(quiet=True)) as progress:
    run_causal_demo(tiny, Path(sys.argv[1]), progress)
"""
)


def tiny_config() -> CausalDemoConfig:
    scope: dict[str, CausalDemoConfig] = {}
    exec(TINY, scope)
    return scope["tiny"]


def run(config: CausalDemoConfig, out: Path) -> tuple[LongClipResults, str]:
    log = io.StringIO()
    with DemoProgress(Console(file=log, width=200), line_seconds=0.0) as progress:
        return run_causal_demo(config, out, progress), log.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LongClipResults]:
    out = tmp_path_factory.mktemp("causal") / "run"
    return out, run(tiny_config(), out)[0]


@pytest.mark.slow
def test_folder_holds_everything_promised(finished: tuple[Path, LongClipResults]) -> None:
    out, _ = finished
    metrics = json.loads((out / "causal_metrics.json").read_text())
    assert metrics["training_frames"] == 8 and metrics["frames"] == [8, 10, 12]
    assert set(metrics["steps_per_chunk"]) == {"1", "2"}
    for scores in metrics["steps_per_chunk"].values():
        assert set(scores) == {"fd", "template_mse", "of_class", "off_course"}
        assert all(len(values) == 3 for values in scores.values())
    assert set(metrics["seconds"]) == {"flow_matching", "causal_pretrain", "causal_evaluation"}
    with Image.open(out / "causal.gif") as animation:
        assert animation.n_frames == 12 and animation.size[0] <= 800
    report = (out / "causal.html").read_text()
    assert "1.5 times as long" in report and "http://" not in report and "https://" not in report
    assert finished_causal_report(tiny_config(), out) == out / "causal.html"
    assert not list(out.glob(".unfinished*"))


@pytest.mark.slow
def test_the_checkpoint_is_a_causal_folder_trained_from_flow_matching(
    finished: tuple[Path, LongClipResults],
) -> None:
    folders = [
        finished[0] / "checkpoints" / name / "transformer"
        for name in ("causal_pretrain", "flow_matching")
    ]
    causal = AnyFlowFARTransformer3DModel.from_pretrained(folders[0])
    start = AnyFlowTransformer3DModel.from_pretrained(folders[1])
    assert causal.config.full_chunk_limit == 2
    assert tuple(causal.config.chunk_partition) == (1, 1, 1, 1)
    assert causal.condition_embedder.delta_embedder is not None
    assert start.condition_embedder.delta_embedder is None
    moved = causal.patch_embedding.weight - start.patch_embedding.weight
    share = float(moved.detach().norm() / start.patch_embedding.weight.detach().norm())
    assert 0 < share < 0.2, "it was not trained, or not from there"


@pytest.mark.slow
def test_killed_run_goes_on_with_the_flow_matching_of_the_other_demo(
    finished: tuple[Path, LongClipResults], tmp_path: Path
) -> None:
    """Let a run kill itself between two checkpoints, in a folder of the first stage of the other.

    Its numbers are those of a run that trained everything, to the bit.
    """
    out, weights = tmp_path / "run", Path("transformer", "diffusion_pytorch_model.safetensors")
    folder = Path("checkpoints", "flow_matching")
    shutil.copytree(finished[0] / folder, out / folder)
    shutil.copy(finished[0] / "state.json", out)
    written = (out / folder / weights).stat().st_mtime_ns
    process = subprocess.run([sys.executable, "-c", KILLED, str(out)], timeout=600)
    assert process.returncode == -signal.SIGKILL
    results, log = run(tiny_config(), out)
    assert "flow matching (teacher): done by an earlier run" in log
    assert (out / folder / weights).stat().st_mtime_ns == written
    assert list(json.loads((out / "state.json").read_text())["finished"]) == ["flow_matching"]
    steps = dict(re.findall(r"causal stage 1: pretraining: step (\d) of 6(.*)", log))
    assert "loss" not in steps["4"] and "loss" in steps["5"], "it did not go on from its checkpoint"
    assert results.scores == finished[1].scores
    name = "causal.gif"
    assert (out / name).read_bytes() == (finished[0] / name).read_bytes()


@pytest.mark.slow
def test_other_settings_of_either_part_are_refused(
    finished: tuple[Path, LongClipResults],
) -> None:
    config, (out, _) = tiny_config(), finished
    with pytest.raises(ValueError, match=r"other settings \(chunks\)"):
        finished_causal_report(replace(config, chunks=8), out)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        finished_causal_report(replace(config, demo=replace(config.demo, seed=3)), out)


# Scores -------------------------------------------------------------------------------------------


def evaluator(world: World) -> Evaluator:
    return replace(build_evaluator(world), black_white=None)  # without motion, which takes seconds


def test_real_clips_of_any_length_score_as_real_ones() -> None:
    world = World(DemoConfig(heldout=128))
    labels = world.labels(64)
    clips = real_long(world, 24, labels, world.generator(1))
    assert clips.shape == (64, 24, 1, 12, 12)
    scores = score_long(world, evaluator(world), clips, labels)
    assert len(scores.fd) == len(window_ends(world, 12)) == 9
    assert max(scores.template_mse) < 1e-10
    assert set(scores.of_class) == {1.0} and set(scores.off_course) == {0.0}
    assert max(scores.fd) < 3 * min(scores.fd)


def test_a_clip_that_jumps_is_as_far_off_its_course_as_it_has_jumped() -> None:
    """Move real clips by 3 rows and 4 columns from frame 12 on."""
    world = World(DemoConfig(heldout=128))
    labels = world.labels(16)
    clips = real_long(world, 24, labels, world.generator(2))
    clips = torch.cat([clips[:, :12], clips[:, 12:].roll((3, 4), dims=(3, 4))], dim=1)
    scores = score_long(world, evaluator(world), clips, labels)
    assert scores.off_course[:3] == (0.0,) * 3 and scores.off_course[6:] == (5.0,) * 3
    assert max(scores.template_mse[:3] + scores.template_mse[6:]) < 1e-10
    assert min(scores.template_mse[3:6]) > 0.01, "the jump is in these windows"


def test_clips_of_another_class_are_found() -> None:
    world = World(DemoConfig(heldout=128))
    labels = world.labels(64)
    swapped = real_long(world, 12, (labels + 1) % 4, world.generator(3))
    scores = score_long(world, evaluator(world), swapped, labels)
    assert set(scores.of_class) == {0.0} and min(scores.template_mse) > 0.1


def test_a_clip_is_the_beginning_of_a_longer_one() -> None:
    """Sample 4 and 9 chunks of the same noise: no chunk depends on later ones."""
    world = World(DemoConfig(num_layers=1, num_heads=2))
    plain = world.model().eval()
    plain.enable_flow_map(0.25)
    torch.nn.init.normal_(
        plain.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    model = AnyFlowFARTransformer3DModel.from_bidirectional(
        plain, compressed_patch_size=(1, 6, 6), full_chunk_limit=2, chunk_partition=(1, 1, 1, 1)
    )
    short, long = (sample_long(world, model, chunks, 1, 2, 2) for chunks in (4, 9))
    assert long.shape == (1, 18, 1, 12, 12)
    torch.testing.assert_close(long[:, :8], short, rtol=1e-4, atol=1e-4)


def test_the_command_refuses_what_the_demo_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", "--causal", "--no-open", "--out", "full"])
    assert result.exit_code == 2 and "not empty" in result.stderr
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
