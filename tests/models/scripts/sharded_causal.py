"""Shard the causal model on ranks (FSDP2), train and sample with it, and compare with one process.

``sharded_causal.py``: the first rank prints the largest relative distance, on any rank, of a
velocity, of gradients, of velocities that share a context, and of a sampled video from those of the
whole model.
"""

import copy
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.sampling import sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

PARTITION = (1, 2, 1, 2)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=240))
    torch.manual_seed(0)
    model = AnyFlowFARTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        full_chunk_limit=2,
        chunk_partition=PARTITION,
    ).double()
    sharded = copy.deepcopy(model)
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)

    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 6, 4, 4, 8, generator=g, dtype=torch.float64)
    text = torch.randn(1, 5, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([800.0])
    both = torch.cat([x, torch.cat([x[:, :3], 0.5 * x[:, 3:]], dim=1)])
    clean, texts = x[:, 3:].repeat(2, 1, 1, 1, 1), text.repeat(2, 1, 1)
    times = torch.tensor([800.0, 795.0])
    velocities, gradients, shared = [], [], []
    for network in (model, sharded):
        network.enable_gradient_checkpointing()
        velocity = network(x, t, t / 2, text, clean_hidden_states=x[:, 3:]).sample
        velocity.square().mean().backward()
        velocities.append(velocity.detach())
        gradients.append([whole(p.grad) for p in network.parameters()])
        options = {"clean_hidden_states": clean, "context_rows": [0, 0]}
        shared.append(network(both, times, times / 2, texts, **options).sample.detach())
    videos = [
        sample_causal(network, FlowMapEulerDiscreteScheduler(), x, text, num_inference_steps=2)
        for network in (model, sharded)
    ]
    distances = [
        relative(velocities[1], velocities[0]),
        relative(shared[1], shared[0]),
        max(relative(b, a) for a, b in zip(*gradients, strict=True) if bool(a.any())),
        relative(videos[1], videos[0]),
    ]
    largest = torch.tensor(max(distances))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print("distance", largest.item(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
