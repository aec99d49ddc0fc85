"""Test verify() on causal folders: our causal network against diffusers'."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anyflow.formats import CausalSettings
from anyflow.formats.verify import verify
from anyflow.formats.verify_causal import partition_for
from anyflow.models import AnyFlowFARTransformer3DModel

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 1,
    "rope_max_seq_len": 32,
    "full_chunk_limit": 2,
}
# chunks of 2, 2 and 2 latent frames, of 128 tokens each
SIZES: dict[str, int] = {"height": 128, "width": 128, "num_frames": 21, "num_inference_steps": 2}
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORWARDS = [
    f"{layout}, {times}"
    for layout in ("training", "plain", "bidirectional")
    for times in ("t 937, r 833", "t 500, r 500", "t 250, r 0")
]


def saved(network: nn.Module, folder: Path) -> Path:
    """Save the network with random norms and biases, too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(diffusers.AnyFlowFARTransformer3DModel(**TINY), tmp_path / "model")


def test_same_weights_pass(model) -> None:
    report = verify(model, **SIZES)
    assert report.passed and not report.notes, str(report)
    assert [c.name for c in report.comparisons] == [*FORWARDS, "latents, 2 steps a chunk"]
    assert all(0 < c.max < 5e-6 for c in report.comparisons)  # two implementations did run
    assert "in chunks of (2, 2, 2) latent frames" in report.title


def test_the_folder_of_a_pipeline_and_of_our_own_class_passes_in_bf16(tmp_path: Path) -> None:
    ours = AnyFlowFARTransformer3DModel(**TINY, chunk_partition=(1, 2, 1))
    saved(ours, tmp_path / "transformer")
    report = verify(tmp_path, dtype=torch.bfloat16, **SIZES | {"num_frames": 13, "width": 256})
    assert report.passed, str(report)
    assert "(1, 2, 1)" in report.title and len(report.comparisons) == 10


def test_sizes_at_which_the_peer_pads_have_a_note_in_place_of_a_sampling(model) -> None:
    report = verify(model, **SIZES | {"width": 96})
    assert report.passed and [c.name for c in report.comparisons] == FORWARDS
    assert "diffusers attends to padding unless the tokens of every chunk" in str(report)


def test_one_full_chunk_has_a_note_in_place_of_a_sampling(tmp_path: Path) -> None:
    folder = saved(
        diffusers.AnyFlowFARTransformer3DModel(**TINY | {"full_chunk_limit": 1}), tmp_path
    )
    report = verify(folder, **SIZES | {"num_frames": 9})
    assert report.passed and "diffusers has none with full_chunk_limit 1" in str(report)


def test_a_difference_of_compressed_chunks_fails_and_not_that_of_the_bidirectional_path(
    model,
) -> None:
    """Give the compressed patch embedding a NaN, which differs from anything."""
    weights = load_file(model / WEIGHTS)
    weights["far_patch_embedding.bias"][0] = float("nan")
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    report = verify(model, **SIZES, limits={"forward": 1.0, "sample": 1.0})
    passed = {c.name: c.passed for c in report.comparisons}
    assert not report.passed and all(passed[name] == ("bidir" in name) for name in FORWARDS)


def test_sizes_that_compressed_patches_do_not_cover_are_refused(model) -> None:
    with pytest.raises(ValueError, match="multiples of 32 and 32, since a chunk of"):
        verify(model, **SIZES | {"height": 144})
    assert verify(model, **SIZES | {"height": 48, "width": 48, "num_frames": 5}).passed


def test_chunks_are_those_of_the_config_or_one_more_than_are_full() -> None:
    settings = CausalSettings()
    assert partition_for(settings, 21).sizes == settings.chunk_partition
    assert partition_for(settings, 5).sizes == (2, 1, 1, 1)
    assert partition_for(settings, 2).sizes == (1, 1)
