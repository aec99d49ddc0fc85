"""Run every command and every piece of Python of docs/sampling.md, on a tiny model."""

import functools
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from tiny_causal import write_causal_model
from typer.testing import CliRunner

from anyflow.cli import app

PAGE = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
OPTION = r"--[a-z][a-z-]+"
NAME = "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers"
SMALL: dict[str, Any] = {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 12}
CAUSAL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 29, "max_sequence_length": 12}


@pytest.fixture
def workplace(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with what the page's commands name, and enter it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    _plain_wan(model, tmp_path / "wan")
    write_causal_model(model, tmp_path / "far", chunk_partition=(1, 1))
    (tmp_path / "prompts.csv").write_text(
        "prompt,negative_prompt\na red disc,blurry\na blue cross,\n"
    )
    transformer = diffusers.AnyFlowTransformer3DModel.from_pretrained(
        model, subfolder="transformer"
    )
    adapted = get_peft_model(
        transformer, LoraConfig(r=2, target_modules=["to_q"]), adapter_name="real"
    )
    torch.save({"ema": adapted.state_dict()}, "anyflow.pt")
    layers = get_peft_model_state_dict(adapted, adapter_name="real")
    layers = {name.removeprefix("base_model.model."): tensor for name, tensor in layers.items()}
    diffusers.loaders.WanLoraLoaderMixin.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "lora.safetensors")
    return tmp_path


def _plain_wan(model: Path, folder: Path) -> None:
    """Write a folder as that of Wan itself is: another transformer and another scheduler."""
    shutil.copytree(model, folder)
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    transformer = diffusers.WanTransformer3DModel(**sizes, text_dim=16, freq_dim=32, ffn_dim=32)
    transformer.save_pretrained(folder / "transformer")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3
    )
    scheduler.save_pretrained(folder / "scheduler")


def test_the_python(workplace: Path, causal_model: Path) -> None:
    """Run one piece after the other, as a reader does; paths and sizes of videos are others."""
    pieces = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(pieces) == 10
    scope: dict[str, Any] = {
        "path": workplace / "model",
        "causal_path": causal_model,
        "small": lambda pipe: functools.partial(pipe, **SMALL),
        "causally": lambda call: functools.partial(call, **CAUSAL),
    }
    for piece in pieces:
        piece = piece.replace(f'"{NAME}"', 'str(path), device="cpu"').replace(
            "compile=True", "compile=False"
        )
        piece = re.sub(r"\b(causal|causal\.stream)\(", r"causally(\1)(", piece)
        exec(re.sub(r"\b(pipe|theirs)\(", r"small(\1)(", piece), scope)
    assert len(scope["video"]) == 5 and (workplace / "panda.mp4").stat().st_size > 500
    assert scope["part"].chunk == 3 and scope["part"].frames.shape == (1, 8, 32, 32, 3)
    assert scope["whole"].shape == scope["switched"].shape == (1, 29, 32, 32, 3)
    assert (scope["whole"][:, :21] == scope["switched"][:, :21]).all()
    assert (scope["whole"][:, 21:] != scope["switched"][:, 21:]).any()
    assert scope["latents"].shape == (1, 3, 16, 8, 12) and scope["frames"].shape == (
        1,
        9,
        3,
        64,
        96,
    )
    assert type(scope["theirs"].transformer) is diffusers.AnyFlowTransformer3DModel


def test_the_python_of_the_readme(workplace: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    pieces = [
        p
        for p in re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
        if "from_pretrained(" in p
    ]
    pieces = [piece for piece in pieces if "AnyFlowPipeline" in piece]
    assert len(pieces) == 2
    scope: dict[str, Any] = {
        "path": workplace / "model",
        "small": lambda pipe: functools.partial(pipe, **SMALL),
    }
    for piece in pieces:
        piece = piece.replace(f'"{NAME}"', 'path, device="cpu"').replace(
            "(path)", "(path, torch_dtype=None)"
        )
        exec(re.sub(r"\bpipe\(", r"small(pipe)(", piece), scope)
    assert len(scope["video"]) == 5 and (workplace / "panda.mp4").stat().st_size > 500
    assert type(scope["pipe"].transformer) is diffusers.AnyFlowTransformer3DModel


@pytest.mark.slow
def test_the_commands(workplace: Path) -> None:
    """Run the commands with small videos, and the head dimension of the untrained model."""
    commands = re.findall(r"^    anyflow (.*)$", PAGE, flags=re.MULTILINE)
    small = ["--height", "16", "--width", "32", "--num-frames", "5", "--device", "cpu"]
    more = {"sample": small, "verify": small, "convert": ["--head-dim", "12"], "inspect": []}
    assert {command.split()[0] for command in commands} == set(more)
    for command in commands:
        command = command.replace("--steps 50", "--steps 2").replace("--switch 3:", "--switch 1:")
        arguments = shlex.split(command.replace(NAME, "model"))
        result = CliRunner().invoke(app, [*arguments, *more[arguments[0]]])
        assert result.exit_code == 0, (command, result.output)
    assert len(list((workplace / "videos").rglob("steps-*.mp4"))) == 8
    assert len(list((workplace / "wan-videos").rglob("steps-*.mp4"))) == 1
    assert len(list((workplace / "far-videos").rglob("steps-08+02-seed-0.mp4"))) == 1
    assert len(list((workplace / "switched").rglob("steps-*.mp4"))) == 3
    assert (workplace / "converted" / "scheduler" / "scheduler_config.json").is_file()


def test_every_option_that_the_page_names_is_one() -> None:
    named = set(re.findall(OPTION, re.sub(r"`(pip install|hf download) [^`]*`", "", PAGE)))
    known: set[str] = set()
    for name in ("sample", "inspect", "convert", "verify"):
        known |= set(
            re.findall(
                OPTION, CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
            )
        )
    assert {"--prompt", "--shift", "--max-loss"} <= known
    assert named and named <= known
