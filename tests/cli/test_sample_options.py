"""Test the options of `anyflow sample` for causal models, on folders without weights."""

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
from transformers import UMT5Config
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.pipelines.video import write_video

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the configuration of a causal model with chunks of 1, 2 and 1 latent frames."""
    folder = tmp_path_factory.mktemp("causal")
    diffusers.AnyFlowFARTransformer3DModel(
        **SIZES, chunk_partition=(1, 2, 1), full_chunk_limit=2
    ).save_config(folder / "transformer")
    diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1
    ).save_config(folder / "vae")
    UMT5Config(
        vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    ).save_pretrained(folder / "text_encoder")
    diffusers.FlowMapEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def bidirectional(causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bidirectional") / "model"
    shutil.copytree(causal, folder)
    diffusers.AnyFlowTransformer3DModel(**SIZES).save_config(folder / "transformer")
    return folder


def refused(model: Path, out: Path, *options: str) -> str:
    """Return the one line that the command says when it ends with status 2 and writes nothing."""
    size = ["--height", "32", "--width", "64"]
    fixed = ["sample", "--model", str(model), "--out", str(out), "--prompt", "a red disc", *size]
    result = CliRunner().invoke(app, [*fixed, *options])
    assert result.exit_code == 2 and not out.exists(), result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


FRAMES = ["--num-frames", "13"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-frames", "17"], "the model's chunk_partition (1, 2, 1) has 4 latent frames, and "
         "num_frames=17 makes 5: give a chunk_partition whose sum is 5, or num_frames=13; (1, 2, "
         "2) fits (--chunks 1,2,2)"),
        ([*FRAMES, "--chunks", "1,3,3"], "chunk_partition (1, 3, 3) has 7 latent frames, and "
         "num_frames=13 makes 4: give a chunk_partition whose sum is 4, or num_frames=25; (1, 3) "
         "fits (--chunks 1,3)"),
        ([*FRAMES, "--chunks", "1,x"], "--chunks must be latent frames of each chunk with "
         "commas between them, as 1,3,3,2, got '1,x'"),
        ([*FRAMES, "--chunks", "4,0"], "chunk 1 must be a whole number from 1"),
        ([*FRAMES, "--height", "48"], "height must be a multiple of 32 where frames are "
         "compressed, which 3 chunks need (up to 2 do not), got 48; the nearest are 32 and 64"),
        ([*FRAMES, "--steps", "1,8+4+2+1"], "steps 8+4+2+1 are for 4 chunks or more, and the video "
         "has 3 chunks to sample"),
        ([*FRAMES, "--steps", "8+"], "as 1,8+2; got '8+'"),
        ([*FRAMES, "--switch", "blue"], "--switch must be the number of a chunk, a colon and a "
         "prompt, as 3:'a blue cross', got 'blue'"),
        ([*FRAMES, "--switch", "3:a cross"], "a prompt cannot be switched at chunk 3: the chunks "
         "that are sampled are 0 to 2"),
        ([*FRAMES, "--switch", "1:a", "--switch", "1:b"], "two prompts are given for one chunk"),
        ([*FRAMES, "--cache-window", "0"], "cache_window must be a whole number >= 1, got 0"),
        ([*FRAMES, "--cache-device", "tpu"], "cache_device 'tpu' cannot be used here"),
        ([*FRAMES, "--chunks", "4", "--image", "x.png"], "first frames must end with a chunk "
         "before the last one: got 1 frames, and chunk_partition (4,) allows none, as it is one "
         "chunk"),
        ([*FRAMES, "--chunks", "2,2", "--image", "x.png"], "chunk_partition (2, 2) allows 5"),
        ([*FRAMES, "--video", "x.mp4", "--video-frames", "5"], "first frames must end with a chunk "
         "before the last one: got 5 frames, and chunk_partition (1, 2, 1) allows 1, 9"),
        ([*FRAMES, "--switch", "0:a", "--video", "x.mp4", "--video-frames", "9"], "a prompt cannot "
         "be switched at chunk 0: the chunks that are sampled are 2 to 2"),
    ],
)  # fmt: skip
def test_what_a_causal_model_cannot_do_is_refused_before_loading(
    options: list[str], said: str, causal: Path, tmp_path: Path
) -> None:
    assert said in refused(causal, tmp_path / "out", *options)


def test_a_video_too_short_for_a_chunk_is_refused(causal: Path, tmp_path: Path) -> None:
    write_video(np.zeros((9, 32, 64, 3), np.uint8), tmp_path / "clip.mp4", fps=16)
    line = refused(
        causal, tmp_path / "out", "--num-frames", "29", "--chunks", "4,4",
        "--video", str(tmp_path / "clip.mp4"),
    )  # fmt: skip
    assert "first frames must end with a chunk before the last one: 9 can be taken" in line
    assert "chunk_partition (4, 4) allows 13" in line


def test_options_of_causal_models_are_named_where_they_do_not_apply(
    bidirectional: Path, tmp_path: Path
) -> None:
    every = ["--chunks", "1,3", "--stream", "--cache-window", "2", "--cache-device", "cpu",
             "--switch", "1:a blue cross"]  # fmt: skip
    line = refused(bidirectional, tmp_path / "out", *FRAMES, *every)
    assert "--chunks, --stream, --cache-window, --cache-device, --switch are for causal models" in (
        line
    )
    assert f"{bidirectional / 'transformer'} is bidirectional" in line
    assert "--stream is for causal models" in refused(
        bidirectional, tmp_path / "out", *FRAMES, "--stream"
    )


def test_steps_of_chunks_are_refused_for_a_bidirectional_model(
    bidirectional: Path, tmp_path: Path
) -> None:
    line = refused(bidirectional, tmp_path / "out", *FRAMES, "--steps", "1,8+2")
    assert "steps 8+2 are for the chunks of a causal model" in line
    assert "it samples all frames together, so give one number, as 8" in line
