"""Run the loop from a recipe to a trained model, through any number of interruptions."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from anyflow.data import TrainingData, VideoDataset, open_dataset
from anyflow.models.network import is_causal
from anyflow.training.checkpoint import Checkpointer
from anyflow.training.config import Recipe
from anyflow.training.decoding import Decoder
from anyflow.training.distributed import (
    Mesh,
    full_state,
    main_result,
    setup,
    shard_network,
    teardown,
)
from anyflow.training.export import write_model
from anyflow.training.fit import check_chunks, check_data
from anyflow.training.flops import token_count
from anyflow.training.guard import TrainingError, check_state
from anyflow.training.held_out import Split, split_data, validation_losses
from anyflow.training.networks import build_critic, build_student, build_teacher
from anyflow.training.preview import Previews
from anyflow.training.prompts import sampled_prompts
from anyflow.training.recipe import dump_recipe
from anyflow.training.reports import Reports
from anyflow.training.resuming import (
    RECIPE_FILE,
    Position,
    advised_settings,
    check_folder,
    note_global_batch,
    position,
)
from anyflow.training.sample_metrics import SampleMetrics
from anyflow.training.trackers import check_loggers
from anyflow.training.updates import OnPolicyUpdates, PretrainUpdates, StageUpdates, build_scheduler
from anyflow.utils.locking import folder_lock
from anyflow.utils.threads import torch_threads
from anyflow.utils.writing import write_text


def train(recipe: Recipe, *, resume: bool = True, console: Console | None = None) -> None:
    """Run a recipe to its end in the folder ``recipe.out``, from the newest checkpoint there.

    The folder gets ``recipe.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``previews/`` and, at the
    end, the averaged student as ``model/transformer`` and ``model/scheduler``. On SIGTERM or SIGINT
    the update in progress is finished, a checkpoint is written and the function returns; a second
    signal is obeyed at once. A resumed run ends as if it had never stopped, bit for bit, given the
    same number of processes. Every process of torchrun calls this function.

    Args:
        recipe: the run. If the folder holds a run already, it must be the same but for ``out``,
            ``steps``, ``parallel``, ``checkpoint``, ``preview``, ``metrics``, ``validation`` (but
            not how many samples of the data it holds out), ``device``, ``num_threads``,
            ``log_every``, ``loggers``, ``project``, ``activation_checkpointing``, ``compile``,
            ``data.num_workers`` and, to keep the global batch on other hardware,
            ``data.batch_size`` and ``gradient_accumulation``; and for what a :class:`TrainingError`
            advises, which the checkpoints record: the learning rates and warm-ups, ``precision``.
        resume: False refuses a folder that has a checkpoint.
        console: where messages go; None for the terminal.

    Raises:
        ValueError: the recipe does not fit its files, the processes or the run in the folder, or
            another process trains there; nothing has been written.
        OSError: the system refuses to write, such as on a full disk. The newest checkpoint is from
            before.
        TrainingError: a loss, a gradient, a network's output or its state is not finite. The newest
            checkpoint is from before, and the message says which settings can be tried from there.
    """
    console = Console() if console is None else console
    mesh = setup(recipe.parallel, recipe.device)
    try:
        with _run_lock(mesh, Path(recipe.out)), torch_threads(recipe.num_threads):
            _train(recipe, mesh, resume, console if mesh.is_main else Console(quiet=True))
    finally:
        teardown(mesh)


@contextmanager
def _run_lock(mesh: Mesh, out: Path) -> Iterator[None]:
    """Hold the folder on rank 0; every rank raises where that one cannot."""
    with ExitStack() as stack:
        main_result(mesh, lambda: stack.enter_context(folder_lock(out)))
        yield


def _train(recipe: Recipe, mesh: Mesh, resume: bool, console: Console) -> None:
    out = Path(recipe.out)
    changes = check_folder(recipe)
    check_loggers(recipe.loggers)
    dataset = open_dataset(recipe.data)
    split = split_data(recipe, dataset)
    checkpointer = Checkpointer(out / "checkpoints", keep=recipe.checkpoint.keep)
    latest = checkpointer.latest()
    at = Position() if latest is None else position(latest, recipe, dataset, resume)
    if at.step == recipe.steps and (out / "model").is_dir():
        console.print(
            f"{out} holds this run, finished after {at.step} steps; its model is {out / 'model'}"
        )
        return

    samples = _build_samples(recipe, mesh, dataset, console)
    updates = _build_updates(recipe, mesh, dataset)
    changes = changes if latest is None else at.changed
    if changes:
        given = ", ".join(
            f"{name}={now} ({before} before)" for name, (before, now) in changes.items()
        )
        console.print(f"The run resumes with {given}", markup=False)
    if latest is not None:
        checkpointer.load(latest, updates.tensors())
        updates.resume_at(at.step)
        console.print(f"Resuming after step {at.step} of {latest}")
        note_global_batch(recipe, mesh, at, console)
    with _signals() as signals:  # before the data has workers, which would die of a Ctrl-C
        data = TrainingData(
            dataset,
            batch_size=recipe.data.batch_size,
            data_rank=mesh.data_rank,
            data_world=mesh.data_world,
            num_workers=recipe.data.num_workers,
            seed=recipe.data.seed,
            consumed=at.consumed,
            picked=split.picked,
        )
        if mesh.is_main:
            _start_folder(recipe, at.step)
        run = _Run(recipe, mesh, dataset, split, samples, updates, data, checkpointer, signals)
        try:
            finished = run.loop(at, console)
        except TrainingError as error:
            raise TrainingError(
                f"{error}. {run.advice(error)}", error.step, error.network
            ) from None
    if finished:
        run.finish(console)


@dataclass(frozen=True)
class _Samples:
    """Hold what is sampled during training; None where it is turned off."""

    previews: Previews | None
    metrics: SampleMetrics | None


def _build_samples(recipe: Recipe, mesh: Mesh, dataset: VideoDataset, console: Console) -> _Samples:
    """Load what previews and metrics need, before the networks are built.

    An error comes early, and memory is free.
    """
    shows, measures = recipe.preview.every > 0, recipe.metrics.every > 0
    if not (shows or measures):
        return _Samples(None, None)
    prompts = sampled_prompts(recipe, mesh, dataset)
    decoder = Decoder(recipe, mesh, dataset, everywhere=measures)
    return _Samples(
        Previews(recipe, mesh, dataset, prompts.preview, decoder) if shows else None,
        SampleMetrics(recipe, mesh, dataset, prompts.metrics, decoder, console)
        if measures
        else None,
    )


@dataclass(frozen=True)
class _Run:
    """Hold everything that the loop needs, and run it."""

    recipe: Recipe
    mesh: Mesh
    dataset: VideoDataset
    split: Split
    samples: _Samples
    updates: StageUpdates
    data: TrainingData
    checkpointer: Checkpointer
    signals: list[int]  # received so far

    def loop(self, at: Position, console: Console) -> bool:
        """Train up to the last step or a signal, ending with a checkpoint.

        Returns whether the last step is done.
        """
        tokens = token_count(self.updates.student, self.dataset.latent_shape)
        with Reports(self.recipe, self.mesh, tokens, at, console) as reports:
            if self.samples.metrics is not None:
                reports.add_charts(self.samples.metrics.curves())
            for index in range(at.step, self.recipe.steps):
                done = index + 1
                batches = [next(self.data) for _ in range(self.recipe.gradient_accumulation)]
                samples = sum(len(batch.latents) for batch in batches) * self.mesh.data_world
                reports.add(done, self.updates.update(batches, index), samples, self.updates.flops)
                with reports.paused():
                    if not self._between_updates(done, reports, at, console):
                        return False
        return True

    def _between_updates(self, done: int, reports: Reports, at: Position, console: Console) -> bool:
        """Report, save and preview where they are due; return whether the run continues."""
        recipe = self.recipe
        values = self._validate() if _due(done, recipe.validation.every, recipe.steps) else {}
        if _due(done, recipe.metrics.every, recipe.steps):
            assert self.samples.metrics is not None
            values |= self.samples.metrics.evaluate(self.updates, done, console)
        reports.report(done, values)
        stop = self._on_any_rank(bool(self.signals))
        if stop or _due(done, recipe.checkpoint.every, recipe.steps):
            self._save(done, at.history, reports.state())
        if stop and done < recipe.steps:
            console.print(f"Stopped after step {done}; the same command resumes there")
            return False
        if _due(done, recipe.preview.every, recipe.steps):
            assert self.samples.previews is not None
            reports.report_video(done, self.samples.previews.write(self.updates, done, console))
        return True

    def _validate(self) -> dict[str, float]:
        negative = self.dataset.negative_prompt_embeds
        return validation_losses(self.recipe, self.mesh, self.split, negative, self.updates)

    def finish(self, console: Console) -> None:
        """Write the averaged student as a model."""
        # a checkpoint may be older than its own check
        check_state(self.recipe.steps, self.updates.tensors())
        tensors = full_state(self.updates.ema.state_dict())
        if self.mesh.is_main:
            model = Path(self.recipe.out) / "model"
            write_model(build_student(self.recipe), tensors, build_scheduler(self.recipe), model)
            console.print(f"Finished {self.recipe.steps} steps; the model is {model}")
        if dist.is_initialized():
            dist.barrier()

    def advice(self, error: TrainingError) -> str:
        """Name settings to try, as arguments of the command, and say where it resumes.

        Collective.
        """
        tries = _settings_to_try(self.recipe, error)
        if not tries:  # in fp32 already
            key = "teacher" if self.recipe.on_policy is None else "on_policy.teacher"
            return (
                f"The teacher does not train: give other weights as {key}.path=... and a new "
                "folder out=..."
            )
        saved = self.checkpointer.steps()
        command = f"The same command with {' or '.join(tries)}"
        if not saved:
            return f"{command} starts anew"
        folder = self.checkpointer.folder / f"step-{saved[-1]:08d}"
        earlier = f"after step {saved[-2]}" if len(saved) > 1 else "at the start"
        return (
            f"{command} resumes after step {saved[-1]}; "
            f"if that fails at once, delete {folder}, and it resumes {earlier}"
        )

    def _save(self, done: int, history: Sequence[dict[str, Any]], window: dict[str, Any]) -> None:
        tensors = self.updates.tensors()
        check_state(done, tensors)
        info = {
            "step": done,
            "consumed": self.data.consumed,
            "fingerprint": self.dataset.fingerprint,
            "recipe": dump_recipe(self.recipe),
            "settings": advised_settings(self.recipe),
            "changes": list(history),
            "window": window,
        }
        self.checkpointer.save(done, tensors, info)

    def _on_any_rank(self, flag: bool) -> bool:
        """Tell whether a flag is set on any rank; a signal may reach one rank only."""
        if self.mesh.world_size == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.mesh.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)


def _due(done: int, every: int, last: int) -> bool:
    """Tell whether work done every ``every`` steps and after the last is due; 0 turns it off."""
    return every > 0 and (done % every == 0 or done == last)


def _settings_to_try(recipe: Recipe, error: TrainingError) -> list[str]:
    """Return settings that may keep a network finite; all of them are in ``ADVISED``."""
    tries = []
    if error.network != "teacher":
        config, name = recipe.optimizer, "optimizer"
        if error.network == "critic" and recipe.on_policy is not None:
            config, name = recipe.on_policy.critic_optimizer, "on_policy.critic_optimizer"
        tries = [
            f"{name}.lr={config.lr / 10:g}",
            f"{name}.warmup_steps={max(2 * config.warmup_steps, 2 * error.step, 100)}",
        ]
    return tries if recipe.precision == "fp32" else [*tries, "precision=fp32"]


def _build_updates(recipe: Recipe, mesh: Mesh, dataset: VideoDataset) -> StageUpdates:
    """Build, check and shard the networks, one after another, and what updates them."""
    student = build_student(recipe)
    check_data(student, dataset, "student")
    if is_causal(student):
        check_chunks(student, dataset, recipe)
    negative = dataset.negative_prompt_embeds
    if recipe.on_policy is None:
        shard_network(student, mesh, trains=True)
        target = None if recipe.teacher is None else build_teacher(recipe)
        if target is not None:
            check_data(target, dataset, "teacher")
            shard_network(target, mesh, trains=False)
        return PretrainUpdates(recipe, mesh, student, negative, target)
    teacher = build_teacher(recipe)
    critic = build_critic(recipe, teacher)
    for name, network in (("on_policy.teacher", teacher), ("on_policy.critic", critic)):
        check_data(network, dataset, name)
    for network, trains in ((student, True), (teacher, False), (critic, True)):
        shard_network(network, mesh, trains=trains)
    return OnPolicyUpdates(recipe, mesh, student, teacher, critic, negative)


def _start_folder(recipe: Recipe, done: int) -> None:
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RECIPE_FILE, dump_recipe(recipe))
    if (out / "model").is_dir():  # of a run that had ended here and is continued
        (out / "model").rename(out / f"model-step-{done:08d}")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT; after the first, the old handlers are back."""
    received: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, before in previous.items():
            signal.signal(number, before)

    previous = {
        number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield received
    finally:
        restore()
