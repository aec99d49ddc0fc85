"""Update on one global batch in the layouts of a world: ``layout_updates.py FOLDER PORT...``.

Every rank writes ``rank<i>-of-<n>.pt``. :func:`updates` with all samples in one micro-step of one
process is the reference.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow.data import SyntheticVideos, TrainingData
from anyflow.data.sample import Batch
from anyflow.methods import CausalConfig, OnPolicyConfig, PretrainConfig
from anyflow.training.config import (
    ArchitectureConfig,
    CausalSettings,
    DataConfig,
    EMAConfig,
    NetworkConfig,
    OnPolicyStageConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    WeightsConfig,
)
from anyflow.training.distributed import Mesh, full_state, setup, shard_network, teardown
from anyflow.training.networks import build_critic, build_student, build_teacher
from anyflow.training.updates import OnPolicyUpdates, PretrainUpdates
from anyflow.training.window import Window

GLOBAL_BATCH, UPDATES = 8, 3
LAYOUTS = {  # by the number of processes: the mesh, and samples in a micro-step
    1: {"8": (ParallelConfig(), 8), "2": (ParallelConfig(), 2), "1": (ParallelConfig(), 1)},
    2: {"fsdp2": (ParallelConfig(), 1), "sequence2": (ParallelConfig(sequence=2), 1)},
    4: {"replicate2_sequence2": (ParallelConfig(replicate=2, shard=1, sequence=2), 2)},
    8: {"sequence8": (ParallelConfig(sequence=8), 1)},  # run by hand: it needs as many cores
}
# image-to-video and dropped prompts in some updates; without flow matching; the causal model in
# both stages, in stage 1 with the bidirectional loss in one of two updates
CASES = {
    "pretrain": PretrainConfig(prompt_dropout=0.5, i2v_prob=0.5),
    "few_diffusion": PretrainConfig(diffusion_ratio=0.2, fuse_guidance_scale=1.0),
    "no_diffusion": PretrainConfig(diffusion_ratio=0.0, fuse_guidance_scale=1.0),
    "on_policy": PretrainConfig(i2v_prob=0.5, epsilon=20.0),
    "causal_pretrain": PretrainConfig(
        prompt_dropout=0.5, causal=CausalConfig(bidirectional_prob=0.7, long_context_ratio=0.9)
    ),
    "causal_on_policy": PretrainConfig(epsilon=20.0, causal=CausalConfig(bidirectional_prob=0.0)),
}
ON_RANKS = ("pretrain", "on_policy", "causal_pretrain", "causal_on_policy")
# with 9 tokens in a frame, and one in a compressed frame
CAUSAL = CausalSettings((1, 6, 6), full_chunk_limit=2, chunk_partition=(1, 1, 2))
# below the norms, so that every update is clipped
OPTIMIZER = OptimizerConfig(lr=1e-2, clip_norm=0.05)


def make_recipe(case: str, parallel: ParallelConfig, batch_size: int, accumulation: int) -> Recipe:
    sizes = ArchitectureConfig(
        num_attention_heads=8,
        attention_head_dim=6,
        in_channels=8,
        out_channels=8,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=8,
    )
    causal, stage_2 = case.startswith("causal"), case.endswith("on_policy")
    rollouts = OnPolicyConfig(
        cotrain_pretrain=True, num_steps=(2, 4), causal=CausalConfig() if causal else None
    )
    on_policy = OnPolicyStageConfig(
        teacher=WeightsConfig(architecture=sizes, seed=1),
        method=rollouts,
        critic_optimizer=OPTIMIZER,
    )
    return Recipe(
        stage="on_policy" if stage_2 else "pretrain",
        out="unused",
        student=NetworkConfig(architecture=sizes, causal=CAUSAL if causal else None),
        data=DataConfig(kind="synthetic", batch_size=batch_size),
        pretrain=CASES[case],
        on_policy=on_policy if stage_2 else None,
        optimizer=OPTIMIZER,
        ema=EMAConfig(decay=0.9, start_step=1),
        parallel=parallel,
        gradient_accumulation=accumulation,
        precision="fp32",
        activation_checkpointing=causal,
        device="cpu",
    )


def make_step(recipe: Recipe, mesh: Mesh) -> PretrainUpdates | OnPolicyUpdates:
    """Build the step in fp64."""
    negative = SyntheticVideos().negative_prompt_embeds.double()
    student = build_student(recipe).double()
    shard_network(student, mesh, trains=True)
    if recipe.on_policy is None:
        return PretrainUpdates(recipe, mesh, student, negative)
    teacher = build_teacher(recipe).double()
    critic = build_critic(recipe, teacher)
    shard_network(teacher, mesh, trains=False)
    shard_network(critic, mesh, trains=True)
    return OnPolicyUpdates(recipe, mesh, student, teacher, critic, negative)


def updates(case: str, mesh: Mesh, parallel: ParallelConfig, batch_size: int) -> dict[str, Any]:
    """Return all metrics of the updates, and all that a checkpoint would hold after them."""
    causal = case.startswith("causal")
    batch_size = max(batch_size, 2) if causal else batch_size  # many calls: fewer micro-steps
    accumulation = GLOBAL_BATCH // (batch_size * mesh.data_world)
    step = make_step(make_recipe(case, parallel, batch_size, accumulation), mesh)
    calls: list[bool] = []
    step.student.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    data = TrainingData(
        SyntheticVideos(),
        batch_size=batch_size,
        data_rank=mesh.data_rank,
        data_world=mesh.data_world,
        seed=3,
    )
    metrics = []
    for index in range(2 if causal else UPDATES):
        batches = [_double(next(data)) for _ in range(accumulation)]
        window = Window(mesh.device)
        window.add(step.update(batches, index))
        metrics.append(window.take())
    return {"metrics": metrics, "tensors": full_state(step.tensors()), "calls": calls}


def _double(batch: Batch) -> Batch:
    return Batch(batch.latents.double(), batch.prompt_embeds.double(), batch.index)


def main(folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    results: dict[str, dict[str, Any]] = {}
    for (name, (parallel, batch_size)), port in zip(LAYOUTS[world].items(), ports, strict=True):
        os.environ.update(MASTER_PORT=port)
        mesh = setup(parallel, "cpu")
        results[name] = {case: updates(case, mesh, parallel, batch_size) for case in ON_RANKS}
        teardown(mesh)
    torch.save(results, folder / f"rank{mesh.rank}-of-{world}.pt")


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Assert equality up to rounding in fp64."""
    for a, b in zip(got["metrics"], want["metrics"], strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert abs(a[name] - value) <= 1e-9 * abs(value), (name, a[name], value)
    tensors: dict[str, Tensor] = got["tensors"]
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, want["tensors"][name], rtol=1e-9, atol=1e-11, msg=name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
