"""Make two updates of both stages: ``parallel_updates.py FOLDER PORT...`` writes ``rank<i>.pt``.

Every data rank takes its part of a global batch, on one mesh after another. Each mesh has a port to
meet at: a store remembers those who met before.

:func:`run_cases` with the mesh of one process makes the same updates on the global batch. With
samples drawn inside a loss it makes each data rank's draws in turn.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from tiny import tiny_model
from torch import Tensor

from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    OnPolicyConfig,
    PretrainConfig,
    TimePairs,
    sample_time_pairs,
)
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.sampling import sample
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.training.config import ParallelConfig
from anyflow.training.distributed import (
    Mesh,
    clip_gradients,
    full_state,
    setup,
    shard_network,
    teardown,
)
from anyflow.utils.rng import rand, randn_like

GLOBAL_BATCH, STEPS, FRAMES, SIZE = 4, 2, 3, 6  # 9 tokens a frame: no degree divides them
WORLD = 4
MESHES = {
    "fsdp4": ParallelConfig(),
    "hsdp2x2": ParallelConfig(replicate=2),
    "shard2_sequence2": ParallelConfig(sequence=2),
    "replicate2_sequence2": ParallelConfig(replicate=2, shard=1, sequence=2),
    "sequence4": ParallelConfig(sequence=4),
}
DATA_WORLDS = {name: WORLD // parallel.sequence for name, parallel in MESHES.items()}
# LoRA, checkpointing, and [B, F] timesteps (image-to-video) or [B]; opposites stand side by side.
OPPOSITES = (("---", "LCF"), ("--F", "LC-"), ("-C-", "L-F"), ("-CF", "L--"))
# Each mesh has each option on and off in both stages; each variant runs in both, on some mesh.
# A case names the stage, the variant, and the number of data ranks if the reference must know it.
Case = tuple[str, str, int]
CASES: dict[str, list[Case]] = {
    name: [("pretrain", variant, 1) for variant in OPPOSITES[i % 4]]
    + [("on_policy", variant, DATA_WORLDS[name]) for variant in OPPOSITES[(i + 1) % 4]]
    for i, name in enumerate(MESHES)
}
CLIP = 0.05  # well below the norms, so that every update is clipped


def network(seed: int, variant: str = "---") -> AnyFlowTransformer3DModel:
    model = tiny_model(seed)
    if "L" in variant:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["attn1.to_q", "ffn.net.2"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros would give lora_A no gradient
                torch.nn.init.normal_(parameter, std=0.1)
        model.condition_embedder.time_embedder.requires_grad_(True)
    if "C" in variant:
        model.enable_gradient_checkpointing()
    return model.double()


def data() -> dict[str, Tensor]:
    """Draw the global batch."""
    g = torch.Generator().manual_seed(1)
    video, text = (GLOBAL_BATCH, FRAMES, 3, SIZE, SIZE), (GLOBAL_BATCH, 5, 8)
    shapes = {
        "latents": video,
        "noise": video,
        "prompt": text,
        "data_prompt": text,
        "negative": (1, 5, 8),
    }
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()
    }


def generator(step: int, data_rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 * step + data_rank)


def own(batch: dict[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    size = GLOBAL_BATCH // mesh.data_world
    picked = slice(mesh.data_rank * size, (mesh.data_rank + 1) * size)
    return {name: x if name == "negative" else x[picked] for name, x in batch.items()}


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def update(loss: Tensor, model: torch.nn.Module, adamw: torch.optim.Optimizer) -> float:
    loss.backward()
    norm = clip_gradients(model.parameters(), CLIP).item()
    adamw.step()
    adamw.zero_grad()
    return norm


def mean(loss: Tensor, mesh: Mesh) -> float:
    """Average over the data ranks."""
    loss = loss.detach().clone()
    if mesh.data_group is not None:
        dist.all_reduce(loss, group=mesh.data_group)
    return loss.item() / mesh.data_world


def trained(model: torch.nn.Module) -> dict[str, Tensor]:
    return full_state({name: p for name, p in model.named_parameters() if p.requires_grad})


def pretrain(mesh: Mesh, variant: str) -> dict[str, Any]:
    """Train with explicit times, of another kind on every rank."""
    student = network(0, variant)
    shard_network(student, mesh, trains=True)
    calls: list[bool] = []
    student.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    adamw = optimizer(student)
    config = PretrainConfig(
        fuse_guidance_scale=1.0 if "L" in variant else 3.0, i2v_prob=float("F" in variant)
    )
    scheduler = FlowMapEulerDiscreteScheduler(shift=3.0)
    method = AnyFlowPretrainMethod(student, scheduler, config, process_group=mesh.data_group)
    t, r = torch.tensor([0.9, 0.7, 0.6, 0.8]), torch.tensor([0.9, 0.0, 0.2, 0.8])
    batch = own({**data(), "t": t, "r": r}, mesh)
    pairs = TimePairs(batch["t"], batch["r"], batch["t"] == batch["r"])
    results: dict[str, Any] = {"losses": [], "norms": [], "own": []}
    for _ in range(STEPS):
        output = method.loss(
            batch["latents"],
            batch["prompt"],
            batch["negative"],
            noise=batch["noise"],
            time_pairs=pairs,
        )
        results["own"].append(output.loss.item())
        results["losses"].append(mean(output.loss, mesh))
        results["norms"].append(update(output.loss, student, adamw))
    return {**results, "parameters": trained(student), "calls": calls}


def on_policy(mesh: Mesh, variant: str, data_worlds: int) -> dict[str, Any]:
    """Train the student with co-training, then the critic, on the draws of the data ranks."""
    student, critic, teacher = network(0, variant), network(1, variant), network(2)
    calls: list[tuple[str, bool]] = []
    for name, model in (("student", student), ("teacher", teacher), ("critic", critic)):
        shard_network(model, mesh, trains=name != "teacher")
        model.register_forward_pre_hook(
            lambda *_, name=name: calls.append((name, torch.is_grad_enabled()))
        )
    config = OnPolicyConfig(num_steps=(4,), cotrain_pretrain=True)
    pretrain = PretrainConfig(i2v_prob=float("F" in variant), epsilon=20.0)
    scheduler = FlowMapEulerDiscreteScheduler(shift=3.0)
    method = AnyFlowOnPolicyMethod(
        student,
        teacher,
        critic,
        scheduler,
        config,
        pretrain=pretrain,
        process_group=mesh.data_group,
    )
    networks = {"student": (student, optimizer(student)), "critic": (critic, optimizer(critic))}
    batch = own(data(), mesh)
    results: dict[str, Any] = {"losses": [], "norms": [], "own": []}
    for step in range(STEPS):
        for name, (model, adamw) in networks.items():
            if mesh.world_size == 1:
                loss = reference_loss(method, name, batch, step, data_worlds)
            elif name == "student":
                loss = method.student_loss(
                    batch["noise"],
                    batch["prompt"],
                    batch["negative"],
                    latents=batch["latents"],
                    data_prompt_embeds=batch["data_prompt"],
                    generator=generator(step, mesh.data_rank),
                    offset=step,
                ).loss
            else:
                g = generator(step + 50, mesh.data_rank)
                with torch.no_grad():
                    num_steps, grad_step = method.draw_rollout(g)
                    samples = method.rollout(
                        batch["noise"], batch["prompt"], num_steps=num_steps, grad_step=grad_step
                    )
                loss = method.critic_loss(samples, batch["prompt"], generator=g).loss
            results["own"].append(loss.item())
            results["losses"].append(mean(loss, mesh))
            results["norms"].append(update(loss, model, adamw))
    parameters = {
        f"{name}/{key}": x for name, (m, _) in networks.items() for key, x in trained(m).items()
    }
    return {**results, "parameters": parameters, "calls": calls}


def reference_loss(
    method: AnyFlowOnPolicyMethod, name: str, batch: dict[str, Tensor], step: int, data_worlds: int
) -> Tensor:
    """Take the loss of the global batch, with each data rank's draws in the order of the losses."""
    generators = [
        generator(step + (0 if name == "student" else 50), rank) for rank in range(data_worlds)
    ]
    parts = [x.chunk(data_worlds) for x in (batch["noise"], batch["latents"])]
    num_steps, grad_step = method.draw_rollout(generators[0])
    for g in generators[1:]:
        rand((2,), g)
    with torch.set_grad_enabled(name == "student"):
        samples = method.rollout(
            batch["noise"], batch["prompt"], num_steps=num_steps, grad_step=grad_step
        )
    if name == "critic":
        t = torch.cat(
            [randn_like(x[:, 0, 0, 0, 0], g) for x, g in zip(parts[0], generators, strict=True)]
        ).sigmoid()
        noise = torch.cat([randn_like(x, g) for x, g in zip(parts[0], generators, strict=True)])
        return method.critic_loss(samples, batch["prompt"], t=t, noise=noise).loss
    t = torch.cat([rand((len(x),), g) for x, g in zip(parts[0], generators, strict=True)])
    noise = torch.cat([randn_like(x, g) for x, g in zip(parts[0], generators, strict=True)])
    loss = method.generator_loss(samples, batch["prompt"], batch["negative"], t=t, noise=noise).loss
    noise = torch.cat([randn_like(x, g) for x, g in zip(parts[1], generators, strict=True)])
    size = GLOBAL_BATCH // data_worlds
    drawn = [
        sample_time_pairs(size, rank=rank, world_size=data_worlds, generator=g, offset=step)
        for rank, g in enumerate(generators)
    ]
    pairs = TimePairs(
        *(torch.cat([getattr(p, field) for p in drawn]) for field in ("t", "r", "is_diffusion"))
    )
    assert method.pretrain is not None
    pretrained = method.pretrain.loss(
        batch["latents"], batch["data_prompt"], batch["negative"], noise=noise, time_pairs=pairs
    )
    return loss + pretrained.loss


