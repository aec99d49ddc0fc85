"""Run the causal model on ranks that share its tokens, and write ``rank<i>.pt``.

``parallel_causal.py FOLDER``: each of four ranks runs every case on the whole model, then on its
part of it, shared by two neighbors and by all four.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.models.causal_cache import encode_chunks
from anyflow.sampling import sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

PARTITION, LIMIT = (1, 2, 1, 2), 2
Case = Callable[[AnyFlowFARTransformer3DModel, Tensor], Tensor]


def new_model() -> AnyFlowFARTransformer3DModel:
    torch.manual_seed(0)
    return AnyFlowFARTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        in_channels=3,
        out_channels=3,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
        full_chunk_limit=LIMIT,
        chunk_partition=PARTITION,
    ).double()


def latents(frames: int, height: int, width: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, frames, 3, height, width, generator=g, dtype=torch.float64)


TEXT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
TIMES = 1000 * torch.rand(2, 6, generator=torch.Generator().manual_seed(3))


def training(model: AnyFlowFARTransformer3DModel, x: Tensor) -> Tensor:
    clean = x[:, 3:] - 0.5
    return model(x, TIMES, TIMES / 2, TEXT, clean_hidden_states=clean).sample


def plain(model: AnyFlowFARTransformer3DModel, x: Tensor) -> Tensor:
    return model(x, TIMES, TIMES / 2, TEXT).sample


def all_full(model: AnyFlowFARTransformer3DModel, x: Tensor) -> Tensor:
    t = TIMES[:, 0]
    options = {"chunk_partition": (1, 2), "clean_hidden_states": x + 0.5}
    return model(x, t, t / 2, TEXT, **options).sample


def one_context(model: AnyFlowFARTransformer3DModel, x: Tensor) -> Tensor:
    """Let two rows attend to the context of the second."""
    clean = x[:, 3:] - 0.5
    options = {"clean_hidden_states": clean, "context_rows": [1, 1]}
    return model(x, TIMES, TIMES / 2, TEXT, **options).sample


def cached(model: AnyFlowFARTransformer3DModel, x: Tensor) -> Tensor:
    """Chain the chunks, with gradients through the caches too."""
    cache, done, t = model.new_cache(), {}, TIMES[:, 0]
    for chunk in range(len(PARTITION)):
        encode_chunks(model, cache, chunk, done, TEXT)
        frames = x[:, cache.partition.frames(chunk)]
        done[chunk] = frames - 0.5 * model(frames, t, t / 2, TEXT, cache=cache).sample
    return torch.cat(list(done.values()), dim=1)


# tokens of a frame: 12 and 3 compressed, but 9 where all are full; no world divides 3 or 9
CASES: dict[str, tuple[Case, Tensor]] = {
    "training": (training, latents(6, 4, 12)),
    "plain": (plain, latents(6, 4, 12)),
    "all full": (all_full, latents(3, 6, 6)),
    "one context": (one_context, latents(6, 4, 12)),
    "cached": (cached, latents(6, 4, 12)),
}


def run(model: AnyFlowFARTransformer3DModel, name: str) -> dict[str, Tensor]:
    """Return the output and the mean gradients of latents and parameters over all ranks."""
    case, x = CASES[name]
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = case(model, x)
    out.square().mean().backward()
    grads = [g for g in (x.grad, *(p.grad for p in model.parameters())) if g is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    return {"out": out.detach(), "gradient": flat / dist.get_world_size()}


def sampled(model: AnyFlowFARTransformer3DModel) -> Tensor:
    x, scheduler = latents(6, 4, 12), FlowMapEulerDiscreteScheduler(shift=5.0)
    guidance = {"guidance_scale": 2.0, "negative_prompt_embeds": -TEXT}
    return sample_causal(
        model, scheduler, x, TEXT, num_inference_steps=2, context_latents=x[:, :1], **guidance
    )


def bytes_kept(model: AnyFlowFARTransformer3DModel) -> tuple[int, int]:
    """Return the most bytes that a cache holds while chunks are encoded, and those foretold."""
    cache, x, most = model.new_cache(), latents(6, 4, 12), 0
    for chunk in range(1, len(PARTITION)):
        done = {c: x[:, cache.partition.frames(c)] for c in range(chunk)}
        with torch.no_grad():
            encode_chunks(model, cache, chunk, done, TEXT)
        most = max(most, cache.num_bytes)
    return most, model.cache_bytes(4, 12, batch_size=2, dtype=torch.float64)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=240))
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    whole = new_model()
    results: dict[Any, Any] = {("whole", name): run(whole, name) for name in CASES}
    results["whole", "sampled"], results["whole", "bytes"] = sampled(whole), bytes_kept(whole)
    for degree, group in groups.items():
        model = new_model()
        model.set_sequence_parallel(group)
        results[degree, "sampled"], results[degree, "bytes"] = sampled(model), bytes_kept(model)
        if degree == 2:
            for name in CASES:
                results[degree, name, False] = run(model, name)
        model.enable_gradient_checkpointing()
        for name in CASES:
            results[degree, name, True] = run(model, name)
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
