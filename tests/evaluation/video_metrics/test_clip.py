"""Compare CLIP similarity with transformers' logits, on a tiny model with a real tokenizer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from anyflow.evaluation.video_metrics import Clip
from anyflow.evaluation.video_metrics.models import CLIP

TEXTS = ["a red cat runs", "the blue dog sleeps under a tree", "a cat"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a CLIP model with random weights, saved by transformers: 16 x 16 pixels, 8 tokens."""
    path = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(pair) for pair in merges),
    ]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges)
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    layers = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tokens = {
        "vocab_size": len(vocab),
        "max_position_embeddings": 8,
        "bos_token_id": start,
        "eos_token_id": end,
    }
    config = CLIPConfig(
        text_config={**layers, **tokens, "pad_token_id": end},
        vision_config={**layers, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():  # the usual start gives all inputs nearly one output
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(path)
    return path


def _videos(n: int = 3, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 4, channels, 20, 28), dtype=torch.uint8, generator=generator)


def _by_transformers(folder: Path, videos: Tensor, texts: list[str]) -> list[float]:
    """Average ``logits_per_image / exp(logit_scale)`` over frames, one frame and text at a time."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor, tokenizer = (
        CLIPImageProcessorPil.from_pretrained(folder),
        CLIPTokenizer.from_pretrained(folder),
    )
    found = []
    for video, text in zip(videos, texts, strict=True):
        tokens = tokenizer([text], truncation=True, max_length=8, return_tensors="pt")
        images = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in video]
        with torch.no_grad():
            logits = [
                model(**tokens, **processor(images=image, return_tensors="pt")).logits_per_image
                for image in images
            ]
            found.append((torch.cat(logits) / model.logit_scale.exp()).mean().item())
    return found


@pytest.mark.parametrize("batch_size", [5, 32])
def test_the_similarity_is_that_of_transformers(folder: Path, batch_size: int) -> None:
    expected = _by_transformers(folder, _videos(), TEXTS)
    assert max(expected) - min(expected) > 0.05  # the model tells these videos and texts apart
    found = Clip(folder)(_videos(), TEXTS, batch_size=batch_size)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=1e-5)


def test_order_dtype_and_gray_videos(folder: Path) -> None:
    clip, videos = Clip(folder), _videos()
    expected = clip(videos, TEXTS)
    torch.testing.assert_close(clip(videos.flip(0), TEXTS[::-1]), expected.flip(0))
    torch.testing.assert_close(clip(videos.double() / 255, TEXTS), expected)
    # each video is compared with its own text
    assert (clip(videos, TEXTS[::-1]) - expected).abs().max() > 0.01
    gray = _videos(channels=1)
    torch.testing.assert_close(clip(gray, TEXTS), clip(gray.repeat(1, 1, 3, 1, 1), TEXTS))
    torch.testing.assert_close(
        Clip(folder, dtype=torch.bfloat16)(videos, TEXTS), expected, rtol=0, atol=0.03
    )
    assert clip(videos[:1], ["a cat runs under the tree and " * 9]).item() == pytest.approx(
        clip(videos[:1], ["a cat runs under the tree and a dog"]).item(), abs=1e-6
    )  # both are cut at eight tokens


def test_what_cannot_be_compared_is_refused(folder: Path) -> None:
    clip = Clip(folder)
    with pytest.raises(ValueError, match="texts must be as many as videos, 3, got 2"):
        clip(_videos(), TEXTS[:2])
    with pytest.raises(ValueError, match="texts must be a list of texts, got 'a cat'"):
        clip(_videos(), "a cat")
    with pytest.raises(ValueError, match="batch_size must be a positive number, got 0"):
        clip(_videos(), TEXTS, batch_size=0)
    with pytest.raises(ValueError, match=r"videos must be a non-empty \[N, F, C, H, W\]"):
        clip(_videos()[0], TEXTS)


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"]
)
def test_a_file_that_is_missing_or_damaged_is_named(
    folder: Path, tmp_path: Path, name: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=rf"the CLIP model in {copy} cannot be loaded: "):
        Clip(copy)
    (copy / name).unlink()
    with pytest.raises(
        ValueError, match=rf"CLIP needs {name}.* in the folder {copy}, from {CLIP.source}"
    ):
        Clip(copy)


def test_weights_that_are_missing_are_named_and_never_random(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights visual_projection"):
        Clip(copy)
    config = json.loads((copy / "config.json").read_text())
    config["projection_dim"] = 11
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the CLIP model in"):
        Clip(copy)
    with pytest.raises(
        ValueError, match=rf"CLIP needs the folder {tmp_path}/none with the files of https"
    ):
        Clip(tmp_path / "none")
