"""Kill a run again and again."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import write_recipe
from safetensors.torch import load_file

from anyflow.training.config import CheckpointConfig, Recipe

SCRIPT = Path(__file__).parent / "scripts" / "killed_runs.py"
INTERVAL = 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps", "kills"),
    [
        ({}, 180, 20),
        ({"causal": True}, 60, 8),
        ({"causal": True, "stage": "on_policy"}, 60, 8),
    ],
    ids=["pretrain", "causal pretrain", "causal on-policy"],
)
def test_kills_at_random_moments_lose_at_most_an_interval_each(
    settings: dict[str, Any],
    steps: int,
    kills: int,
    small_recipe: Callable[..., Recipe],
    process_environment: Callable[[], dict[str, str]],
    tmp_path: Path,
) -> None:
    """Start every resume from a complete checkpoint, and end as a run without a kill."""
    recipes = [
        small_recipe(
            tmp_path / name,
            steps=steps,
            checkpoint=CheckpointConfig(every=INTERVAL, keep=2),
            **settings,
        )
        for name in ("straight", "killed")
    ]
    files = [write_recipe(r, Path(r.out).with_suffix(".yaml")) for r in recipes]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, files), str(kills)],
        capture_output=True,
        text=True,
        timeout=850,
        env={**process_environment(), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    newest = [max(kill["steps"], default=0) for kill in seen]
    assert [kill["status"] for kill in seen] == [9] * kills
    assert newest == sorted(newest) and newest[-1] > newest[0]
    assert kills < 20 or any(kill["writing"] for kill in seen)
    for kill, step in zip(seen, newest, strict=True):
        assert step % INTERVAL == 0 and kill["reached"] - step <= INTERVAL

    straight, killed = (
        load_file(Path(r.out) / "model/transformer/diffusion_pytorch_model.safetensors")
        for r in recipes
    )
    assert straight.keys() == killed.keys()
    for name, tensor in straight.items():
        torch.testing.assert_close(killed[name], tensor, rtol=0, atol=0)
