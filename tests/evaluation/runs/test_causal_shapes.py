"""Test that a causal model of moving shapes is evaluated chunk by chunk."""

from pathlib import Path

import numpy as np
import torch

from anyflow.data import MovingShapes, SyntheticVideos
from anyflow.data.space_time import pixel_shuffle_3d
from anyflow.evaluation.runs.models import find_shapes_model
from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.sampling import sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler


def test_its_videos_are_those_of_the_causal_sampler(tmp_path: Path) -> None:
    model = AnyFlowFARTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=8,
        out_channels=8,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
        compressed_patch_size=(1, 6, 6),
        full_chunk_limit=2,
        chunk_partition=(1, 1, 2),
    )
    scheduler = FlowMapEulerDiscreteScheduler(100, shift=3.0)
    model.save_pretrained(tmp_path / "transformer")
    scheduler.save_pretrained(tmp_path / "scheduler")
    shapes = find_shapes_model(str(tmp_path))
    assert shapes is not None
    prompt = VideoPrompt("cross right")
    steps: list[int] = []
    frames = shapes.load([prompt]).frames(prompt, 2, 7, lambda index, *_: steps.append(index))

    data = SyntheticVideos()
    noise = torch.randn(1, *data.latent_shape, generator=torch.Generator().manual_seed(7))
    text = data[2 * len(data) // 4].prompt_embeds[None]
    latents = sample_causal(model, scheduler, noise, text, num_inference_steps=2)
    expected = MovingShapes().to_uint8(pixel_shuffle_3d(latents))[0].numpy()
    assert steps == list(range(6))  # two of each of three chunks
    np.testing.assert_array_equal(frames[:, 4::8, 4::8, 0], expected)
