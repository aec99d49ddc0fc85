"""Find what a run resumes from: the recipe in its folder, and its newest checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from anyflow.data import VideoDataset
from anyflow.training.config import Recipe
from anyflow.training.distributed import Mesh
from anyflow.training.manifest import Manifest
from anyflow.training.recipe import load_recipe
from anyflow.utils.documents import is_no_folder

RECIPE_FILE = "recipe.yaml"

# What may differ when a run resumes: where and how it runs, what it reports, when it ends.
_FREE = (
    *("out", "steps", "parallel", "device", "num_threads", "activation_checkpointing", "compile"),
    *("checkpoint", "preview", "metrics", "validation", "log_every", "loggers", "project"),
    *("data.num_workers", "data.batch_size", "gradient_accumulation"),
)
# What the guard's advice changes; a run records it.
ADVISED = (
    *("optimizer.lr", "optimizer.warmup_steps", "precision"),
    *("on_policy.critic_optimizer.lr", "on_policy.critic_optimizer.warmup_steps"),
)


@dataclass(frozen=True)
class Position:
    """Say where a run begins.

    Args:
        step: updates done.
        consumed: samples that all ranks together have used for them.
        changed: settings whose values differ from the checkpoint's: before, and now.
        history: such changes of the whole run with their steps, these last.
        window: scalars since the last line of metrics, from
            :meth:`anyflow.training.window.Window.state`.
    """

    step: int = 0
    consumed: int = 0
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    window: Mapping[str, Any] | None = None


def check_folder(recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return the settings with which a run in the folder resumes in place of others.

    Each has its value before and its value now.

    Raises:
        ValueError: the folder is not new, and its run differs in more than what may differ.
    """
    out = Path(recipe.out)
    if is_no_folder(out):
        raise ValueError(f"out: {out} is not a folder")
    file = out / RECIPE_FILE
    if not file.is_file():
        if (out / "checkpoints").exists():
            raise ValueError(
                f"out: {out} has checkpoints but no {RECIPE_FILE}; name another folder"
            )
        return {}
    before, now = flat_settings(load_recipe(file)), flat_settings(recipe)
    changed = {
        name: (before.get(name), now.get(name))
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    }
    if refused := [
        f"{name} ({a!r} there, {b!r} here)"
        for name, (a, b) in changed.items()
        if name not in ADVISED
    ]:
        raise ValueError(
            f"out: {out} holds a run of another recipe; it differs in {', '.join(refused)}"
        )
    return changed


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that make a run what it is, by dotted name.

    ``validation.num_samples``, the samples that validation holds back, is one of them: the other
    samples are trained on.
    """
    return {
        **flatten(dataclasses.asdict(recipe), _FREE),
        "validation.num_samples": recipe.num_held_out,
    }


def flatten(values: Mapping[str, Any], left_out: Sequence[str] = ()) -> dict[str, Any]:
    """Return the values of nested mappings by dotted name, without the names ``left_out``."""

    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if name in left_out:
            return
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from walk(inner, f"{name}.{key}" if name else key)
        else:
            yield name, value

    return dict(walk(values, ""))


def advised_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe that may differ when a run resumes, by the guard's advice."""
    return {name: value for name, value in flat_settings(recipe).items() if name in ADVISED}


def position(checkpoint: Path, recipe: Recipe, dataset: VideoDataset, resume: bool) -> Position:
    """Read the position of a run from its checkpoint.

    Raises:
        ValueError: ``resume`` is False, or the run has other data or has done more steps than the
            recipe's.
    """
    info = Manifest.read(checkpoint).info
    if not resume:
        raise ValueError(
            f"out: {recipe.out} has the checkpoint {checkpoint.name}; resume with --resume or name "
            "another folder"
        )
    if info["fingerprint"] != dataset.fingerprint:
        raise ValueError(
            f"data: these are not the videos that the run in {recipe.out} has been trained on"
        )
    if info["step"] > recipe.steps:
        raise ValueError(
            f"steps={recipe.steps}, but the run in {recipe.out} has done {info['step']}"
        )
    now = advised_settings(recipe)
    saved = info.get("settings", now)  # checkpoints of earlier versions have none
    changed = {
        name: (saved[name], value) for name, value in now.items() if saved.get(name, value) != value
    }
    history = (
        *info.get("changes", ()),
        *([{"step": info["step"], "settings": changed}] if changed else ()),
    )
    return Position(info["step"], info["consumed"], changed, history, info.get("window"))


def note_global_batch(recipe: Recipe, mesh: Mesh, at: Position, console: Console) -> None:
    """Report that a run resumes with another global batch, if it does."""
    now = recipe.data.batch_size * mesh.data_world * recipe.gradient_accumulation
    if at.consumed != at.step * now:
        before = at.consumed / at.step
        console.print(f"A step takes {now} samples from here; it took {before:g} on average before")
