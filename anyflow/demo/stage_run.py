"""Train the stages of a run in its folder, each from where it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from anyflow.demo.progress import DemoProgress
from anyflow.demo.stages import train_stage
from anyflow.demo.state import RunState
from anyflow.demo.world import World
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.config import Recipe
from anyflow.utils.writing import whole_folder


class RunTask(NamedTuple):
    """Name a part of a run, with its steps and its cost in steps of flow matching of batch 32."""

    name: str
    steps: int
    cost: float


class StageRun:
    """Train stages, and keep the network of each that is finished.

    Args:
        world: the data.
        out: folder of the run.
        progress: shows the stages.
        state: what is finished.
        unfinished: folder in ``out`` that holds the checkpoints of the stage that runs.
    """

    def __init__(
        self,
        world: World,
        out: Path,
        progress: DemoProgress,
        state: RunState,
        unfinished: str = ".unfinished",
    ) -> None:
        self.world, self.out, self.progress, self.state = world, out, progress, state
        self.working = out / unfinished

    def folder(self, stage: str) -> Path:
        """Return the folder of a finished stage's network."""
        return self.out / "checkpoints" / stage

    def skip_finished(self, tasks: Iterable[RunTask]) -> None:
        """Take what an earlier run has finished out of the time left."""
        for task in tasks:
            if task.name in self.state.finished:
                self.progress.skip(task.name, task.cost)

    def train(self, task: RunTask, recipe: Recipe) -> None:
        """Train a stage, keep its averaged network, and note that it is finished."""
        with self.progress.stage(*task) as advance:
            model, seconds = train_stage(self.world, recipe, advance)
        self.save(self.folder(task.name), model)
        self.state.finish(task.name, seconds)
        shutil.rmtree(self.working, ignore_errors=True)

    def save(self, final: Path, model: AnyFlowTransformer3DModel) -> None:
        """Write a model and its scheduler, in place of those of an earlier run."""
        with whole_folder(final, replace=True) as partial:
            model.save_pretrained(partial / "transformer")
            self.world.scheduler().save_pretrained(partial / "scheduler")
