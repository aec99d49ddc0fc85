"""Make ranks agree; in a single process every function is the identity."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return this process's rank in a group and the group's size; (0, 1) in a single process.

    Args:
        group: None for all processes.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def all_reduce_sum(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks of the group, in place on a tensor that needs no gradient."""
    if rank_and_world(group)[1] > 1:
        dist.all_reduce(values, group=group)
    return values


def broadcast_from_rank_zero(values: list[float], device: torch.device) -> list[float]:
    """Return rank 0's numbers on every rank, for draws that must agree."""
    if rank_and_world()[1] == 1:
        return values
    on_device = device if dist.get_backend() != "gloo" else torch.device("cpu")
    shared = torch.tensor(values, dtype=torch.float32, device=on_device)
    dist.broadcast(shared, src=0)
    return shared.tolist()
