"""Test that a damaged file in any part of a model is one ValueError that names the part."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow.pipelines import AnyFlowPipeline

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
WEIGHTS = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """Copy the whole model, so that it may be damaged."""
    return shutil.copytree(model, tmp_path / "model")


def refused(folder: Any) -> str:
    with pytest.raises(ValueError) as raised:
        AnyFlowPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")
    return str(raised.value)


@pytest.mark.parametrize(
    "kind", ["cut off", "pointer", "empty", "web page", "absent", "folder", "fifo"]
)
@pytest.mark.parametrize("part", WEIGHTS)
def test_damaged_weights_are_named(part: str, kind: str, copy: Path) -> None:
    file = copy / part / WEIGHTS[part]
    content = {
        "cut off": file.read_bytes()[:-100],
        "pointer": POINTER,
        "web page": b"<html>",
        "empty": b"",
    }.get(kind)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    elif kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    message = refused(copy)
    assert (
        part in message
        and {"pointer": "git lfs pull", "empty": "empty", "fifo": "FIFO"}.get(kind, "") in message
    )


@pytest.mark.parametrize(
    "file",
    ["transformer/config.json", "vae/config.json", "text_encoder/config.json",
     "tokenizer/tokenizer.json",
     "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"],
)  # fmt: skip
@pytest.mark.parametrize("content", [POINTER, b"", b"[]", b"\xff", b"[" * 10_000, b"3"], ids=str)
def test_a_damaged_configuration_is_named(file: str, content: bytes, copy: Path) -> None:
    (copy / file).write_bytes(content)
    assert file.partition("/")[0] in refused(copy)


@pytest.mark.parametrize(
    ("part", "name"),
    [("vae", "num_res_blocks"), ("text_encoder", "num_layers"), ("transformer", "num_layers")],
)
def test_more_layers_than_tensors_are_refused_before_they_are_built(
    part: str, name: str, copy: Path
) -> None:
    file = copy / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: 10**9}))
    message = refused(copy)
    assert name in message and str(10**9) in message


@pytest.mark.parametrize("shape", [[1, 2], [1, 2, "2"], "122", 4])
def test_a_patch_size_that_cannot_be_is_refused(shape: Any, copy: Path) -> None:
    file = copy / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": shape}))
    assert "patch_size" in refused(copy)


def test_paths_that_are_no_model_are_one_line(copy: Path) -> None:
    assert "is not a folder of a model" in refused(copy / "model_index.json")
    for path in ("x" * 300, "x\0y", "x" * 90 + "/" + "y" * 5000):
        assert len(refused(path).splitlines()) == 1
