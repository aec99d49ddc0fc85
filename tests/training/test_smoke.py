"""Run both stages by smoke recipes on two processes, as the guide shows, and sample."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow import AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler, sample
from anyflow.data import SyntheticVideos
from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.sampling import sample_causal


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "far_"], ids=["bidirectional", "causal"])
def test_both_stages_train_on_two_processes_and_the_model_samples_at_any_number_of_steps(
    kind: str,
    torchrun: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    monkeypatch.chdir(tmp_path)  # the recipes name their folders relative to where the command runs
    for recipe in (f"smoke_{kind}pretrain", f"smoke_{kind}onpolicy"):
        run = torchrun(2, "-m", "anyflow", "train", recipe)
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output[-4000:]
    data, folder = SyntheticVideos(), Path(f"runs/smoke_{kind}onpolicy/model")
    library = AnyFlowFARTransformer3DModel if kind else AnyFlowTransformer3DModel
    model = library.from_pretrained(folder / "transformer")
    scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    noise = torch.randn(2, *data.latent_shape, generator=generator)
    prompts = torch.stack([data[i].prompt_embeds for i in (0, 300)])
    real = torch.stack([data[i].latents for i in (0, 300)])
    for steps in (1, 2, 4, 8):
        sample_videos: Callable[..., torch.Tensor] = sample_causal if kind else sample
        latents = sample_videos(model, scheduler, noise, prompts, num_inference_steps=steps)
        assert latents.isfinite().all() and 0.4 < float(latents.std()) < 1.4  # the data's is 1
        if steps == 1 and not kind:
            # sixty steps teach it the mean, which is nearer to any video than noise is
            assert (latents - real).square().mean() < 0.85 * (noise - real).square().mean()
    lines = Path(f"runs/smoke_{kind}pretrain/metrics.jsonl").read_text().splitlines()
    losses = [value["loss"] for value in map(json.loads, lines) if "loss" in value]
    assert sum(losses[-4:]) / 4 < 0.75 * losses[0]
