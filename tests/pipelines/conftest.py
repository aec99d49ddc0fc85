"""Make a tiny model of real parts, written by diffusers' own pipeline."""

import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from anyflow.pipelines import AnyFlowFARPipeline, AnyFlowPipeline
from anyflow.pipelines.sample_settings import SampleSettings

sys.path.append(str(Path(__file__).parent / "scripts"))  # helpers of several files of tests
from tiny_calls import LATENT_SHAPE

WORDS = ["a", "red", "blue", "disc", "cross", "moves", "slowly", "stops", "bad", "quality"]


SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _parts() -> dict[str, Any]:
    """Make everything but a transformer."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    encoder = UMT5Config(
        vocab_size=3 + len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return {
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        "text_encoder": UMT5EncoderModel(encoder),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        "scheduler": diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    }


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a whole diffusers folder: 16 latent channels, text dimension 16, shift 5."""
    torch.manual_seed(0)
    pipe = diffusers.AnyFlowPipeline(
        **_parts(), transformer=diffusers.AnyFlowTransformer3DModel(**SIZES)
    )
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a whole folder of diffusers' causal pipeline: chunks of 2 latent frames, 2 full ones.

    The weights of its attention are larger than at the start of a training, so that what a chunk
    attends to matters.
    """
    torch.manual_seed(0)
    transformer = diffusers.AnyFlowFARTransformer3DModel(
        **SIZES, full_chunk_limit=2, chunk_partition=(2, 2, 2, 2)
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".attn" in name and parameter.ndim > 1:
                parameter.mul_(3.0)
    folder = tmp_path_factory.mktemp("causal")
    diffusers.AnyFlowFARPipeline(**_parts(), transformer=transformer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(model: Path) -> AnyFlowPipeline:
    return AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def peer(model: Path) -> diffusers.AnyFlowPipeline:
    pipe = diffusers.AnyFlowPipeline.from_pretrained(model)
    pipe.transformer = diffusers.AnyFlowTransformer3DModel.from_pretrained(
        model, subfolder="transformer"
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def noise(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(LATENT_SHAPE, generator=generator)


@pytest.fixture
def settings(model: Path) -> SampleSettings:
    return SampleSettings(str(model), height=32, width=48, num_frames=9, fps=8, dtype="float32")


@pytest.fixture(scope="module")
def causal_pipe(causal_model: Path) -> AnyFlowFARPipeline:
    pipe = AnyFlowFARPipeline.from_pretrained(causal_model, dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def causal_peer(causal_model: Path) -> diffusers.AnyFlowFARPipeline:
    pipe = diffusers.AnyFlowFARPipeline.from_pretrained(causal_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe
