"""Run what the guide shows first: both stages by smoke recipes on two processes, and sampling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow import AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler, sample
from anyflow.data import SyntheticVideos


@pytest.mark.slow
def test_both_stages_train_on_two_processes_and_the_model_samples_at_any_number_of_steps(
    torchrun: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    monkeypatch.chdir(tmp_path)  # the recipes name their folders relative to where the command runs
    for recipe in ("smoke_pretrain", "smoke_onpolicy"):
        run = torchrun(2, "-m", "anyflow", "train", recipe)
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output[-4000:]
    data, folder = SyntheticVideos(), Path("runs/smoke_onpolicy/model")
    model = AnyFlowTransformer3DModel.from_pretrained(folder / "transformer")
    scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    noise = torch.randn(2, *data.latent_shape, generator=generator)
    prompts = torch.stack([data[i].prompt_embeds for i in (0, 300)])
    real = torch.stack([data[i].latents for i in (0, 300)])
    for steps in (1, 2, 4, 8):
        latents = sample(model, scheduler, noise, prompts, num_inference_steps=steps)
        assert latents.isfinite().all() and 0.4 < float(latents.std()) < 1.4  # the data's is 1
        if steps == 1:  # sixty steps teach it the mean, which is nearer to any video than noise is
            assert (latents - real).square().mean() < 0.85 * (noise - real).square().mean()
