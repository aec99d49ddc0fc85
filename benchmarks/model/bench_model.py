"""The transformer: one block, the forward pass, forward and backward, against diffusers' on the
same weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from interleave import OURS, Step
from peers import SMALL, WAN_1B, Size, batch, compiled, models, without_gradient
from torch import Tensor
from workloads import COMPILED, Contest, Line, Setting, Workload

DIFFUSERS = "diffusers"
PEERS = (DIFFUSERS, COMPILED)
GOAL = 1.35


def _times(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """t and r, one per frame: 0.7 and 0.3."""
    b, frames = size.latents[:2]
    t, r = (torch.full((b, frames), time, device=device) for time in (700.0, 300.0))
    return t, r


def _block(size: Size, setting: Setting) -> Contest:
    """The first block, on the tokens and the modulation that it gets in a forward pass."""
    peer, ours = models(size, setting.device)
    generator = torch.Generator().manual_seed(0)
    b, frames, _, height, width = size.latents
    grid = (frames, height // 2, width // 2)
    shapes = ((b, size.tokens, size.dim), (b, size.text_tokens, size.dim), (b, frames, 6, size.dim))
    tokens, text, modulation = (
        torch.randn(s, generator=generator).to(setting.device, size.dtype) for s in shapes
    )
    # as diffusers' model does once per call
    per_token = modulation.repeat_interleave(size.tokens // frames, dim=1)
    layout = {
        "total_frames": frames,
        "full_frame_shape": grid[1:],
        "full_token_per_frame": grid[1] * grid[2],
    }
    peer_rotary = peer.rope(layout_cfg=layout, device=setting.device)
    rotary = ours.rope(grid, setting.device, torch.float32)

    def theirs(block: Any) -> Step:
        return without_gradient(lambda: block(tokens, text, per_token, peer_rotary, None))

    steps = {
        OURS: without_gradient(lambda: ours.blocks[0](tokens, text, modulation, rotary)),
        DIFFUSERS: theirs(peer.blocks[0]),
    }
    if setting.compile:
        steps[COMPILED] = theirs(compiled(peer.blocks[0]))
    traffic = size.block_weights() + 2 * tokens.numel()
    return Contest(steps, size.dtype.itemsize * traffic, b * size.block_flops())


def _forward(size: Size, setting: Setting) -> Contest:
    def evaluate(model: Any, *inputs: Tensor) -> Step:
        return without_gradient(lambda: model(*inputs, return_dict=False)[0])

    return _whole(size, setting, evaluate, 1)


def _forward_backward(size: Size, setting: Setting) -> Contest:
    def train(model: Any, *inputs: Tensor) -> Step:
        def step() -> tuple[Tensor, Tensor]:
            model.zero_grad(set_to_none=True)
            loss = model(*inputs, return_dict=False)[0].float().square().mean()
            loss.backward()
            return loss.detach(), model.blocks[0].attn1.to_q.weight.grad

        return step

    return _whole(size, setting, train, 3 if size is SMALL else 4)


def _whole(size: Size, setting: Setting, make: Any, passes: int) -> Contest:
    """The whole model; ``passes`` is what a step computes in forward passes: a backward is two, and
    another one where its activations are computed again.
    """
    peer, ours = models(size, setting.device)
    if passes == 4:
        peer.enable_gradient_checkpointing()
        ours.enable_gradient_checkpointing()
    data = batch(size, setting.device)
    inputs = (data.noise.to(size.dtype), *_times(size, setting.device), data.prompt)
    steps = {OURS: make(ours, *inputs), DIFFUSERS: make(peer, *inputs)}
    if setting.compile:
        steps[COMPILED] = make(compiled(peer), *inputs)
    return Contest(
        steps, passes * size.forward_bytes(), passes * size.latents[0] * size.forward_flops()
    )


def _workloads(size: Size, device: str) -> list[Workload]:
    builders = {"block": _block, "forward": _forward, "forward+backward": _forward_backward}
    goals = {"forward": GOAL, "forward+backward": GOAL} if device == "cpu" else {}
    return [
        Workload(
            f"model/{what}/{size.label}/{size.tokens} tokens",
            PEERS,
            partial(build, size),
            device,
            size.dtype,
            quick=device == "cpu",
            goals={DIFFUSERS: goals[what]} if what in goals else {},
            memory=what == "forward+backward",
        )
        for what, build in builders.items()
    ]


WORKLOADS = [*_workloads(SMALL, "cpu"), *_workloads(WAN_1B, "cuda")]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_model(workload: Workload, measured: Line) -> None:
    """A part of the transformer, or all of it."""
