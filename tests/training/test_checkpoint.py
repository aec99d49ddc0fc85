"""Save and load checkpoints of training; damage and code in one are refused."""

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow.training.checkpoint import Checkpointer, CheckpointError
from anyflow.training.manifest import FileRecord, Manifest


def state(seed: int) -> dict[str, Tensor]:
    """Return every kind of tensor that training has."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=g)
    return {
        "student/blocks.0.weight": torch.nn.Parameter(weight),
        "student/table": torch.randn(4, 6, generator=g).T,
        "ema/blocks.0.weight": weight.to(torch.bfloat16),
        "optimizer/student/blocks.0.weight/exp_avg": torch.randn(
            5, 7, generator=g, dtype=torch.float64
        ),
        "optimizer/student/blocks.0.weight/step": torch.tensor(float(seed)),
        "counter": torch.tensor([seed, 2**40]),
        "empty": torch.empty(0, 3),
    }


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(
        t.dtype == want[name].dtype and torch.equal(t, want[name]) for name, t in got.items()
    )


@pytest.fixture
def saved(tmp_path: Path) -> Checkpointer:
    """Save checkpoints of the steps 10 and 20 that hold ``state(step)``."""
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=5)
    for step in (10, 20):
        checkpointer.save(step, state(step), {"consumed": step})
    return checkpointer


def resign(folder: Path) -> None:
    """Make the manifest agree with whatever the files hold now."""
    manifest = Manifest.read(folder)
    replace(manifest, files={name: FileRecord.of(folder / name) for name in manifest.files}).write(
        folder
    )


# Saving and loading -------------------------------------------------------------------------------


def test_what_was_saved_is_loaded_in_place(tmp_path: Path) -> None:
    info = {
        "consumed": 2**40,
        "loss": 0.1,
        "data": {"fingerprint": "é", "shape": [1, 2]},
        "none": None,
    }
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", keep=1)
    path = checkpointer.save(3, state(3), info)
    assert path == tmp_path / "run" / "checkpoints" / "step-00000003"
    tensors = state(4)
    before = dict(tensors)
    assert checkpointer.load(path, tensors) == info
    assert equal(tensors, state(3))
    assert all(tensors[name] is before[name] for name in before)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
    assert checkpointer.steps() == [] and checkpointer.latest() is None
    for step in (5, 7, 100, 12):
        path = checkpointer.save(step, state(step), {})
    assert checkpointer.steps() == [12, 100]
    assert checkpointer.latest() == tmp_path / "checkpoints" / "step-00000100"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000012",
        "step-00000100",
    ]
    assert path == checkpointer.save(6, state(6), {}).with_name("step-00000012")
    assert checkpointer.steps() == [6, 12, 100]  # never the one just written


def test_a_step_saved_again_is_replaced(saved: Checkpointer) -> None:
    path = saved.save(20, state(21), {"consumed": 21})
    tensors = state(1)
    assert saved.load(path, tensors) == {"consumed": 21}
    assert equal(tensors, state(21)) and saved.steps() == [10, 20]


def test_a_checkpoint_of_another_folder_can_be_loaded(saved: Checkpointer, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(saved.folder / "step-00000010", moved)
    tensors = state(1)
    Checkpointer(tmp_path / "other", keep=1).load(moved, tensors)
    assert equal(tensors, state(10))


def test_a_prefix_leaves_the_other_names_aside(saved: Checkpointer) -> None:
    tensors = {"ema/blocks.0.weight": torch.zeros(5, 7, dtype=torch.bfloat16)}
    saved.load(saved.folder / "step-00000010", tensors, prefix="ema/")
    assert torch.equal(tensors["ema/blocks.0.weight"], state(10)["ema/blocks.0.weight"])
    with pytest.raises(CheckpointError, match="only in the checkpoint: student/table"):
        saved.load(saved.folder / "step-00000010", {}, prefix="student/")


def test_wrong_arguments_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpointer(tmp_path, keep=0)
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=1)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        checkpointer.save(-1, state(0), {})
    with pytest.raises(ValueError, match="these are none: lr, name"):
        checkpointer.save(1, {"w": torch.zeros(1), "lr": 0.1, "name": "x"}, {})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="info must be JSON"):
        checkpointer.save(1, state(0), {"path": tmp_path})
    assert not (tmp_path / "checkpoints").exists()


def test_a_save_that_cannot_write_leaves_the_others(saved: Checkpointer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*step-00000030\.tmp"):
            saved.save(30, state(30), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in saved.folder.iterdir()) == ["step-00000010", "step-00000020"]
    saved.save(30, state(30), {})
    assert sorted(p.name for p in saved.folder.iterdir()) == [
        "step-00000010",
        "step-00000020",
        "step-00000030",
    ]


# Damage -------------------------------------------------------------------------------------------


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "is missing": Path.unlink,
    "bytes, ": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "is corrupted": flip_bit,
}


@pytest.mark.parametrize("name", ["__0_0.distcp", "tensors.json"])
@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_offered(
    saved: Checkpointer, name: str, message: str
) -> None:
    path = saved.latest()
    assert path is not None
    DAMAGE[message](path / name)
    tensors = state(1)
    with pytest.raises(CheckpointError) as error:
        saved.load(path, tensors)
    for part in (
        str(path),
        name,
        message,
        f"the previous complete checkpoint is {saved.folder / 'step-00000010'}",
    ):
        assert part in str(error.value)
    assert equal(tensors, state(1))


def test_every_damaged_file_is_named(saved: Checkpointer) -> None:
    path = saved.folder / "step-00000010"
    for name in ("__0_0.distcp", "tensors.json"):
        flip_bit(path / name)
    with pytest.raises(
        CheckpointError, match=r"__0_0.distcp is .*; tensors.json is .*; there is no earlier one"
    ):
        saved.load(path, state(1))


def test_any_flipped_bit_of_a_manifest_is_seen(saved: Checkpointer) -> None:
    path = saved.folder / "step-00000020"
    good = (path / "manifest.json").read_bytes()
    for place in range(0, len(good), 7):
        data = bytearray(good)
        data[place] ^= 1
        (path / "manifest.json").write_bytes(data)
        if json.loads(good) == readable(data):
            continue  # white space
        tensors = state(1)
        with pytest.raises(
            CheckpointError,
            match=r"step-00000020.*the previous complete checkpoint is .*step-00000010",
        ):
            saved.load(path, tensors)
        assert equal(tensors, state(1))


def readable(data: bytearray) -> Any:
    try:
        return json.loads(bytes(data))
    except ValueError:
        return None


def test_a_folder_without_manifest_is_no_checkpoint(saved: Checkpointer) -> None:
    newest = saved.folder / "step-00000020"
    (newest / "manifest.json").unlink()
    assert saved.latest() == saved.folder / "step-00000010"
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint.*step-00000010"):
        saved.load(newest, state(1))
    assert saved.save(20, state(20), {}) == newest == saved.latest()
    with pytest.raises(
        CheckpointError, match=r"step-00000030 is not a complete checkpoint.*step-00000020"
    ):
        saved.load(saved.folder / "step-00000030", state(1))


def test_another_architecture_is_one_error_that_lists_every_difference(saved: Checkpointer) -> None:
    tensors = state(1)
    tensors["student/blocks.1.weight"] = torch.zeros(2)
    tensors["student/new"] = torch.zeros(2)
    del tensors["student/table"], tensors["counter"]
    tensors["empty"] = torch.zeros(1, 3)
    tensors["ema/blocks.0.weight"] = torch.zeros(5, 7)
    before = bits(tensors)
    with pytest.raises(CheckpointError) as error:
        saved.load(saved.folder / "step-00000020", tensors)
    for line in (
        "missing in the checkpoint: student/blocks.1.weight",
        "missing in the checkpoint: student/new",
        "only in the checkpoint: student/table",
        "only in the checkpoint: counter",
        "empty: the checkpoint has float32 [0, 3], wanted is float32 [1, 3]",
        "ema/blocks.0.weight: the checkpoint has bfloat16 [5, 7], wanted is float32 [5, 7]",
    ):
        assert f"\n  {line}" in str(error.value)
    assert str(error.value).count("\n") == 6
    assert equal(tensors, before)


# Malice -------------------------------------------------------------------------------------------


class Malicious:
    """Make a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_code_in_a_shard_is_not_run(saved: Checkpointer, tmp_path: Path, how: str) -> None:
    """Make the manifest agree, so that only the loading itself stands in the way."""
    path, trace, shard = saved.folder / "step-00000020", tmp_path / "trace", tmp_path / "shard"
    if how == "pickle":
        shard.write_bytes(pickle.dumps(Malicious(trace), protocol=2))
        pickle.loads(shard.read_bytes())
    else:
        torch.save(Malicious(trace), shard)
        torch.load(shard, weights_only=False)
    trace.rmdir()  # it works

    shutil.copy(shard, path / "__0_0.distcp")
    index = json.loads((path / "tensors.json").read_text())
    for entry in index.values():
        entry["chunks"][0].update(position=0, length=shard.stat().st_size)
    (path / "tensors.json").write_text(json.dumps(index))
    resign(path)
    with pytest.raises(CheckpointError, match=r"step-00000020 cannot be read: UnpicklingError"):
        saved.load(path, state(1))
    assert not trace.exists()


def test_an_index_that_is_a_pickle_is_not_unpickled(saved: Checkpointer, tmp_path: Path) -> None:
    path, trace = saved.folder / "step-00000020", tmp_path / "trace"
    (path / ".metadata").write_bytes(pickle.dumps(Malicious(trace)))  # where DCP itself would look
    saved.load(path, state(1))
    (path / "tensors.json").write_bytes(pickle.dumps(Malicious(trace)))
    resign(path)
    with pytest.raises(CheckpointError, match=r"tensors.json cannot be read"):
        saved.load(path, state(1))
    assert not trace.exists()


def test_files_outside_the_checkpoint_are_not_read(saved: Checkpointer) -> None:
    path = saved.folder / "step-00000020"
    outside = "../step-00000010/__0_0.distcp"
    text = (path / "tensors.json").read_text()
    (path / "tensors.json").write_text(text.replace("__0_0.distcp", outside))
    resign(path)
    with pytest.raises(CheckpointError, match="which the manifest does not list"):
        saved.load(path, state(1))
    manifest = Manifest.read(path)
    replace(manifest, files={**manifest.files, outside: FileRecord.of(path / outside)}).write(path)
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        saved.load(path, state(1))
