"""Check small networks on a device: the bidirectional model, and the causal one with its caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import networks
import torch
from sizes import CausalSize, NetworkSize
from timing import captured
from torch import Tensor

from anyflow.ops import use_backend
from gpu.outcomes import SAME, DeviceCheck, relative

# of a network, bf16 against fp32 through three blocks: most of tens of roundings average out
NETWORK_LIMIT = 2e-2
_NETWORK = NetworkSize("checked", 4, 3, 1024, text_dim=256, text_tokens=64, latents=(5, 16, 30, 52))
_TINY_NETWORK = replace(_NETWORK, heads=2, ffn_dim=192, head_dim=32, latents=(3, 16, 8, 12))
_CAUSAL = CausalSize(
    *("checked", 4, 3, 1024),
    text_dim=256,
    text_tokens=64,
    latents=(8, 16, 32, 52),
    chunk_partition=(1, 2, 2, 2, 1),
)
_TINY_CAUSAL = replace(_CAUSAL, heads=2, ffn_dim=192, head_dim=32, latents=(8, 16, 8, 12))
RECOMPUTED_LIMIT = 2e-5  # in fp32: the same sums in another order, over the steps of five chunks


def catalogue(device: torch.device, tiny: bool) -> Iterator[DeviceCheck]:
    """List the checks of both models, on the kernels against the references."""
    yield from _bidirectional(device, tiny)
    yield from _causal(device, tiny)


# The bidirectional model --------------------------------------------------------------------------


def _bidirectional(device: torch.device, tiny: bool) -> Iterator[DeviceCheck]:
    size, limit = _TINY_NETWORK if tiny else _NETWORK, NETWORK_LIMIT
    plain, framed = (
        partial(_forward_error, device, size, per_frame) for per_frame in (False, True)
    )
    yield DeviceCheck("a network, bf16 against fp32", limit, plain)
    yield DeviceCheck("a network with a time for each frame", limit, framed)
    gradients = partial(_gradient_error, device, replace(size, dtype=torch.float32))
    yield DeviceCheck("gradients of a network under autocast", limit, gradients)
    if device.type == "cuda":
        graph = partial(_graph_error, device, size)
        yield DeviceCheck("a replayed CUDA graph of a network", SAME, graph)


def _forward_error(device: torch.device, size: NetworkSize, per_frame: bool) -> float:
    """Compare bf16 on the kernels with fp32 on the references."""
    model, data = networks.ours(size, device), networks.videos(size, device)
    data = replace(data, noise=data.noise.to(size.dtype))
    exact = replace(data, noise=data.noise.float(), prompt=data.prompt.float())
    with torch.no_grad():
        out = networks.evaluation(model, size, data, per_frame)()
        fp32 = replace(size, dtype=torch.float32)
        with use_backend("eager"):
            expected = networks.evaluation(model.float(), fp32, exact, per_frame)()
    return relative(out, expected)


def _gradient_error(device: torch.device, size: NetworkSize) -> float:
    """Compare the gradients of all parameters under autocast, kernels against references."""
    model, data = networks.ours(size, device), networks.videos(size, device)
    evaluate, found = networks.evaluation(model, size, data, per_frame=False), []
    for backend in (None, "eager"):
        model.zero_grad()
        with use_backend(backend):
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                out = evaluate()
            (out.float() * data.latents).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(gradients))
    return relative(*found)


def _graph_error(device: torch.device, size: NetworkSize) -> float:
    """Compare samples by a replayed CUDA graph, of two shapes, with those of the network itself."""
    from anyflow.models.cuda_graph import CudaGraphTransformer
    from anyflow.sampling import sample
    from anyflow.schedulers import FlowMapEulerDiscreteScheduler

    model = networks.ours(size, device).requires_grad_(False)
    replayed, scheduler = CudaGraphTransformer(model), FlowMapEulerDiscreteScheduler()
    errors = []
    for frames in (5, 5, 3):
        data = networks.videos(replace(size, latents=(frames, *size.latents[1:])), device)
        noise, prompt = data.noise.to(size.dtype), data.prompt
        models = (replayed, model)
        results = (sample(m, scheduler, noise, prompt, num_inference_steps=4) for m in models)
        errors.append(relative(*results))
    return max(errors)


# The causal model ---------------------------------------------------------------------------------


def _causal(device: torch.device, tiny: bool) -> Iterator[DeviceCheck]:
    size = _TINY_CAUSAL if tiny else _CAUSAL
    exact = replace(size, dtype=torch.float32)
    for name, limit, run in (
        ("a causal network, bf16 against fp32", NETWORK_LIMIT, partial(_causal_error, size)),
        ("a causal network with caches against recomputation", RECOMPUTED_LIMIT,
         partial(_recomputed_error, exact)),
        ("gradients of a causal network under autocast", NETWORK_LIMIT,
         partial(_causal_gradient_error, exact)),
        ("caches of a causal network on the host", 0.0, partial(_host_error, size)),
    ):  # fmt: skip
        yield DeviceCheck(name, limit, partial(run, device))
    if device.type == "cuda":
        waits = partial(_waiting_error, size, device)
        yield DeviceCheck("chunks of a causal network without a wait of the host", 0.0, waits)
        graph = partial(_cached_graph_error, size, device)
        yield DeviceCheck("a replayed CUDA graph of a causal network's step", SAME, graph)


def _sample_causal(model: Any, size: CausalSize, data: networks.Videos, **options: Any) -> Tensor:
    """Sample with two steps for each chunk, and one for the first."""
    from anyflow.sampling import sample_causal
    from anyflow.schedulers import FlowMapEulerDiscreteScheduler

    steps = [1] + [2] * (len(size.chunk_partition) - 1)
    noise, scheduler = data.noise.to(size.dtype), FlowMapEulerDiscreteScheduler()
    prompt = data.prompt.to(size.dtype)
    return sample_causal(model, scheduler, noise, prompt, num_inference_steps=steps, **options)


def _causal_error(size: CausalSize, device: torch.device) -> float:
    """Compare samples in bf16 on the kernels with fp32 on the references, from the same weights."""
    model, data = networks.ours(size, device), networks.videos(size, device)
    # the same numbers for both
    data = replace(data, noise=data.noise.to(size.dtype).float())
    found = _sample_causal(model, size, data)
    with use_backend("eager"):
        exact = replace(size, dtype=torch.float32)
        return relative(found, _sample_causal(model.float(), exact, data))


def _recomputed_error(size: CausalSize, device: torch.device) -> float:
    model, data = networks.ours(size, device), networks.videos(size, device)
    cached, recomputed = (
        _sample_causal(model, size, data, use_cache=cached) for cached in (True, False)
    )
    return relative(cached, recomputed)


def _causal_gradient_error(size: CausalSize, device: torch.device) -> float:
    """Compare gradients of the training layout, kernels against references, checkpointed."""
    model, data = networks.ours(size, device), networks.videos(size, device)
    model.train().enable_gradient_checkpointing()
    full = sum(size.chunk_partition[-size.full_chunk_limit :])
    t, r = (torch.full((1,), time, device=device) for time in (networks.T, networks.R))
    clean, found = data.latents[:, -full:], []
    for backend in (None, "eager"):
        model.zero_grad()
        with use_backend(backend):
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                out = model(data.noise, t, r, data.prompt, clean_hidden_states=clean).sample
            (out.float() * clean).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(gradients))
    return relative(*found)


def _host_error(size: CausalSize, device: torch.device) -> float:
    """Return 0 if caches that wait on the host, copied ahead of their use, give the same bits."""
    model, data = networks.ours(size, device), networks.videos(size, device)
    here, there = (
        _sample_causal(model, size, data, cache_device=storage) for storage in (None, "cpu")
    )
    return float((here != there).sum())


def _waiting_error(size: CausalSize, device: torch.device) -> float:
    """Sample chunks while torch raises for every wait of the host that it knows of."""
    from anyflow.sampling import ChunkSampler
    from anyflow.schedulers import FlowMapEulerDiscreteScheduler

    model, data = networks.ours(size, device).requires_grad_(False), networks.videos(size, device)
    noise = data.noise.to(size.dtype)
    for storage in (None, "cpu"):
        for mode in ("default", "error"):  # what is compiled and tuned at first may wait
            sampler = ChunkSampler(
                *(model, FlowMapEulerDiscreteScheduler(), noise, data.prompt),
                num_inference_steps=2,
                cache_device=storage,
            )
            torch.cuda.set_sync_debug_mode(mode)
            try:
                chunks = [latents for _, latents in sampler]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            sampler.network.checked(torch.cat(chunks, dim=1))
    return 0.0


def _cached_graph_error(size: CausalSize, device: torch.device) -> float:
    """Compare the last step of a video with its CUDA graph."""
    from causal.bench_causal import last_call, sampled

    model, data = networks.ours(size, device).requires_grad_(False), networks.videos(size, device)
    step = last_call(model, sampled(model, size, data, 1))
    kept: list[Any] = []
    replay = captured(lambda: kept.append(step()))
    replay()
    torch.cuda.synchronize()
    return relative(kept[-1], step())
