"""Real parts of a Wan model, tiny, and real video files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ["a", "red", "blue", "disc", "cross", "moves", "slowly", "to", "the", "right", "&", "bad", "quality"]

WriteVideo = Callable[..., Path]


@pytest.fixture(scope="session")
def wan_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with ``vae``, ``text_encoder`` and ``tokenizer``."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    vae.save_pretrained(folder / "vae")
    config = UMT5Config(vocab_size=3 + len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def write_video() -> WriteVideo:
    """``write_video(path, grays, fps=16, size=(64, 64))``: one plain frame per gray level; or per array given."""

    def write(path: Path, frames: Sequence[int | np.ndarray], fps: int = 16, size: tuple[int, int] = (64, 64)) -> Path:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "1", "threads": "1"})
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for frame in frames:
                image = np.full((*size, 3), frame, np.uint8) if isinstance(frame, int) else frame
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return write
