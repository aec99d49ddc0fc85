"""A recipe small enough to train in a test, on the synthetic videos."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyflow.methods import OnPolicyConfig
from anyflow.training.config import (
    ArchitectureConfig,
    DataConfig,
    EMAConfig,
    NetworkConfig,
    OnPolicyStageConfig,
    OptimizerConfig,
    Recipe,
)

ARCHITECTURE = ArchitectureConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=8,
    out_channels=8,
    text_dim=32,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=8,
)


def _small_recipe(out: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "stage": "pretrain",
        "out": str(out),
        "student": NetworkConfig(architecture=ARCHITECTURE),
        "data": DataConfig(kind="synthetic", batch_size=4, num_workers=0),
        "steps": 4,
        "optimizer": OptimizerConfig(lr=1e-3),
        "ema": EMAConfig(decay=0.9, start_step=2),
        "precision": "fp32",
        "device": "cpu",
        "log_every": 1,
    }
    if changes.get("stage") == "on_policy":
        settings["on_policy"] = OnPolicyStageConfig(
            teacher=NetworkConfig(architecture=ARCHITECTURE, seed=1),
            method=OnPolicyConfig(cotrain_pretrain=True, num_steps=(2, 4)),
            critic_optimizer=OptimizerConfig(lr=1e-3, betas=(0.0, 0.999)),
        )
    return Recipe(**settings | changes)


@pytest.fixture(scope="session")
def small_recipe() -> Callable[..., Recipe]:
    """``small_recipe(out, **changes)``."""
    return _small_recipe
