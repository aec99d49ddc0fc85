"""Save checkpoints on some ranks and load them on others; errors reach every rank."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_ranks
import pytest
import torch
from torch import Tensor

from anyflow.training.checkpoint import Checkpointer
from anyflow.training.manifest import Manifest

pytestmark = pytest.mark.slow
Ranks = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks_of(fork_ranks: Callable[..., subprocess.Popen[str]]) -> Ranks:
    """Return ``ranks_of(world, folder, *arguments)``: what every rank of the script wrote."""

    def run(world: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
        job = fork_ranks(world, checkpoint_ranks.__file__, folder, *arguments)
        output, _ = job.communicate(timeout=400)
        assert job.returncode == 0, output[-4000:]
        files = [folder / f"{arguments[0]}{world}_rank{rank}.pt" for rank in range(world)]
        return [torch.load(file, weights_only=True) for file in files]

    return run


@pytest.fixture(scope="module")
def worlds(
    ranks_of: Ranks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return a folder with checkpoints of one process (``plain``) and of two (``sharded``).

    What they hold comes with it.
    """
    folder = tmp_path_factory.mktemp("worlds")
    plain = checkpoint_ranks.training_state(3, sharded=False)
    Checkpointer(folder / "plain", keep=1).save(10, plain, {"consumed": 70})
    ranks = ranks_of(2, folder, "save")
    for results in ranks:
        assert results["steps"] == [20, 30] and results["latest"] == results["path"]
    assert Manifest.read(folder / "sharded" / "step-00000030").world_size == 2
    return folder, {"plain": checkpoint_ranks.gathered(plain), "sharded": ranks[0]["tensors"]}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_two_ranks_to_one(worlds: tuple[Path, dict[str, Any]]) -> None:
    folder, saved = worlds
    tensors = checkpoint_ranks.training_state(2, sharded=False)
    checkpointer = Checkpointer(folder / "sharded", keep=1)
    newest = checkpointer.latest()
    assert newest is not None
    assert checkpointer.load(newest, tensors) == {"consumed": 210}
    same(checkpoint_ranks.gathered(tensors), saved["sharded"])


@pytest.mark.parametrize("world", [2, 4])
def test_one_rank_and_two_to_more_and_errors_on_all(
    worlds: tuple[Path, dict[str, Any]], ranks_of: Ranks, world: int, tmp_path: Path
) -> None:
    folder, saved = worlds
    for name in saved:
        shutil.copytree(folder / name, tmp_path / name)
    ranks = ranks_of(world, tmp_path, "load", *saved)
    for results in ranks:
        for name, info in (("plain", {"consumed": 70}), ("sharded", {"consumed": 210})):
            assert results[name]["info"] == info
            same(results[name]["tensors"], saved[name])
            other, damaged = results[f"{name} other"], results[f"{name} damaged"]
            assert (
                "missing in the checkpoint: student/extra" in other["message"]
                and other["unchanged"]
            )
            shard = "__0_0" if name == "plain" else "__1_0"
            assert re.search(
                rf"{shard}\.distcp has \d+ bytes, \d+ were written", damaged["message"]
            )
            assert damaged["unchanged"]
