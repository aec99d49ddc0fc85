"""Make recipes small enough to train in a test, on synthetic videos and on latents of files."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow.methods import CausalConfig, OnPolicyConfig, PretrainConfig
from anyflow.training.config import (
    ArchitectureConfig,
    CausalSettings,
    DataConfig,
    EMAConfig,
    NetworkConfig,
    OnPolicyStageConfig,
    OptimizerConfig,
    Recipe,
    WeightsConfig,
)
from anyflow.utils.versions import TEXT_PACKAGES, installed_versions

sys.path.append(str(Path(__file__).parent / "scripts"))  # helpers of several files of tests

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


# of the synthetic videos' four frames of 6 x 6 latents; a compressed frame is one token
CAUSAL = CausalSettings((1, 6, 6), full_chunk_limit=2, chunk_partition=(1, 1, 2))


def _small_recipe(out: Path, *, causal: bool = False, **changes: Any) -> Recipe:
    chunks = CausalConfig(bidirectional_prob=0.5) if causal else None
    settings: dict[str, Any] = {
        "stage": "pretrain",
        "out": str(out),
        "student": NetworkConfig(architecture=ARCHITECTURE, causal=CAUSAL if causal else None),
        "pretrain": PretrainConfig(prompt_dropout=0.1, causal=chunks),
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
            teacher=WeightsConfig(architecture=ARCHITECTURE, seed=1),
            method=OnPolicyConfig(cotrain_pretrain=True, num_steps=(2, 4), causal=chunks),
            critic_optimizer=OptimizerConfig(lr=1e-3, betas=(0.0, 0.999)),
        )
    return Recipe(**settings | changes)


@pytest.fixture(scope="session")
def small_recipe() -> Callable[..., Recipe]:
    """Return ``small_recipe(out, causal=False, **changes)``."""
    return _small_recipe


@pytest.fixture
def latents(tmp_path: Path, wan_model: Path, generator: torch.Generator) -> Path:
    """Write five videos of 2 x 4 x 6 latents with the text width of the tiny encoder."""
    from anyflow.data.latent_dataset import DatasetInfo, LatentWriter

    folder = tmp_path / "latents"
    info = DatasetInfo((2, 16, 4, 6), text_length=8, text_dim=16, source={"by": "a test"})
    packages = installed_versions(TEXT_PACKAGES)
    with LatentWriter(folder, info, torch.zeros(1, 16), packages=packages) as writer:
        for n in range(5):
            values, prompt = (torch.randn(s, generator=generator) for s in ((2, 16, 4, 6), (3, 16)))
            writer.add(
                f"{n}.mp4",
                f"a red disc moves to the right, for the {n}th time",
                values,
                prompt,
            )
        writer.finish()
    return folder


@pytest.fixture
def latents_recipe(latents: Path, tmp_path: Path, small_recipe: Callable[..., Recipe]) -> Recipe:
    """Return a recipe of one step on these latents."""
    small = small_recipe(tmp_path / "run", steps=1)
    sizes = dataclasses.replace(
        small.student.architecture, in_channels=16, out_channels=16, text_dim=16
    )
    data = DataConfig(path=str(latents), batch_size=2, num_workers=0)
    return dataclasses.replace(small, student=NetworkConfig(architecture=sizes), data=data)
