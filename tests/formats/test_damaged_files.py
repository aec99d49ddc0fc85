"""Test files of weights that are damaged, foreign or dangerous: an error or a whole model."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import WEIGHTS, refused, rewrite
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow.formats import CheckpointFormatError, detect, inspect, load_transformer
from anyflow.models import AnyFlowTransformer3DModel

FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("size", [0, 1, 8, 100, 5000, -1])
def test_a_file_cut_short_is_refused(size: int, folder: Path, shards: Path) -> None:
    for file in (folder / WEIGHTS, next(iter(shards.glob("*.safetensors")))):
        content = file.read_bytes()
        file.write_bytes(content[:size])
        message = refused(file.parent)
        assert (
            "not a complete safetensors file" if size else "an empty file"
        ) in message and file.name in message


class Harmful:
    """Create a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_that_needs_code_is_refused_and_not_executed(folder: Path, tmp_path: Path) -> None:
    harmed, file = tmp_path / "harmed", tmp_path / "model.pt"
    for content in (
        {"ema": Harmful(harmed)},
        {"ema": {}, "model_state_dict_g": {"x": Harmful(harmed)}},
    ):
        torch.save(content, file)
        assert "needs Python code" in refused(file)
        file.write_bytes(pickle.dumps(content))
        refused(file)
    assert not harmed.exists()


@pytest.mark.parametrize(
    "content",
    [
        {}, [], torch.zeros(3), {"ema": {}}, {"ema": {"proj_out.bias": 3}}, {1: torch.zeros(3)},
        {"proj_out.weight": torch.zeros(3).to_sparse()},
        {"proj_out.weight": torch.zeros(1).expand(10**12)},
        {"proj_out.weight": torch.zeros(3, device="meta")},
        {"names": torch.zeros(3), "of": torch.zeros(3)},
        {"condition_embedder.time_proj.weight": torch.zeros(())},
    ],
    ids=str,
)  # fmt: skip
def test_a_torch_file_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    assert "model.pt" in refused(tmp_path / "model.pt")


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has none" in refused(tmp_path / "empty")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "should end in" in refused(tmp_path / "model.gguf")
    save_file({"vae.weight": torch.zeros(3)}, tmp_path / "vae.safetensors")
    assert "of no format that is understood:\n  vae.weight" in refused(tmp_path / "vae.safetensors")


Damage = Callable[[bytearray], bytes]


def damages() -> Iterator[st.SearchStrategy[Damage]]:
    def cut(at: float) -> Damage:
        return lambda data: bytes(data[: int(at * len(data))])

    def flip(position: float, value: int) -> Damage:
        def damage(data: bytearray) -> bytes:
            data[int(position * (len(data) - 1))] = value
            return bytes(data)

        return damage

    def flip_near(position: int, value: int) -> Damage:
        return lambda data: bytes(data[:position] + bytes([value]) + data[position + 1 :])

    unit = st.floats(0, 1, exclude_max=True)
    yield st.builds(cut, unit)
    yield st.builds(flip, unit, st.integers(0, 255))
    yield st.builds(flip_near, st.integers(0, 3000), st.integers(0, 255))  # the header


@pytest.mark.parametrize("kind", ["safetensors", "pt", "config", "index"])
@given(damage=st.one_of(*damages()))
@FUZZ
def test_a_damaged_file_is_an_error_or_a_whole_model(
    kind: str, damage: Damage, shards: Path, folder: Path
) -> None:
    torch_file = folder.parent / "model.pt"
    if not torch_file.exists():
        torch.save(load_file(folder / WEIGHTS), torch_file)
    file, path = {
        "safetensors": (folder / WEIGHTS, folder),
        "pt": (torch_file, torch_file),
        "config": (folder / "config.json", folder),
        "index": (shards / f"{WEIGHTS}.index.json", shards),
    }[kind]
    sound = file.read_bytes()
    try:
        file.write_bytes(damage(bytearray(sound)))
        options = {"attention_head_dim": 24} if kind == "pt" else {}
        for read in (
            detect,
            lambda p: inspect(p, **options),
            lambda p: load_transformer(p, **options),
        ):
            try:
                result = read(path)
            except CheckpointFormatError as error:
                assert str(error)
                continue
            if isinstance(result, AnyFlowTransformer3DModel):  # only values are other ones
                assert not any(p.is_meta for p in result.parameters())
                assert all(p.is_floating_point() for p in result.parameters())
    finally:
        file.write_bytes(sound)


