"""Run the quickstart stage by stage, each of which can be resumed, and write its folder."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from anyflow.demo.config import DemoConfig
from anyflow.demo.evaluate import build_evaluator, evaluate_method, real_floor, samplers
from anyflow.demo.progress import DemoProgress
from anyflow.demo.results import REPORT_FILE, write_results
from anyflow.demo.stage_run import RunTask, StageRun
from anyflow.demo.stages import stage_recipe
from anyflow.demo.state import RunState
from anyflow.demo.world import World
from anyflow.evaluation import EvaluationResults, Metrics
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.utils.devices import resolve_device
from anyflow.utils.locking import locks_folder
from anyflow.utils.threads import torch_threads

# Seconds per step of batch 32, and per evaluation of 512 samples, relative to a flow-matching step
# of batch 32; the estimate of the time left uses them.
STEP_COST = {
    "flow_matching": 1.0,
    "pretrain": 1.7,
    "on_policy": 5.6,
    "evaluation": 12.0,
    "causal_pretrain": 1.6,
    "causal_evaluation": 0.004,  # of a call of the network on a chunk of one clip
}

_CHECKPOINTS = ("flow_matching", "pretrain", "on_policy")  # a stage each, in their order

# Each method of the report scores this checkpoint.
_CHECKPOINT_OF = {
    "flow_matching": "flow_matching",
    "pretrain": "pretrain",
    "on_policy": "on_policy",
    "consistency_sampler": "on_policy",
}


@locks_folder("out")
def run_demo(config: DemoConfig, out: Path, progress: DemoProgress) -> EvaluationResults:
    """Train, evaluate and report into ``out``; a stage that is finished there is not trained again.

    Writes ``checkpoints/<stage>/transformer`` and ``/scheduler`` (diffusers folders),
    ``metrics.json``, ``samples/*.gif``, ``curve.png``, ``any_step.gif`` and ``report.html``.

    Raises:
        ValueError: ``out`` is a file, is in use, or holds something else than a run of this
            configuration.
        TrainingError: a network has diverged.
        OSError: the system refuses to write, such as on a full disk; what was finished is as
            before.
    """
    with torch_threads(config.num_threads):
        return DemoRun(config, out, progress).run()


def finished_report(config: DemoConfig, out: Path) -> Path | None:
    """Return the report of a finished run of this configuration in ``out``, or None.

    Raises:
        ValueError: see :func:`run_demo`.
    """
    state = demo_state(config, out)
    return (
        out / REPORT_FILE if "report" in state.finished and (out / REPORT_FILE).is_file() else None
    )


def demo_state(config: DemoConfig, out: Path) -> RunState:
    """Return the state of a run of this configuration in ``out``; begun if there is none.

    Raises:
        ValueError: see :func:`run_demo`.
    """
    resolve_device(config.device, "--device", computes=True)
    return RunState.load(out, run_settings(config))


def run_settings(config: DemoConfig) -> dict[str, Any]:
    """Return the settings that the numbers of a run depend on."""
    settings = asdict(config)
    del settings["num_threads"]  # changes the time of a run and not its numbers
    return settings


class DemoRun:
    """Make a whole run, or its first stage for other runs.

    Args:
        config: settings of the run.
        out: its folder.
        progress: shows what is done.
    """

    def __init__(self, config: DemoConfig, out: Path, progress: DemoProgress) -> None:
        self.config, self.out, self.progress = config, out, progress
        self.stages = StageRun(World(config), out, progress, demo_state(config, out))
        self.state, self.world = self.stages.state, self.stages.world

    def run(self) -> EvaluationResults:
        """Train what is not finished, evaluate, and write the report."""
        self.state.write()  # a run that ends in its first stage can be told from another's folder
        tasks = [*self.tasks().values(), self._evaluation()]
        self.progress.start(sum(task.cost for task in tasks))
        self.stages.skip_finished(tasks)
        for name in _CHECKPOINTS:
            self.train(name)
        results, examples = self._evaluate()
        write_results(self.config, self.world, results, examples, self.out)
        self.state.finish("report", 0.0)
        return results

    def tasks(self) -> dict[str, RunTask]:
        """Return the stages by name, in their order."""
        stages = {name: getattr(self.config, name) for name in _CHECKPOINTS}
        return {
            name: RunTask(name, s.steps, s.steps * STEP_COST[name] * s.batch_size / 32)
            for name, s in stages.items()
        }

    def train(self, name: str) -> None:
        """Train a stage, unless it is finished."""
        if name in self.state.finished:
            return
        stages = self.stages
        if name == "flow_matching":
            student = stages.working / "start"
            stages.save(student, self.world.model())
        else:
            student = stages.folder("pretrain" if name == "on_policy" else "flow_matching")
        recipe = stage_recipe(
            self.config, name, student, stages.folder("flow_matching"), stages.working / name
        )
        stages.train(self.tasks()[name], recipe)

    def _evaluation(self) -> RunTask:
        evaluations = len(_CHECKPOINT_OF) * len(self.config.step_counts)
        cost = evaluations * STEP_COST["evaluation"] * self.config.samples / 512
        return RunTask("evaluation", evaluations, cost)

    def _evaluate(self) -> tuple[EvaluationResults, dict[str, dict[int, Tensor]]]:
        world, start = self.world, time.perf_counter()
        evaluator = build_evaluator(world)
        curves: dict[str, dict[int, Metrics]] = {}
        examples: dict[str, dict[int, Tensor]] = {}
        with self.progress.stage(*self._evaluation()) as advance:
            for name, sampler in samplers(world).items():
                folder = self.stages.folder(_CHECKPOINT_OF[name]) / "transformer"
                model = AnyFlowTransformer3DModel.from_pretrained(folder).to(world.device)
                curves[name], examples[name] = evaluate_method(
                    world, evaluator, sampler, model, lambda: advance(None)
                )
        seconds = {**self.state.finished, "evaluation": time.perf_counter() - start}
        seconds.pop("report", None)
        seconds["total"] = sum(s for name, s in seconds.items() if name != "total")
        floor = real_floor(world, evaluator)
        return EvaluationResults(
            floor, curves, seconds, self.config.seed, self.config.budget
        ), examples
