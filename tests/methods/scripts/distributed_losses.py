"""Take losses on two ranks, and write what each rank saw to ``rank<i>.pt``."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    OnPolicyConfig,
    PretrainConfig,
    TimePairs,
    sample_time_pairs,
)
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

WORLD, BATCH = 2, 3  # BATCH samples on each rank
T = torch.tensor([0.9, 0.8, 0.6, 0.7, 0.5, 0.95])
R = torch.tensor([0.1, 0.3, 0.0, 0.2, 0.4, 0.6])
KINDS = {  # which samples are diffusion, rank 0's first
    "mixed": [True, False, False, True, True, False],
    "one_rank_without": [True, True, True, False, False, False],
    "none": [False] * 6,
    "all": [True] * 6,
}


def model(dtype: torch.dtype = torch.float64) -> AnyFlowTransformer3DModel:
    torch.manual_seed(0)
    return AnyFlowTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3,
        out_channels=3,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=8,
    ).to(dtype)


def data() -> dict[str, Tensor]:
    """Draw the global batch."""
    g = torch.Generator().manual_seed(1)
    sizes = {
        "latents": (6, 2, 3, 4, 4),
        "noise": (6, 2, 3, 4, 4),
        "prompt": (6, 5, 8),
        "negative": (1, 5, 8),
    }
    return {
        name: torch.randn(size, generator=g, dtype=torch.float64) for name, size in sizes.items()
    }


def pretrain(student: Any, kinds: str, guidance: float, samples: slice) -> dict[str, Any]:
    """Return loss, metrics, gradients averaged over ranks and the network calls on some samples."""
    student.zero_grad()  # before the forward, during which FSDP puts other parameters in place
    calls = []
    handle = student.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    dtype = next(student.parameters()).dtype
    batch = {
        name: x.to(dtype) if name == "negative" else x[samples].to(dtype)
        for name, x in data().items()
    }
    diffusion = torch.tensor(KINDS[kinds])
    pairs = TimePairs(T[samples], torch.where(diffusion, T, R)[samples], diffusion[samples])
    method = AnyFlowPretrainMethod(
        student,
        FlowMapEulerDiscreteScheduler(shift=3.0),
        PretrainConfig(fuse_guidance_scale=guidance),
    )
    output = method.loss(
        batch["latents"], batch["prompt"], batch["negative"], noise=batch["noise"], time_pairs=pairs
    )
    output.loss.backward()
    handle.remove()
    gradients = []
    for p in student.parameters():
        assert p.grad is not None
        if isinstance(p.grad, DTensor):
            gradients.append(p.grad.full_tensor().flatten())
        else:
            gradients.append(mean_over_ranks(p.grad).flatten())
    return {
        "loss": mean_over_ranks(output.loss.detach()).item(),
        "own_loss": output.loss.item(),
        "loss_diffusion": output.metrics["loss_diffusion"].item(),
        "gradient": torch.cat(gradients),
        "calls": calls,
    }


def mean_over_ranks(x: Tensor) -> Tensor:
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / WORLD


def draws(rank: int) -> dict[str, Any]:
    """Draw everything that must agree, from generators that do not."""
    student = model()
    g = torch.Generator().manual_seed(100 + rank)
    scheduler = FlowMapEulerDiscreteScheduler(shift=3.0)
    on_policy = AnyFlowOnPolicyMethod(
        student, student, student, scheduler, OnPolicyConfig(num_steps=(1, 2, 4, 8))
    )
    batch = data()
    latents, prompt = batch["latents"][:1], batch["prompt"][:1]
    timesteps: list[Tensor] = []
    handle = student.register_forward_pre_hook(
        lambda m, a, kw: timesteps.append(kw["timestep"]), with_kwargs=True
    )

    results: dict[str, Any] = {"own": torch.rand(1, generator=g).item()}
    results["draws"] = [tuple(on_policy.draw_rollout(g)) for _ in range(20)]
    rollouts = []
    for _ in range(8):
        timesteps.clear()
        with torch.no_grad():
            on_policy.rollout(batch["noise"][:1], prompt, num_steps=4, generator=g)
        rollouts.append([t[0].item() for t in timesteps])
    results["rollouts"] = rollouts

    config = PretrainConfig(fuse_guidance_scale=1.0, i2v_prob=0.5)
    method = AnyFlowPretrainMethod(student, scheduler, config)
    coins, times = [], []
    for step in range(16):
        timesteps.clear()
        method.loss(latents, prompt, generator=g, offset=step)
        coins.append(timesteps[-1].ndim == 2)
        times.append(timesteps[-1].max().item())
    results["image_to_video"], results["times"] = coins, times
    handle.remove()

    results["kinds"] = [
        sample_time_pairs(
            1, rank=rank, world_size=WORLD, generator=g, offset=step
        ).is_diffusion.item()
        for step in range(4)
    ]
    return results


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    cases = [(kinds, guidance) for kinds in KINDS for guidance in (1.0, 3.0)]
    results: dict[str, Any] = {
        "expected": {case: pretrain(model(), *case, slice(None)) for case in cases}
    }
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))  # a deadlock becomes an error
    rank = dist.get_rank()
    own = slice(rank * BATCH, (rank + 1) * BATCH)
    results["got"] = {case: pretrain(model(), *case, own) for case in cases}
    results["draws"] = draws(rank)
    sharded = model()
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    results["sharded"] = {case: pretrain(sharded, *case, own) for case in cases}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
