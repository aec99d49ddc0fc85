"""A run that is killed again and again."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anyflow.training.config import CheckpointConfig, Recipe
from anyflow.training.recipe import dump_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "scripts" / "killed_runs.py"
INTERVAL, KILLS = 3, 20


def _run(recipe: Recipe, kills: int) -> list[dict]:
    file = Path(recipe.out).with_suffix(".yaml")
    file.write_text(dump_recipe(recipe))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(file), str(kills)],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_at_most_an_interval_each(
    small_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Every resume starts from a complete checkpoint, and the end is that of a run that nothing has
    happened to.
    """
    recipes = [
        small_recipe(
            tmp_path / name, steps=240, checkpoint=CheckpointConfig(every=INTERVAL, keep=2)
        )
        for name in ("straight", "killed")
    ]
    _run(recipes[0], 0)
    kills = _run(recipes[1], KILLS)
    newest = [max(kill["steps"], default=0) for kill in kills]
    assert [kill["status"] for kill in kills] == [9] * KILLS
    assert newest == sorted(newest) and newest[-1] > newest[0]
    assert any(kill["writing"] for kill in kills)
    for kill, step in zip(kills, newest, strict=True):
        assert step % INTERVAL == 0 and kill["reached"] - step <= INTERVAL

    straight, killed = (
        load_file(Path(r.out) / "model/transformer/diffusion_pytorch_model.safetensors")
        for r in recipes
    )
    assert straight.keys() == killed.keys()
    for name, tensor in straight.items():
        torch.testing.assert_close(killed[name], tensor, rtol=0, atol=0)