def sampled(mesh: Mesh) -> dict[str, Any]:
    """Sample first thing after sharding; return the buffer that no checkpoint holds, too."""
    model = network(0)
    shard_network(model, mesh, trains=False)
    batch = data()
    latents = sample(
        model, FlowMapEulerDiscreteScheduler(shift=3.0), batch["noise"], batch["prompt"]
    )
    gate = model.condition_embedder.delta_emb_gate
    return {
        "latents": latents,
        "gate": gate.clone(),
        "sharded": [type(p).__name__ == "DTensor" for p in model.parameters()],
    }


def run_cases(mesh: Mesh, cases: Iterable[Case]) -> dict[str | Case, Any]:
    """Sample, then make the updates of every case."""
    found: dict[str | Case, Any] = {"sample": sampled(mesh)}
    for stage, variant, data_worlds in cases:
        pretrains = stage == "pretrain"
        found[stage, variant, data_worlds] = (
            pretrain(mesh, variant) if pretrains else on_policy(mesh, variant, data_worlds)
        )
    return found


def main(folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    written = {}
    for (name, parallel), port in zip(MESHES.items(), ports, strict=True):
        os.environ.update(MASTER_PORT=port)
        mesh = setup(parallel, "cpu")
        place = {k: getattr(mesh, k) for k in PLACE}
        written[name] = {"mesh": place, **run_cases(mesh, CASES[name])}
        teardown(mesh)
    torch.save(written, folder / f"rank{mesh.rank}.pt")


PLACE = ("rank", "world_size", "data_rank", "data_world", "sequence_degree", "is_main")

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
