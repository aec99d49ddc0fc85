"""Train a causal model on the quickstart's clips, and make clips that are several times longer."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from anyflow.demo.causal_results import CAUSAL_REPORT_FILE, LongClipResults, write_causal_results
from anyflow.demo.config import CausalDemoConfig
from anyflow.demo.evaluate import build_evaluator, real_floor
from anyflow.demo.long_clips import LongClipScores, sample_long, score_long, window_ends
from anyflow.demo.progress import DemoProgress
from anyflow.demo.run import STEP_COST, DemoRun, demo_state, run_settings
from anyflow.demo.stage_run import RunTask, StageRun
from anyflow.demo.stages import stage_recipe
from anyflow.demo.state import RunState
from anyflow.methods import CausalConfig
from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.models.configuration import CausalSettings
from anyflow.training.config import NetworkConfig, Recipe
from anyflow.utils.locking import locks_folder
from anyflow.utils.threads import torch_threads

CAUSAL_STATE_FILE = "causal_state.json"

_STAGE, _EVALUATION = "causal_pretrain", "causal_evaluation"


@locks_folder("out")
def run_causal_demo(config: CausalDemoConfig, out: Path, progress: DemoProgress) -> LongClipResults:
    """Train, sample and report into ``out``; a stage that is finished there is not trained again.

    The flow matching is that of :func:`anyflow.demo.run_demo` of the same folder, which may have
    been trained there before. Writes ``checkpoints/<stage>/transformer`` and ``/scheduler``,
    ``causal_metrics.json``, ``causal.gif`` and ``causal.html``.

    Raises:
        ValueError: ``out`` is a file, is in use, or holds something else than a run of this
            configuration.
        TrainingError: a network has diverged.
        OSError: the system refuses to write; what was finished is as before.
    """
    with torch_threads(config.demo.num_threads):
        return _CausalRun(config, out, progress).run()


def finished_causal_report(config: CausalDemoConfig, out: Path) -> Path | None:
    """Return the report of a finished causal run of this configuration in ``out``, or None.

    Raises:
        ValueError: see :func:`run_causal_demo`.
    """
    demo_state(config.demo, out)
    finished, report = _causal_state(config, out).finished, out / CAUSAL_REPORT_FILE
    return report if "report" in finished and report.is_file() else None


def _causal_state(config: CausalDemoConfig, out: Path) -> RunState:
    settings = {**asdict(config), "demo": run_settings(config.demo)}
    return RunState.load(out, settings, CAUSAL_STATE_FILE)


class _CausalRun:
    def __init__(self, config: CausalDemoConfig, out: Path, progress: DemoProgress) -> None:
        self.config, self.out, self.progress = config, out, progress
        self.demo = DemoRun(config.demo, out, progress)
        self.world, self.state = self.demo.world, _causal_state(config, out)
        self.stages = StageRun(self.world, out, progress, self.state, ".unfinished_causal")

    def run(self) -> LongClipResults:
        self.demo.state.write()
        self.state.write()
        first, task, evaluation = self.demo.tasks()["flow_matching"], *self._tasks()
        self.progress.start(first.cost + task.cost + evaluation.cost)
        self.demo.stages.skip_finished([first])
        self.stages.skip_finished([task])
        self.demo.train("flow_matching")
        if _STAGE not in self.state.finished:
            self.stages.train(task, self._recipe())
        results, videos = self._evaluate(evaluation)
        write_causal_results(self.config, self.world, results, videos, self.out)
        self.state.finish("report", 0.0)
        return results

    def _tasks(self) -> tuple[RunTask, RunTask]:
        """Return the training and the evaluation."""
        stage, counts = self.config.pretrain, self.config.step_counts
        cost = stage.steps * STEP_COST[_STAGE] * stage.batch_size / 32
        calls = sum(n + 1 for n in counts) * self.config.chunks
        scored = STEP_COST[_EVALUATION] * calls * self.config.samples
        return RunTask(_STAGE, stage.steps, cost), RunTask(_EVALUATION, len(counts), scored)

    def _recipe(self) -> Recipe:
        """Make the recipe of stage 1: the quickstart's, with a causal student."""
        config, stages = self.config, self.stages
        start = stages.folder("flow_matching")
        demo = replace(config.demo, velocity_target="data", pretrain=config.pretrain)
        recipe = stage_recipe(demo, "pretrain", start, start, stages.working / _STAGE)
        settings = CausalSettings(
            config.compressed_patch_size,
            config.full_chunk_limit,
            chunk_partition=(1,) * self.world.latent_shape[0],
        )
        causal = CausalConfig(long_context_ratio=config.long_context_ratio, bidirectional_prob=0.0)
        return replace(
            recipe,
            student=NetworkConfig(recipe.student.path, causal=settings),
            pretrain=replace(recipe.pretrain, causal=causal),
        )

    def _evaluate(self, task: RunTask) -> tuple[LongClipResults, dict[int, Tensor]]:
        """Return the scores, and one uint8 video ``[4, F, 12, 12]`` per class by step count."""
        config, world, start = self.config, self.world, time.perf_counter()
        # motion is in off_course, exactly and at less cost
        evaluator = replace(build_evaluator(world), black_white=None)
        labels = world.labels(config.samples).cpu()
        folder = self.stages.folder(_STAGE) / "transformer"
        model = AnyFlowFARTransformer3DModel.from_pretrained(folder).to(world.device)
        scores: dict[int, LongClipScores] = {}
        videos: dict[int, Tensor] = {}
        with self.progress.stage(*task) as advance, torch.inference_mode():
            for n in config.step_counts:
                made = sample_long(
                    world, model, config.chunks, config.samples, n, config.cache_window
                )
                scores[n] = score_long(world, evaluator, made, labels)
                videos[n] = world.shapes.to_uint8(made[: world.shapes.num_classes])
                advance(None)
        seconds = {
            "flow_matching": self.demo.state.finished["flow_matching"],
            _STAGE: self.state.finished[_STAGE],
            _EVALUATION: time.perf_counter() - start,
        }
        floor = real_floor(world, evaluator, config.samples)
        frames = window_ends(world, config.chunks)
        return LongClipResults(
            frames, floor.fd, scores, seconds, config.demo.seed, config.demo.budget
        ), videos
