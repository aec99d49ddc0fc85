"""Run `anyflow evaluate`: sample models, measure each finished set of videos, and report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from anyflow.evaluation.runs.layout import Layout
from anyflow.evaluation.runs.measuring import Measurer
from anyflow.evaluation.runs.models import PipelineModel, VideoModel
from anyflow.evaluation.runs.plan import EvaluationPlan
from anyflow.evaluation.runs.ranks import Rank
from anyflow.evaluation.runs.record import RECORD_FILE, EvaluationRecord, MetricRecord
from anyflow.evaluation.runs.sampling import (
    Failed,
    SampleMaker,
    SampleProgress,
    missing_jobs,
    remove_work,
)
from anyflow.evaluation.runs.vbench import VBench, VBenchError
from anyflow.pipelines.video import import_av
from anyflow.utils.documents import shortened
from anyflow.utils.locking import folder_lock
from anyflow.utils.progress import counted, status


@dataclass(frozen=True)
class EvaluationReport:
    """Hold what a run did.

    Args:
        made: videos that were not there when it began and are now.
        skipped: videos that were there.
        failed: videos that could not be made.
        problems: other failures, a line each.
        report: the page, or None without any result, or for a process that does
            not write it.
    """

    made: int = 0
    skipped: int = 0
    failed: tuple[Failed, ...] = ()
    problems: tuple[str, ...] = ()
    report: Path | None = None


def run_evaluation(
    plan: EvaluationPlan,
    out: Path,
    *,
    metric_models: Path | None = None,
    references: Path | None = None,
    vbench: VBench | None = None,
    console: Console | None = None,
) -> EvaluationReport:
    """Make the videos of a plan, measure them, and report.

    This process works alone or is one of those that torchrun started. It writes
    ``samples/<model>/<steps>/<prompt>-<index>.mp4``, ``prompts.json``, ``evaluation.json`` after
    each set of videos, and ``report.html``. Videos that are there are not made again: the
        same
    call continues where it was stopped.

    Args:
        plan: plan of the evaluation.
        out: its folder; one with an evaluation of other settings is refused.
        metric_models: folder of the weights that metrics need; None for the usual one.
        references: folder of real videos, or None.
        vbench: scores each set of videos, or None.
        console: gets progress and notes.

    Raises:
        ValueError: before any weight is loaded, for what cannot work or a folder in use; then for
            weights that do not fit.
        OSError: the system refuses to write.
        ImportError: a package is missing.
    """
    import_av()  # without PyAV the first video would be made in vain
    rank = Rank.of_environment()
    if rank.world_size > 1:
        plan = replace(
            plan, models={name: _placed(model, rank) for name, model in plan.models.items()}
        )
    for model in plan.models.values():
        model.check(plan.prompts)
    if vbench is not None:
        vbench.check()
    layout = Layout.of(out, plan.texts, plan.num_samples)
    if not rank.is_main:
        rank.wait_for_record(layout.record, plan.record())
        _help(plan, layout, rank)
        return EvaluationReport()
    measurer = Measurer(plan, layout, metric_models=metric_models, references=references)
    with folder_lock(out):
        return _EvaluationRun(plan, layout, measurer, vbench, console).run()


def rewrite_report(out: Path) -> Path:
    """Write the report of a folder from its record and its videos.

    Raises:
        ValueError: the folder holds no evaluation, or a damaged one.
    """
    if not (out / RECORD_FILE).is_file():
        raise ValueError(f"{shortened(out)} holds no evaluation: it has no {RECORD_FILE}")
    record = EvaluationRecord.load(out / RECORD_FILE)
    return _write_report(record, Layout.of(out, record.prompts, record.num_samples))


class _EvaluationRun:
    """Do the work of the process that writes the record."""

    def __init__(
        self,
        plan: EvaluationPlan,
        layout: Layout,
        measurer: Measurer,
        vbench: VBench | None,
        console: Console | None,
    ) -> None:
        self.plan, self.layout, self.measurer, self.vbench, self.console = (
            plan,
            layout,
            measurer,
            vbench,
            console,
        )
        self.rank = Rank.of_environment()
        self.record = self._begin()
        self.measured: set[tuple[str, int]] = set()
        self.problems: list[str] = []

    def run(self) -> EvaluationReport:
        """Sample, measure and report."""
        self._note()
        failed: list[Failed] = []
        before = missing_jobs(self.plan, self.layout)
        share = sum(job.num_inference_steps for job in before) / self.rank.world_size
        with SampleProgress(self.console, share) as progress:
            for model in self.plan.models:
                maker = SampleMaker(
                    self.plan, self.layout, self.rank, model, self.console, progress
                )
                for wait in (False, True):  # at first the videos that no other process is making
                    for num_inference_steps in self.plan.sets:
                        if maker.make(num_inference_steps, wait=wait):
                            self._measure(model, num_inference_steps, last=wait)
                failed += maker.failed
        self._measure_references()
        remove_work(self.layout, self.rank)
        report = None
        if any(
            self._is_whole(model, num_inference_steps)
            for model in self.record.models
            for num_inference_steps in self.record.step_counts
        ):
            report = _write_report(self.record, self.layout)
        made = len(before) - len(missing_jobs(self.plan, self.layout))
        skipped = self.record.num_videos * len(self.plan.sets) * len(self.plan.models) - len(before)
        return EvaluationReport(made, skipped, tuple(failed), tuple(self.problems), report)

    def _begin(self) -> EvaluationRecord:
        """Take over the record of the folder, or begin one and write it before anything is made."""
        out = self.layout.folder
        if self.layout.record.exists():
            record = self.plan.extend(EvaluationRecord.load(self.layout.record), out)
        elif any(not path.name.startswith(".") for path in out.iterdir()):
            raise ValueError(
                f"{shortened(out)} is not empty and holds no evaluation; name another folder with "
                "--out"
            )
        else:
            record = self.plan.record()
        record = self.measurer.prepare(record)
        if self.vbench is not None:
            known = {name: _vbench_metric(name) for name in self.vbench.dimensions}
            record = replace(
                record, metrics={**record.metrics, **{_vbench_name(n): m for n, m in known.items()}}
            )
        self.layout.write_prompts()
        record.save(self.layout.record)
        return record

    def _note(self) -> None:
        if self.console is None:
            return
        for model in self.plan.models.values():
            if isinstance(model, PipelineModel):
                for hint in model.settings.hints(self.plan.prompts):
                    self.console.print(f"note: {hint}", markup=False)
        self._note_needs(
            [name for name, metric in self.record.metrics.items() if metric.needs is not None]
        )

    def _note_needs(self, metrics: Iterable[str]) -> None:
        for metric in (self.record.metrics[name] for name in metrics):
            if self.console is not None:
                self.console.print(f"not measured: {metric.title} ({metric.needs})", markup=False)

    def _measure(self, model: str, num_inference_steps: int, *, last: bool) -> None:
        """Measure a set of videos, all of which are there, by what the record lacks.

        Without the videos that they are compared with, nothing is done before the ``last`` call.
        """
        if (
            num_inference_steps not in self.plan.step_counts
            or (model, num_inference_steps) in self.measured
        ):
            return
        reference = self.plan.reference_steps
        compared = reference == 0 or self._is_whole(model, reference)
        if not compared and not last:
            return
        self.measured.add((model, num_inference_steps))
        lacking = self.measurer.lacking(self.record, model, num_inference_steps, compared=compared)
        if lacking:
            before = set(self.measurer.needs)
            with status(
                self.console,
                f"measuring {model} at {counted(num_inference_steps, 'step')}: "
                f"{', '.join(lacking)}",
            ):
                values, sets = self.measurer.measure(model, num_inference_steps, lacking)
            self._keep(
                self.measurer.prepare(self.record).with_results(
                    model, num_inference_steps, values, sets
                )
            )
            self._note_needs(name for name in self.measurer.needs if name not in before)
        self._score(model, num_inference_steps)

    def _score(self, model: str, num_inference_steps: int) -> None:
        """Let VBench score a set of videos; a failure is one problem and does not end the run."""
        if self.vbench is None:
            return
        done = self.record.sets.get(model, {})
        lacking = [
            name
            for name in self.vbench.dimensions
            if num_inference_steps not in done.get(_vbench_name(name), {})
        ]
        if not lacking:
            return
        folder, out = (
            self.layout.samples(model, num_inference_steps),
            self.layout.vbench(model, num_inference_steps),
        )
        try:
            with status(
                self.console,
                f"VBench scores {model} at {counted(num_inference_steps, 'step')}: "
                f"{', '.join(lacking)}",
            ):
                scores = self.vbench.score(folder, self.layout.prompts, out, lacking)
        except VBenchError as error:
            self.problems.append(str(error))
            self.vbench = None  # VBench would fail again
            names = [_vbench_name(name) for name in lacking]
            metrics = {
                name: replace(metric, needs=str(error))
                if name in names and not self._has_values(name)
                else metric
                for name, metric in self.record.metrics.items()
            }
            self._keep(replace(self.record, metrics=metrics))
            return
        found = {_vbench_name(name): score for name, score in scores.items()}
        self._keep(self.record.with_results(model, num_inference_steps, {}, found))

    def _measure_references(self) -> None:
        lacking = self.measurer.lacking_references(self.record)
        if lacking:
            with status(self.console, f"measuring the real videos: {', '.join(lacking)}"):
                values = self.measurer.measure_references(lacking)
            self._keep(replace(self.record, references={**self.record.references, **values}))

    def _has_values(self, metric: str) -> bool:
        return any(
            metric in metrics
            for table in (self.record.values, self.record.sets)
            for metrics in table.values()
        )

    def _is_whole(self, model: str, num_inference_steps: int) -> bool:
        return all(file.is_file() for file in self.layout.videos(model, num_inference_steps))

    def _keep(self, record: EvaluationRecord) -> None:
        record.save(self.layout.record)
        self.record = record


def _help(plan: EvaluationPlan, layout: Layout, rank: Rank) -> None:
    """Make videos beside the process that writes the record.

    That process tries failed videos once more and says why they fail.
    """
    with SampleProgress(None, 0) as progress:
        for model in plan.models:
            maker = SampleMaker(plan, layout, rank, model, None, progress)
            for wait in (False, True):
                for num_inference_steps in plan.sets:
                    maker.make(num_inference_steps, wait=wait)
    remove_work(layout, rank)


def _placed(model: VideoModel, rank: Rank) -> VideoModel:
    device = rank.device(model.device)
    return model if device is None else model.place(device)


def _write_report(record: EvaluationRecord, layout: Layout) -> Path:
    from anyflow.evaluation.pages import write_evaluation_report

    clips: dict[str, Mapping[int, Sequence[Path]]] = {}
    for model in record.models:
        sets = {
            num_inference_steps: layout.videos(model, num_inference_steps)
            for num_inference_steps in record.step_counts
        }
        clips[model] = {
            num_inference_steps: files
            for num_inference_steps, files in sets.items()
            if all(file.is_file() for file in files)
        }
    write_evaluation_report(layout.report, record, clips)
    return layout.report


def _vbench_name(dimension: str) -> str:
    return f"vbench_{dimension}"


def _vbench_metric(dimension: str) -> MetricRecord:
    return MetricRecord(
        f"VBench: {dimension.replace('_', ' ')}",
        "",
        None if dimension == "dynamic_degree" else "higher",
    )
