"""Start runs from the command line, and read what they leave in their folders."""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.data import open_dataset
from anyflow.training.checkpoint import Checkpointer
from anyflow.training.config import Recipe
from anyflow.training.distributed import Mesh
from anyflow.training.recipe import dump_recipe
from anyflow.training.trainer import _build_updates

TIMING = (
    "seconds",
    "metrics/seconds",
    "samples_per_second",
    "tokens_per_second",
    "tflops_per_second",
    "peak_memory_gb",
)


def write_recipe(recipe: Recipe, file: Path) -> Path:
    file.write_text(dump_recipe(recipe))
    return file


def train_command(file: Path) -> list[str]:
    """Return the command that trains in a process of its own."""
    return [sys.executable, "-m", "anyflow", "train", str(file)]


def invoke_train(file: Path, *arguments: str) -> tuple[int, str]:
    """Run the command in this process; return its exit status and everything printed."""
    result = CliRunner().invoke(app, ["train", str(file), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def metrics(out: Path) -> list[dict[str, float]]:
    """Read the lines of the metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def reported(out: Path) -> int:
    """Count the lines of the metrics."""
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def checkpoint(recipe: Recipe, step: int) -> dict[str, Tensor]:
    """Load everything in a checkpoint of a run."""
    tensors = _build_updates(recipe, Mesh(torch.device("cpu")), open_dataset(recipe.data)).tensors()
    path = Path(recipe.out) / "checkpoints" / f"step-{step:08d}"
    Checkpointer(path.parent, keep=1).load(path, tensors)
    return tensors
