"""Run the quickstart stage by stage, each of which can be resumed, and write its folder."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from anyflow.demo.config import DemoConfig
from anyflow.demo.evaluate import build_evaluator, evaluate_method, real_floor, samplers
from anyflow.demo.progress import DemoProgress
from anyflow.demo.results import REPORT_FILE, write_results
from anyflow.demo.stages import stage_recipe, train_stage
from anyflow.demo.world import World
from anyflow.evaluation import EvaluationResults, Metrics
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.utils.devices import resolve_device
from anyflow.utils.documents import is_no_folder, read_json
from anyflow.utils.locking import locks_folder
from anyflow.utils.threads import torch_threads
from anyflow.utils.writing import whole_folder, write_text

STATE_FILE = "state.json"

# Seconds per step of batch 32, and per evaluation of 512 samples, relative to a flow-matching step
# of batch 32; the estimate of the time left uses them.
_STEP_COST = {"flow_matching": 1.0, "pretrain": 1.7, "on_policy": 5.6, "evaluation": 12.0}

_CHECKPOINTS = ("flow_matching", "pretrain", "on_policy")  # a stage each, in their order
# holds the start and the checkpoints of the stage that runs
_UNFINISHED = ".unfinished"

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
        return _DemoRun(config, out, progress).run()


def finished_report(config: DemoConfig, out: Path) -> Path | None:
    """Return the report of a finished run of this configuration in ``out``, or None.

    Raises:
        ValueError: see :func:`run_demo`.
    """
    state = _load_state(config, out)
    return (
        out / REPORT_FILE
        if "report" in state["finished"] and (out / REPORT_FILE).is_file()
        else None
    )


class _DemoRun:
    def __init__(self, config: DemoConfig, out: Path, progress: DemoProgress) -> None:
        self.state = _load_state(config, out)
        self.config, self.out, self.progress = config, out, progress
        self.world = World(config)

    def run(self) -> EvaluationResults:
        config, plan = self.config, self._plan()
        self._write_state()  # a run that ends in its first stage can be told from another's folder
        self.progress.start(sum(cost for _, _, cost in plan))
        for name, _, cost in plan:
            if name in self.state["finished"]:
                self.progress.skip(name, cost)
        for name in _CHECKPOINTS:
            self._train(name)
        results, examples = self._evaluate()
        write_results(config, self.world, results, examples, self.out)
        self._finish("report", 0.0)
        return results

    def _plan(self) -> list[tuple[str, int, float]]:
        stages = {name: getattr(self.config, name) for name in _CHECKPOINTS}
        plan = [
            (name, s.steps, s.steps * _STEP_COST[name] * s.batch_size / 32)
            for name, s in stages.items()
        ]
        evaluations = len(_CHECKPOINT_OF) * len(self.config.step_counts)
        cost = evaluations * _STEP_COST["evaluation"] * self.config.samples / 512
        return [*plan, ("evaluation", evaluations, cost)]

    # Stages ---------------------------------------------------------------------------------------

    def _train(self, name: str) -> None:
        if name in self.state["finished"]:
            return
        folders = {other: self.out / "checkpoints" / other for other in _CHECKPOINTS}
        if name == "flow_matching":
            student = self.out / _UNFINISHED / "start"
            self._save(student, self.world.model())
        else:
            student = folders["pretrain" if name == "on_policy" else "flow_matching"]
        working = self.out / _UNFINISHED / name
        recipe = stage_recipe(self.config, name, student, folders["flow_matching"], working)
        steps, cost = next((steps, cost) for n, steps, cost in self._plan() if n == name)
        with self.progress.stage(name, steps, cost) as advance:
            model, seconds = train_stage(self.world, recipe, advance)
        self._save(folders[name], model)
        self._finish(name, seconds)
        shutil.rmtree(self.out / _UNFINISHED, ignore_errors=True)

    def _evaluate(self) -> tuple[EvaluationResults, dict[str, dict[int, Tensor]]]:
        world, start = self.world, time.perf_counter()
        evaluator = build_evaluator(world)
        curves: dict[str, dict[int, Metrics]] = {}
        examples: dict[str, dict[int, Tensor]] = {}
        _, steps, cost = self._plan()[-1]
        with self.progress.stage("evaluation", steps, cost) as advance:
            for name, sampler in samplers(world).items():
                model = self._load(_CHECKPOINT_OF[name])
                curves[name], examples[name] = evaluate_method(
                    world, evaluator, sampler, model, lambda: advance(None)
                )
        seconds = {**self.state["finished"], "evaluation": time.perf_counter() - start}
        seconds.pop("report", None)
        seconds["total"] = sum(s for name, s in seconds.items() if name != "total")
        floor = real_floor(world, evaluator)
        return EvaluationResults(
            floor, curves, seconds, self.config.seed, self.config.budget
        ), examples

    # Files ----------------------------------------------------------------------------------------

    def _save(self, final: Path, model: AnyFlowTransformer3DModel) -> None:
        """Write a model and its scheduler, in place of those of an earlier run."""
        with whole_folder(final, replace=True) as partial:
            model.save_pretrained(partial / "transformer")
            self.world.scheduler().save_pretrained(partial / "scheduler")

    def _load(self, name: str) -> AnyFlowTransformer3DModel:
        folder = self.out / "checkpoints" / name / "transformer"
        return AnyFlowTransformer3DModel.from_pretrained(folder).to(self.world.device)

    def _finish(self, name: str, seconds: float) -> None:
        self.state["finished"][name] = seconds
        self._write_state()

    def _write_state(self) -> None:
        write_text(self.out / STATE_FILE, json.dumps(self.state, indent=2) + "\n")


def _load_state(config: DemoConfig, out: Path) -> dict[str, Any]:
    """Return the settings of a run in ``out`` and what it has finished, by stage in seconds."""
    if is_no_folder(out):
        raise ValueError(f"--out {out} is a file; name a folder")
    if (file := next((parent for parent in out.parents if parent.is_file()), None)) is not None:
        raise ValueError(f"--out {out} cannot be created: {file} is a file")
    resolve_device(config.device, "--device", computes=True)
    settings = json.loads(json.dumps(asdict(config)))
    del settings["num_threads"]  # changes the time of a run and not its numbers
    file = out / STATE_FILE
    if not file.exists():
        if out.exists() and any(p for p in out.iterdir() if not p.name.startswith(".")):
            raise ValueError(f"--out {out} is not empty and holds no demo run; name another folder")
        return {"config": settings, "finished": {}}
    try:
        state = read_json(file, finite=True)
        if not isinstance(state, dict) or set(state) != {"config", "finished"}:
            raise ValueError("it must be an object with 'config' and 'finished'")
        other, finished = state["config"], state["finished"]
        if not isinstance(other, dict) or not isinstance(finished, dict):
            raise ValueError("'config' and 'finished' must be objects")
        if not all(type(seconds) in (int, float) and seconds >= 0 for seconds in finished.values()):
            raise ValueError("'finished' must have the seconds of each stage")
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({error}); delete {out} or name another --out"
        ) from None
    if other != settings:
        changed = ", ".join(
            sorted(k for k in {**settings, **other} if other.get(k) != settings.get(k))
        )
        raise ValueError(
            f"--out {out} holds a run with other settings ({changed}); name another --out or "
            "delete it"
        )
    return {"config": settings, "finished": finished}
