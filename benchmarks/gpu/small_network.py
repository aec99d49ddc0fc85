"""Checks a small network on the kernels against the same one on the references, which operators
alone do not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.ops import use_backend

# bf16 activations against fp32 ones through three blocks: tens of roundings of 2^-9, most of which
# average out.
LIMIT = 2e-2
SAME = 1e-6
LATENTS = (5, 16, 30, 52)
TINY_LATENTS = (3, 16, 8, 12)


def checks(device: torch.device, tiny: bool) -> Iterator[tuple[str, float, partial[float]]]:
    """List names, limits and functions of the checks."""
    yield "a network, bf16 against fp32", LIMIT, partial(_forward, device, tiny, False)
    yield "a network with a time for each frame", LIMIT, partial(_forward, device, tiny, True)
    yield "gradients of a network under autocast", LIMIT, partial(_gradients, device, tiny)
    if device.type == "cuda":
        yield "a replayed CUDA graph of a network", SAME, partial(_replayed, device, tiny)


def _model(device: torch.device, dtype: torch.dtype, tiny: bool) -> AnyFlowTransformer3DModel:
    torch.manual_seed(0)
    heads, width, hidden = (2, 32, 192) if tiny else (4, 128, 1024)
    with device:
        model = AnyFlowTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=width,
            ffn_dim=hidden,
            num_layers=3,
            text_dim=256,
        )
    kept = set(AnyFlowTransformer3DModel._keep_in_fp32_modules)
    for name, parameter in model.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def _draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(
        shape, device=device, generator=torch.Generator(device).manual_seed(sum(shape))
    )


def _inputs(device: torch.device, latents: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    times = [torch.full((1,), value, device=device) for value in (700.0, 300.0)]
    return [_draw(device, 1, *latents).to(dtype), *times, _draw(device, 1, 64, 256).to(dtype)]


def _latents(tiny: bool) -> tuple[int, ...]:
    return TINY_LATENTS if tiny else LATENTS


def _forward(device: torch.device, tiny: bool, per_frame: bool) -> float:
    """Compare bf16 on the kernels with fp32 on the references."""
    model = _model(device, torch.bfloat16, tiny).requires_grad_(False)
    data = _inputs(device, _latents(tiny), torch.bfloat16)
    if per_frame:
        data[1:3] = [t[:, None].expand(1, data[0].shape[1]) for t in data[1:3]]
    with torch.no_grad():
        out = model(*data, return_dict=False)[0]
        with use_backend("eager"):
            expected = model.float()(*(t.float() for t in data), return_dict=False)[0]
    return _relative(out, expected)


def _gradients(device: torch.device, tiny: bool) -> float:
    """Compare the gradients of all parameters, those of an fp32 model under autocast, kernels
    against references.
    """
    model, data = (
        _model(device, torch.float32, tiny),
        _inputs(device, _latents(tiny), torch.float32),
    )
    cotangent, found = _draw(device, 2, *_latents(tiny))[1:], []
    for backend in (None, "eager"):
        model.zero_grad()
        with use_backend(backend):
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                out = model(*data, return_dict=False)[0]
            (out.float() * cotangent).sum().backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    return _relative(*found)


def _replayed(device: torch.device, tiny: bool) -> float:
    """Compare samples by a replayed CUDA graph, of two shapes, with those of the network itself."""
    from anyflow.models.cuda_graph import CudaGraphTransformer
    from anyflow.sampling import sample
    from anyflow.schedulers import FlowMapEulerDiscreteScheduler

    model, scheduler = (
        _model(device, torch.bfloat16, tiny).requires_grad_(False),
        FlowMapEulerDiscreteScheduler(),
    )
    replayed, errors = CudaGraphTransformer(model), []
    for frames in (5, 5, 3):
        noise, *_, prompt = _inputs(device, (frames, *_latents(tiny)[1:]), torch.bfloat16)
        results = (
            sample(m, scheduler, noise, prompt, num_inference_steps=4) for m in (replayed, model)
        )
        errors.append(_relative(*results))
    return max(errors)


def _relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()