@pytest.mark.slow
@given(data=st.data())
@FUZZ
def test_no_tensor_can_be_renamed_reshaped_retyped_dropped_or_added(
    data: st.DataObject, folder: Path
) -> None:
    sound = (folder / WEIGHTS).read_bytes()
    config = folder / "config.json"
    has_config = data.draw(st.booleans(), "config")
    tensors = load_file(folder / WEIGHTS)
    name = data.draw(st.sampled_from(sorted(tensors)), "name")
    kind = data.draw(st.sampled_from(["rename", "reshape", "retype", "drop", "add"]), "kind")
    if kind == "rename":
        tensors[
            data.draw(st.text("abcdefg_.0123", min_size=1).filter(lambda n: n not in tensors))
        ] = tensors.pop(name)
    elif kind == "reshape":
        tensors[name] = torch.zeros(data.draw(st.lists(st.integers(0, 50), max_size=5), "shape"))
        if tensors[name].shape == load_file(folder / WEIGHTS)[name].shape:
            return
    elif kind == "retype":
        tensors[name] = tensors[name].to(
            data.draw(st.sampled_from([torch.int32, torch.bool, torch.float8_e4m3fn]))
        )
    elif kind == "drop":
        del tensors[name]
    else:
        tensors[name + data.draw(st.sampled_from([".weight", "s", "_1"]))] = torch.zeros(3)
    hidden = config.with_name("hidden.json")
    try:
        save_file(tensors, folder / WEIGHTS)
        if not has_config:
            config.rename(hidden)
        refused(folder, **({} if has_config else {"attention_head_dim": 24}))
    finally:
        (folder / WEIGHTS).write_bytes(sound)
        if hidden.exists():
            hidden.rename(config)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
def test_values_that_are_not_finite_are_warned_of_and_refused_on_demand(
    value: float, folder: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.1.ffn.net.2.bias"][3] = value
        tensors["proj_out.weight"][0, 0] = value

    assert not inspect(folder, strict_values=True).problems
    rewrite(folder, change)
    dtype = torch.float16 if value == 1e30 else None  # to which it is infinity
    with pytest.warns(UserWarning, match="2 tensors have NaN or infinity") as warned:
        load_transformer(folder, dtype=dtype)
    assert len(warned) == 1 and "blocks.1.ffn.net.2.bias" in str(warned[0].message)
    assert "proj_out.weight" in refused(folder, dtype=dtype, strict_values=True)
    assert not inspect(folder).problems
    if value != 1e30:
        assert "NaN or infinity: proj_out.weight" in inspect(folder, strict_values=True).problems


@pytest.mark.parametrize(
    "kind",
    [
        "folder",
        "fifo",
        "device",
        "loop",
        "link to nothing",
        "pointer",
        "web page",
        "empty",
        "absent",
        "long",
    ],
)
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_what_is_no_file_of_weights_is_named_without_waiting(
    name: str, kind: str, folder: Path
) -> None:
    file = folder / name
    file.unlink()
    path = folder
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind in ("device", "loop", "link to nothing"):
        file.symlink_to({"device": "/dev/zero", "loop": file, "link to nothing": "/nowhere"}[kind])
    elif kind in ("pointer", "web page", "empty"):
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        file.write_text(
            {"pointer": pointer, "web page": "\n<!DOCTYPE html><html>", "empty": ""}[kind]
        )
    else:
        path = file if kind == "absent" else folder / ("x" * 300)
    expected = {"folder": "is a folder", "fifo": "is a FIFO", "device": "is a device",
                "loop": "symbolic links",
                "link to nothing": "is a link to /nowhere", "pointer": "git lfs pull",
                "web page": "a web page",
                "empty": "an empty file", "absent": "does not exist",
                "long": "too long"}[kind]  # fmt: skip
    for read in (load_transformer, inspect, detect):
        with pytest.raises(CheckpointFormatError) as raised:
            read(path)
        assert expected in str(raised.value) and len(str(raised.value)) < 1000
