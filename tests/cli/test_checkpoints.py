"""Test the commands on checkpoints, as a user calls them: convert, inspect, verify."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from anyflow.cli import app

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 64,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    diffusers.AnyFlowTransformer3DModel(**SIZES).save_pretrained(tmp_path / "model" / "transformer")
    return tmp_path / "model"


def test_a_converted_checkpoint_has_the_same_weights_for_diffusers(
    checkpoint: Path, tmp_path: Path
) -> None:
    assert run("convert", checkpoint, tmp_path / "out", "--shift", 5) == (
        0,
        f"Written to {tmp_path / 'out'}\n",
    )
    before, after = (load_file(f / "transformer" / WEIGHTS) for f in (checkpoint, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    diffusers.AnyFlowTransformer3DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").is_file()
    status, output = run("convert", checkpoint, tmp_path / "out")
    assert status == 2 and "not an empty folder" in output
    status, output = run("convert", checkpoint, tmp_path / "other", "--dtype", "int8")
    assert (
        status == 2
        and all(f"'{name}'" in output for name in ("bfloat16", "float16", "float32"))
        and "fp32" not in output
    )
    for name in ("float16", "fp16"):
        assert run("convert", checkpoint, tmp_path / name, "--dtype", name)[0] == 0
        assert (
            load_file(tmp_path / name / "transformer" / WEIGHTS)["proj_out.weight"].dtype
            == torch.float16
        )


def test_convert_makes_a_bidirectional_model_causal(checkpoint: Path, tmp_path: Path) -> None:
    status, output = run("convert", checkpoint, tmp_path / "out", "--causal", "--chunks", "1, 3,2")
    assert status == 0, output
    theirs, info = diffusers.AnyFlowFARTransformer3DModel.from_pretrained(
        tmp_path / "out" / "transformer", output_loading_info=True
    )
    assert not any(info.values()) and list(theirs.config.chunk_partition) == [1, 3, 2]
    status, output = run("inspect", tmp_path / "out")
    assert status == 0 and "chunk_partition (1, 3, 2)" in output
    for options, message in (
        (("--chunks", "1,3"), "--chunks is for --causal"),
        (("--causal", "--chunks", "1;3"), "must be latent frames of each chunk"),
        (("--causal", "--chunks", "1,0"), "chunk 1 must be a whole number from 1 to 4096, got 0"),
        (("--causal", "--bidirectional"), "causal=... makes a causal model"),
    ):
        status, output = run("convert", checkpoint, tmp_path / "other", *options)
        assert status == 2 and message in output and not (tmp_path / "other").exists()
    assert run("convert", tmp_path / "out", tmp_path / "back", "--bidirectional")[0] == 0
    before, after = (
        load_file(f / "transformer" / WEIGHTS) for f in (checkpoint, tmp_path / "back")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_inspect_tells_a_sound_checkpoint_from_one_that_lacks_a_tensor(
    checkpoint: Path, tmp_path: Path
) -> None:
    status, output = run("inspect", checkpoint)
    assert status == 0 and "diffusers AnyFlow" in output and "gate_value 0.25" in output
    file = checkpoint / "transformer" / WEIGHTS
    weights = load_file(file)
    del weights["proj_out.bias"]
    save_file(weights, file, {"format": "pt"})
    status, output = run("inspect", checkpoint)
    assert status == 1 and "missing: proj_out.bias" in output
    status, output = run("inspect", tmp_path / "nothing")
    assert status == 2 and output.count("\n") == 1 and "does not exist" in output


def test_verify_agrees_with_diffusers_and_says_so_when_more_is_asked_than_there_is(
    checkpoint: Path,
) -> None:
    size = ("--height", 64, "--width", 64, "--num-frames", 5)
    status, output = run("verify", "--model", checkpoint, *size)
    assert status == 0, output
    assert run("verify", "--model", checkpoint, *size, "--max-forward", 1e-12)[0] == 1
    assert run("verify", "--model", checkpoint, "--dtype", "fp8")[0] == 2
    status, output = run("verify", "--model", checkpoint, "--height", 16 * 65)
    assert (
        status == 2
        and output == "anyflow: height must be <= 1024 pixels for this model, got 1040\n"
    )
