"""Run on a disk that fills up, and twice in one folder."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anyflow.training import Recipe, train
from anyflow.training.config import CheckpointConfig
from anyflow.training.export import export
from anyflow.utils.locking import FolderInUseError, folder_lock

Make = Callable[..., Recipe]


@contextmanager
def _small_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_when_there_is_room_again(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Limit the size of files: the write of a checkpoint is refused, then that of an export."""
    straight, full = (
        lambda steps, name=name: small_recipe(
            tmp_path / name, steps=steps, checkpoint=CheckpointConfig(every=2)
        )
        for name in ("straight", "full")
    )
    train(straight(4))
    train(full(2))
    with _small_files(), pytest.raises(OSError, match="File too large") as caught:
        train(full(4))
    assert "step-00000004" in str(caught.value.filename)
    assert [p.name for p in (tmp_path / "full" / "checkpoints").iterdir()] == ["step-00000002"]
    train(full(4))
    before, after = _weights(tmp_path / "straight" / "model"), _weights(tmp_path / "full" / "model")
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )

    with _small_files(), pytest.raises(OSError, match="File too large"):
        export(tmp_path / "full", tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "straight"]
    exported = _weights(export(tmp_path / "full", tmp_path / "model"))
    assert all(torch.equal(exported[name], after[name]) for name in after)
    assert not list((tmp_path / "full").glob(".*"))


def test_a_second_run_in_a_folder_is_refused_before_it_touches_anything(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path / "run", steps=1)
    with folder_lock(tmp_path / "run"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FolderInUseError, match="run is in use by process"):
            train(recipe)
        assert sorted(tmp_path.rglob("*")) == before
    train(recipe)
