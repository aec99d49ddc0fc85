"""Save or load sharded checkpoints on every rank.

With the arguments ``FOLDER save`` or ``FOLDER load CHECKPOINT...``, every rank
writes what it got, and the errors, to ``<action><world>_rank<i>.pt``.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import tiny_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from anyflow.training.checkpoint import Checkpointer, CheckpointError


def training_state(seed: int, *, sharded: bool) -> dict[str, Tensor]:
    """Return parameters and AdamW's state after a step on random gradients.

    They are equal for a seed however they are sharded.
    """
    network = tiny_model(seed)  # ranks but the first hold nothing of its tables, [1, ...]
    gradients = [torch.randn_like(p) for p in network.parameters()]
    if sharded:
        for block in network.blocks:
            fully_shard(block)
        fully_shard(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, foreach=False)
    for p, gradient in zip(network.parameters(), gradients, strict=True):
        p.grad = (
            distribute_tensor(gradient, p.device_mesh, p.placements)
            if isinstance(p, DTensor)
            else gradient
        )
    optimizer.step()
    tensors = {f"student/{name}": p for name, p in network.named_parameters()}
    for name, p in network.named_parameters():
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer/{name}/{key}"] = value
    return tensors


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: t.detach().clone() for name, t in full.items()}


def failure(checkpointer: Checkpointer, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the message of a load that must fail, and whether the tensors are what they were."""
    before = gathered(tensors)
    try:
        checkpointer.load(path, tensors)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    unchanged = all(torch.equal(t, before[name]) for name, t in gathered(tensors).items())
    return {"message": message, "unchanged": unchanged}


def save(folder: Path) -> dict[str, Any]:
    checkpointer = Checkpointer(folder / "sharded", keep=2)
    state = training_state(1, sharded=True)
    for step in (10, 20, 30):
        path = checkpointer.save(step, state, {"consumed": 7 * step})
    return {
        "tensors": gathered(state),
        "path": str(path),
        "steps": checkpointer.steps(),
        "latest": str(checkpointer.latest()),
    }


def load(folder: Path, checkpoints: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in checkpoints:
        state = training_state(2, sharded=True)
        checkpointer = Checkpointer(folder / name, keep=2)
        path = checkpointer.latest()
        assert path is not None
        results[name] = {"info": checkpointer.load(path, state), "tensors": gathered(state)}
        some = training_state(2, sharded=True)
        some["student/extra"] = some.pop("student/proj_out.weight")
        results[f"{name} other"] = failure(checkpointer, path, some)
        dist.barrier()
        if dist.get_rank() == 0:
            shard = max(path.glob("*.distcp"))
            shard.write_bytes(shard.read_bytes()[:-1])
        dist.barrier()
        results[f"{name} damaged"] = failure(checkpointer, path, training_state(2, sharded=True))
    return results


def main(folder: Path, action: str, *checkpoints: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))  # a deadlock becomes an error
    results = save(folder) if action == "save" else load(folder, list(checkpoints))
    torch.save(results, folder / f"{action}{dist.get_world_size()}_rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
