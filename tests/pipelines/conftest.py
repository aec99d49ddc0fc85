"""A tiny model of real parts, written by diffusers' own pipeline."""

from pathlib import Path

import diffusers
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ["a", "red", "blue", "disc", "cross", "moves", "slowly", "stops", "bad", "quality"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with everything: 16 latent channels, text dimension 16, shift 5."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    encoder = UMT5Config(
        vocab_size=3 + len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    pipe = diffusers.AnyFlowPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(encoder),
        vae=diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        transformer=diffusers.AnyFlowTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    )
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder
