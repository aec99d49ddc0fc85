"""Time the transformer against diffusers' on the same weights: one block, forward, and backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import networks
import roofline
import torch
from networks import without_gradient
from sizes import PUBLISHED, SMALL, NetworkSize
from timing import OURS, Step
from torch import Tensor
from workloads import Contest, Line, Place, Workload

from anyflow.models import attention_report

DIFFUSERS, COMPILED = "diffusers", "diffusers + compile"


def block(size: NetworkSize, place: Place) -> Contest:
    """Build the first block, on the tokens and the modulation that it gets in a forward pass."""
    ours = networks.ours(size, place.device)
    peer = networks.peer(size, ours)
    generator = torch.Generator().manual_seed(0)
    frames, b = size.frames, size.batch
    shapes = ((b, size.tokens, size.dim), (b, size.text_tokens, size.dim), (b, frames, 6, size.dim))
    tokens, text, modulation = (
        torch.randn(s, generator=generator).to(place.device, size.dtype) for s in shapes
    )
    # as diffusers' model does once per call
    per_token = modulation.repeat_interleave(size.tokens // frames, dim=1)
    patches = size.grid[1] * size.grid[2]
    layout = {
        "total_frames": frames,
        "full_frame_shape": size.grid[1:],
        "full_token_per_frame": patches,
    }
    peer_rotary = peer.rope(layout_cfg=layout, device=place.device)
    rotary = ours.rope(size.grid, place.device, torch.float32)

    def theirs(compiler: str | None = None) -> Step:
        first = networks.variant(peer, compiler).blocks[0]
        return without_gradient(lambda: first(tokens, text, per_token, peer_rotary, None))

    makers = {
        OURS: lambda: without_gradient(lambda: ours.blocks[0](tokens, text, modulation, rotary)),
        DIFFUSERS: theirs,
        COMPILED: partial(theirs, place.compiler),
    }
    work = roofline.total(roofline.block(size)).times(b)
    return Contest(makers, work.bytes, work.flops)


def attention_choices(size: NetworkSize, device: torch.device) -> tuple[str, str]:
    """Return the backend that our model runs, and the one that torch's own attention takes."""
    report = attention_report(device, dtype=size.dtype, head_dim=size.head_dim)
    chosen = next((name for name, choice in report.items() if choice.chosen), "none")
    probe = torch.zeros(1, size.heads, 64, size.head_dim, device=device, dtype=size.dtype)
    default = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(probe, probe, probe))
    return chosen, default.name.removesuffix("_ATTENTION").lower()


def forward(size: NetworkSize, place: Place) -> Contest:
    """Build one evaluation of the whole model."""
    ours, data = networks.ours(size, place.device), networks.videos(size, place.device)
    peers: list[Any] = []  # diffusers' model, made when the first peer is

    def theirs(compiler: str | None = None) -> Step:
        peers[:] = peers or [networks.peer(size, ours)]
        model = networks.variant(peers[0], compiler)
        return without_gradient(networks.evaluation(model, size, data, per_frame=True))

    makers = {
        OURS: lambda: without_gradient(networks.evaluation(ours, size, data, per_frame=False)),
        DIFFUSERS: theirs,
        COMPILED: partial(theirs, place.compiler),
    }
    work = roofline.work(size, size.batch)
    return Contest(makers, work.bytes, work.flops)


def forward_backward(size: NetworkSize, place: Place) -> Contest:
    """Build an evaluation with its gradients, on a GPU with every block checkpointed."""
    checkpointed = place.device.type == "cuda"
    ours, data = networks.ours(size, place.device), networks.videos(size, place.device)
    peer = networks.peer(size, ours)

    def train(model: Any, per_frame: bool) -> Step:
        if checkpointed:
            model.enable_gradient_checkpointing()
        evaluate = networks.evaluation(model.train(), size, data, per_frame)

        def step() -> tuple[Tensor, Tensor]:
            model.zero_grad(set_to_none=True)
            loss = evaluate().float().square().mean()
            loss.backward()
            return loss.detach(), model.blocks[0].attn1.to_q.weight.grad

        return step

    def theirs(compiler: str | None = None) -> Step:
        return train(networks.variant(peer, compiler), per_frame=True)

    makers = {
        OURS: lambda: train(ours, per_frame=False),
        DIFFUSERS: theirs,
        COMPILED: partial(theirs, place.compiler),
    }
    # a backward is two forwards, and another one where activations are computed again
    work = roofline.work(size, size.batch * (4 if checkpointed else 3))
    return Contest(makers, work.bytes, work.flops)


def _workloads(size: NetworkSize, device: str) -> list[Workload]:
    builders = {"block": block, "forward": forward, "forward+backward": forward_backward}
    return [
        Workload(
            f"model/{what}/{size.name}/{size.tokens} tokens",
            (DIFFUSERS, COMPILED),
            partial(build, size),
            device,
            size.dtype,
            quick=device == "cpu",
            memory=what == "forward+backward",
        )
        for what, build in builders.items()
    ]


WORKLOADS = [*_workloads(SMALL, "cpu"), *_workloads(PUBLISHED["1.3B"], "cuda")]


def bench_model(workload: Workload, measured: Line) -> None:
    """Time a part of the transformer, or all of it."""
