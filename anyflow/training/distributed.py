"""Set up processes and devices: FSDP2, HSDP and sequence parallelism as free functions.

On one process the functions change nothing.

A world is replicate x shard x sequence processes; neighbors share a sample. Parameters are sharded
over shard x sequence, and gradients are averaged over all ranks: with s ranks to a sample, each
computes s times its tokens' part of the gradient
(:meth:`~anyflow.models.AnyFlowTransformer3DModel.set_sequence_parallel`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.limits import MAX_SIZE
from anyflow.utils.devices import default_device, known_device, local_gpu
from anyflow.utils.validation import require_whole

T = TypeVar("T")

_MAX_TIMEOUT = 30 * 24 * 3600  # seconds


@dataclass(frozen=True)
class ParallelConfig:
    """Hold the sizes of the device mesh: replicate x shard x sequence processes.

    Args:
        replicate: copies of the parameters (HSDP); 1 is plain FSDP.
        shard: processes that parameters are sharded over; None takes what the other two leave.
        sequence: processes that share the tokens of a sample (Ulysses); it divides the number of
            heads.
        timeout_s: seconds without an answer after which the other ranks are given up.
    """

    replicate: int = 1
    shard: int | None = None
    sequence: int = 1
    timeout_s: int = 600

    def __post_init__(self) -> None:
        for name in ("replicate", "sequence"):
            require_whole(name, getattr(self, name), most=MAX_SIZE)
        require_whole("timeout_s", self.timeout_s, most=_MAX_TIMEOUT)
        if self.shard is not None:
            require_whole("shard", self.shard, most=MAX_SIZE)


@dataclass(frozen=True)
class Mesh:
    """Hold this process's place among all.

    Args:
        device: where this process computes.
        rank: rank among all processes.
        world_size: number of processes.
        data_rank: rank among the ranks with samples of their own; those that share samples have the
            same.
        data_world: number of such ranks, replicate x shard.
        sequence_degree: processes that share the tokens of a sample.
        mesh: mesh of the parameters, ``("shard",)`` or ``("replicate", "shard")``; None on one
            process.
        data_group: the processes with other samples, one for each data rank; None on one process.
        sequence_group: the processes that share this one's samples; None on one process.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    data_rank: int = 0
    data_world: int = 1
    sequence_degree: int = 1
    mesh: DeviceMesh | None = None
    data_group: dist.ProcessGroup | None = None
    sequence_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Tell whether this process writes what only one process should."""
        return self.rank == 0


def setup(parallel: ParallelConfig, device: str | None) -> Mesh:
    """Join the processes that torchrun has started, or make a world of one without torchrun.

    Torchrun sets RANK, WORLD_SIZE and LOCAL_RANK.

    Args:
        parallel: the sizes of the mesh, and the timeout of every collective.
        device: ``"cpu"`` (gloo), ``"cuda"`` (nccl, the GPU of LOCAL_RANK), or None for CUDA where
            there is a GPU.

    Raises:
        ValueError: the sizes do not multiply to the number of processes, or this process has no
            such device.
    """
    rank, world_size, local_rank = (int(os.environ.get(n, d)) for n, d in _TORCHRUN)
    shard = _shard_degree(parallel, world_size)
    place = _device(device, local_rank, world_size)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size == 1:
        return Mesh(place)
    timeout = timedelta(seconds=parallel.timeout_s)
    on_gpu = place.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timeout, device_id=place if on_gpu else None
    )

    def group(rows: Tensor) -> dist.ProcessGroup:
        """Make the groups of all rows; init_device_mesh would give them the default timeout."""
        return dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0]

    ranks = torch.arange(world_size)
    copies = ranks.view(parallel.replicate, shard * parallel.sequence)
    samples = ranks.view(world_size // parallel.sequence, parallel.sequence)
    if parallel.replicate == 1:
        mesh = DeviceMesh.from_group(group(copies), place.type, mesh_dim_names=("shard",))
    else:
        both = [group(copies.T), group(copies)]
        mesh = DeviceMesh.from_group(
            both, place.type, mesh=copies, mesh_dim_names=("replicate", "shard")
        )
    return Mesh(
        device=place,
        rank=rank,
        world_size=world_size,
        data_rank=rank // parallel.sequence,
        data_world=world_size // parallel.sequence,
        sequence_degree=parallel.sequence,
        mesh=mesh,
        data_group=group(samples.T),
        sequence_group=group(samples),
    )


_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _shard_degree(parallel: ParallelConfig, world_size: int) -> int:
    others = parallel.replicate * parallel.sequence
    shard = world_size // others if parallel.shard is None else parallel.shard
    if others * shard != world_size:
        given = "what is left" if parallel.shard is None else shard
        raise ValueError(
            f"parallel: replicate {parallel.replicate} x shard {given} x sequence "
            f"{parallel.sequence} does not make "
            f"{world_size}, the number of processes (torchrun's --nnodes x --nproc-per-node)"
        )
    return shard


def _device(name: str | None, local_rank: int, world_size: int) -> torch.device:
    name = default_device().type if name is None else name
    device = known_device(name)
    if world_size > 1 and name not in ("cpu", "cuda"):
        raise ValueError(
            f"device must be 'cpu' or 'cuda' with {world_size} processes, got {name!r}"
        )
    if device.type != "cuda":
        return device
    return local_gpu(local_rank if device.index is None else device.index)


def main_result(mesh: Mesh, work: Callable[[], T]) -> T:
    """Do something on rank 0 and return its result on every rank; collective.

    Raises:
        ValueError, ImportError, OSError: rank 0 did, and so does every rank.
    """
    outcome: list[Any] = [None, None]
    if mesh.is_main:
        try:
            outcome[0] = work()
        except (ValueError, ImportError, OSError) as error:
            outcome[1] = error
    if mesh.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])


def gather(mesh: Mesh, value: T) -> list[T]:
    """Return the values of the ranks with other samples, in their order.

    Collective over these ranks; a value is pickled.
    """
    if mesh.data_group is None:
        return [value]
    values: list[Any] = [None] * mesh.data_world
    dist.all_gather_object(values, value, group=mesh.data_group)
    return values


def teardown(mesh: Mesh) -> None:
    """Leave the processes that :func:`setup` joined."""
    if mesh.mesh is not None:
        dist.destroy_process_group()


def shard_network(network: AnyFlowTransformer3DModel, mesh: Mesh, *, trains: bool) -> None:
    """Move a network to the mesh's device, sharded by blocks and sequence-parallel, in place.

    No rank ever holds more than its shards and one whole block on the device. Parameters are whole
    only inside forward and backward; elsewhere they are DTensors. Optimizers are built afterwards.

    Args:
        network: whole, with the same weights on every rank, on the CPU or the mesh's device;
            adapters already added.
        mesh: from :func:`setup`.
        trains: False freezes it.

    Raises:
        ValueError: the sequence degree does not divide the number of attention heads.
    """
    if not trains:
        network.requires_grad_(False)
    network.set_sequence_parallel(mesh.sequence_group)
    if mesh.mesh is None:
        network.to(mesh.device)
        return
    # It warns of a later write into a block's or network's output, which is a view on some paths;
    # nothing here writes.
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning
    )
    # The root too: after a forward without backward, as a teacher's, its parameters must be
    # DTensors again.
    for module in (*network.blocks, network):
        fully_shard(module, mesh=mesh.mesh, reshard_after_forward=True)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that their common norm is at most ``max_norm``; return the norm before.

    Gradients may be sharded.

    As ``torch.nn.utils.clip_grad_norm_``: a norm that is not finite makes the gradients NaN.
    Collective over the mesh.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [_plain(torch.nn.utils.get_total_norm(group)) for group in by_mesh.values()]
    norm = torch.nn.utils.get_total_norm(norms)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if grads:
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in grads], scale)
    return norm


def full_state(module_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy whole tensors to rank 0's CPU, one at a time; other ranks get an empty dict.

    Collective.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, tensor in module_tensors.items():
        gathered = _plain(tensor.detach())
        if is_main:
            whole[name] = gathered.to("cpu", copy=True)
    return whole


def _plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
