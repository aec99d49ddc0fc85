"""Test what the causal pipeline refuses before a network runs, and which models it takes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from anyflow.formats import load_transformer
from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.pipelines import AnyFlowFARPipeline, AnyFlowPipeline, CausalVideoRequest

PROMPT, OTHER = "a red disc moves slowly", "a blue cross stops"
CALL: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "num_frames": 21,
    "chunk_partition": (1, 2, 2, 1),
    "num_inference_steps": 2,
    "max_sequence_length": 12,
    "output_type": "latent",
    "seed": 1,
}


def video(pipe: AnyFlowFARPipeline, prompt: Any = PROMPT, **call: Any) -> Tensor:
    frames: Tensor = pipe(prompt, **{**CALL, **call}).frames
    return frames


@pytest.fixture
def silent_pipe(causal_pipe: AnyFlowFARPipeline) -> Iterator[AnyFlowFARPipeline]:
    """Fail if a network of the pipeline runs."""

    def fail(module: Any, *_: Any) -> None:
        raise AssertionError(f"{type(module).__name__} runs")

    vae = causal_pipe.vae
    parts = (causal_pipe.transformer, causal_pipe.text_encoder, vae.encoder, vae.decoder)
    hooks = [part.register_forward_pre_hook(fail) for part in parts]
    yield causal_pipe
    for hook in hooks:
        hook.remove()


LATENTS = torch.ones(1, 5, 16, 4, 4)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "partition": (
        {"chunk_partition": (1, 2, 2)},
        r"chunk_partition \(1, 2, 2\) has 5 latent frames, and num_frames=21 makes 6: give a "
        "chunk_partition whose sum is 6, or num_frames=17",
    ),
    "own partition": (
        {"chunk_partition": None},
        r"the model's chunk_partition \(2, 2, 2, 2\) .* num_frames=21 makes 6.* num_frames=29",
    ),
    "empty chunk": ({"chunk_partition": (1, 0, 5)}, "chunk 1 must be a whole number from 1"),
    "no partition": ({"chunk_partition": "1,5"}, "chunk_partition must be the latent frames"),
    "height": ({"height": 40}, "height must be a multiple of 16, got 40"),
    "height, compressed": (
        {"height": 48},
        "height must be a multiple of 32 where frames are compressed, which 4 chunks need .up to 2 "
        "do not., got 48; the nearest are 32 and 64",
    ),
    "width, compressed": ({"width": 16}, "width must be a multiple of 32 .* the nearest are 32"),
    "frames in a chunk": (
        {"video": torch.ones(1, 5, 3, 32, 32)},
        "end with a chunk before the last one: got 5 frames, and .* allows 1, 9, 17",
    ),
    "all frames": ({"video": torch.ones(1, 21, 3, 32, 32)}, "21 first frames are given"),
    "image": (
        {"image": torch.ones(3, 32, 32), "chunk_partition": (2, 2, 2)},
        "got 1 frames, and .* allows 5, 13",
    ),
    "image, one chunk": (
        {"image": torch.ones(3, 32, 32), "chunk_partition": (6,)},
        "allows none, as it is one chunk",
    ),
    "latents in a chunk": ({"video_latents": LATENTS[:, :2]}, "got 2 latent .* allows 1, 3, 5"),
    "latents of a batch": (
        {"video_latents": LATENTS.repeat(3, 1, 1, 1, 1)},
        r"video_latents must be \[B=1 or 1",
    ),
    "video of a batch": (
        {"video": torch.ones(2, 1, 3, 32, 32)},
        "video must be one or as many as the 1 prompts, got 2",
    ),
    "both": ({"video_latents": LATENTS[:, :1], "image": torch.ones(3, 32, 32)}, "not both"),
    "steps": (
        {"num_inference_steps": [2, 1]},
        r"one number, or one for each of the 4 chunks \(1, 2, 2, 1\), got \[2, 1\]",
    ),
    "step": ({"num_inference_steps": [2, 1, 0, 1]}, "num_inference_steps: chunk 2 must be"),
    "window": ({"cache_window": 0}, "cache_window must be a whole number >= 1"),
    "window without cache": (
        {"cache_window": 2, "use_kv_cache": False},
        "cache_window is of the cache, and use_cache is False",
    ),
    "device without cache": ({"cache_device": "cpu", "use_cache": False}, "cache_device is of the"),
    "meta device": ({"cache_device": "meta"}, "cache_device 'meta'"),
    "device": ({"cache_device": "abacus"}, "cache_device 'abacus' cannot be used here"),
    "cache": ({"use_cache": 1}, "use_cache must be True or False, got 1"),
    "switch of a given chunk": (
        {"video_latents": LATENTS[:, :3], "prompt_switches": {1: OTHER}},
        "a key of prompt_switches must be a whole number from 2 to 3, got 1: the chunks that are",
    ),
    "switch after the end": ({"prompt_switches": {4: OTHER}}, "from 0 to 3, got 4"),
    "switches": ({"prompt_switches": [OTHER]}, "must be texts or embeddings by the numbers of"),
    "switch to nothing": ({"prompt_switches": {1: None}}, r"prompt_switches\[1\] must be a text"),
    "switch of a batch": ({"prompt_switches": {1: [OTHER, OTHER]}}, "the 1 prompts, got 2"),
    "switch of a width": (
        {"prompt_switches": {1: torch.ones(1, 12, 8)}},
        r"prompt_switches\[1\] must be a floating-point tensor \[B, S, 16\]",
    ),
    "switch of a length": (
        {"prompt_switches": {1: torch.ones(1, 9, 16)}},
        r"prompts are 12 tokens long, but prompt_switches\[1\] 9",
    ),
    "timesteps": ({"timesteps": [500, 600]}, "descending"),
    "output": ({"output_type": "gif"}, "output_type must be one of"),
    "callbacks": (
        {"callback": print, "callback_on_step_end": print},
        "either callback or callback_on_step_end",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_a_network_runs(
    wrong: dict[str, Any], message: str, silent_pipe: AnyFlowFARPipeline
) -> None:
    with pytest.raises(ValueError, match=message):
        video(silent_pipe, **wrong)
    streamed = {**CALL, **wrong}
    with pytest.raises(ValueError, match=message):
        silent_pipe.stream(PROMPT, **streamed)


def test_sizes_of_16_pixels_are_made_where_nothing_is_compressed(
    causal_pipe: AnyFlowFARPipeline,
) -> None:
    assert video(causal_pipe, height=16, width=48, chunk_partition=(3, 3)).shape[3:] == (2, 6)


def test_a_request_is_checked_without_a_model(causal_model: Path) -> None:
    from anyflow.pipelines.loading import ModelPaths

    layout = ModelPaths.find(causal_model).layout()
    assert layout.causal is not None and layout.causal.full_chunk_limit == 2
    request = CausalVideoRequest(64, 64, 29, context_frames=5, negatives=1)
    request.check(layout)
    assert request.first_chunk(layout) == 1
    with pytest.raises(ValueError, match="got 9 frames, and .* allows 5, 13, 21"):
        CausalVideoRequest(64, 64, 29, context_frames=9, negatives=1).check(layout)


# Kinds of models ---------------------------------------------------------------------------------


def without_weights(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_models_of_the_other_kind_are_refused_before_weights_are_loaded(
    model: Path, causal_model: Path, tmp_path: Path
) -> None:
    causal = without_weights(causal_model, tmp_path / "causal")
    with pytest.raises(ValueError, match="is a causal model.*use anyflow.pipelines.AnyFlowFARPipe"):
        AnyFlowPipeline.from_pretrained(causal, device="cpu")
    bidirectional = without_weights(model, tmp_path / "bidirectional")
    with pytest.raises(ValueError, match="is a bidirectional model.*use anyflow.*AnyFlowPipeline"):
        AnyFlowFARPipeline.from_pretrained(bidirectional, device="cpu")
    with pytest.raises(ValueError, match="cuda_graph=True is not available for a causal model"):
        AnyFlowFARPipeline.from_pretrained(causal, device="cpu", cuda_graph=True)


def test_modules_of_the_other_kind_are_refused(
    model: Path, causal_pipe: AnyFlowFARPipeline
) -> None:
    other = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")
    parts = causal_pipe.components
    with pytest.raises(ValueError, match="is a causal model"):
        AnyFlowPipeline(**parts)
    with pytest.raises(ValueError, match="is a bidirectional model"):
        AnyFlowFARPipeline(**{**parts, "transformer": other.transformer})
    with pytest.raises(ValueError, match="is a causal model"):
        other.transformer = causal_pipe.transformer
    with pytest.raises(ValueError, match="is a bidirectional model"):
        causal_pipe.transformer = other.transformer
    with pytest.raises(ValueError, match="cuda_graph=True is not available"):
        AnyFlowFARPipeline(**parts, cuda_graph=True)


def test_the_bidirectional_part_of_a_causal_folder_samples(causal_model: Path) -> None:
    part = load_transformer(causal_model / "transformer", bidirectional=True)
    pipe = AnyFlowPipeline.from_pretrained(
        causal_model, transformer=part.float(), dtype=torch.float32, device="cpu"
    )
    call = {k: v for k, v in CALL.items() if k != "chunk_partition"}
    assert pipe(PROMPT, **call, progress=False).frames.shape == (1, 16, 6, 4, 4)


def test_transformers_of_diffusers_and_of_other_folders_take_the_place_of_the_own(
    model: Path, causal_model: Path, causal_pipe: AnyFlowFARPipeline
) -> None:
    theirs = diffusers.AnyFlowFARTransformer3DModel.from_pretrained(
        causal_model, subfolder="transformer"
    )
    for given in (theirs, causal_model):
        pipe = AnyFlowFARPipeline.from_pretrained(
            model, transformer=given, dtype=torch.float32, device="cpu"
        )
        assert isinstance(pipe.transformer, AnyFlowFARTransformer3DModel)
        pipe.set_progress_bar_config(disable=True)
        embeds = {"prompt": None, "prompt_embeds": torch.ones(1, 12, 16)}
        assert video(pipe, **embeds).equal(video(causal_pipe, **embeds))


def test_the_layout_that_nvidia_publishes_is_a_causal_model(
    causal_model: Path, causal_pipe: AnyFlowFARPipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "published"
    shutil.copytree(causal_model, folder)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text()) | {
        "_class_name": "FAR_Wan_Transformer3DModel",
        "init_far_model": True,
        "init_flowmap_model": True,
    }
    for name in ("r_embedder", "r_embedder_fusion"):
        config.pop(name, None)
    file.write_text(json.dumps(config))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("AnyFlowFARPipeline", "FARWanAnyFlowPipeline"))
    pipe = AnyFlowFARPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert video(pipe).equal(video(causal_pipe))
    config.pop("init_far_model")
    file.write_text(json.dumps(config))
    pipe = AnyFlowFARPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")
    assert pipe.layout.causal is not None
