"""The operators at the shapes of the 1.3B and 14B models, with the bytes that each must move.

The byte counts are lower bounds: every tensor of the size of the activations read once or written once, plus the
modulation rows and tables. A kernel at the bandwidth of a copy takes exactly that long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow import ops

TOKENS = 32760  # 480 x 832 pixels, 81 frames: 21 latent frames of 30 x 52 patches
LATENTS = (21, 16, 60, 104)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Call:
    """``function(*inputs)``; gradients are taken of ``wanted``, which are among the inputs."""

    function: Callable[..., Any]
    inputs: Sequence[Any]
    wanted: Sequence[Tensor]
    training: bool = False  # its forward computes the gradient too, so that without gradients it is another kernel

    def outputs(self) -> tuple[Tensor, ...]:
        """Run forward."""
        result = self.function(*self.inputs)
        return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Case:
    """An operator at one shape.

    Attributes:
        op: operator.
        variant: which of its forms.
        tokens, dim, rows: L, D and R; for the flow-map operators B, numel of a sample and the rows with r != t.
        build: makes the inputs on a device, in the dtype of the model unless told otherwise.
        forward_bytes: bytes that forward must move.
        backward_bytes: bytes that backward must move.
    """

    op: str
    variant: str
    tokens: int
    dim: int
    rows: int
    build: Callable[..., Call]
    forward_bytes: int
    backward_bytes: int

    @property
    def name(self) -> str:
        """Unique name: operator, variant and shape."""
        return f"{self.op}[{self.variant}] L={self.tokens} D={self.dim} R={self.rows}"


def _leaf(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()


def row_cases(tokens: int, dim: int, rows: int) -> list[Case]:
    """The operators on ``[1, L, D]`` tokens with ``[1, R, D]`` modulation."""
    heads = max(dim // 128, 1)
    pass_, row = tokens * dim * DTYPE.itemsize, rows * dim * 4

    def case(op: str, variant: str, build: Callable[..., Call], forward: int, backward: int) -> Case:
        return Case(op, variant, tokens, dim, rows, build, forward, backward)

    def modulated(device: torch.device, dtype: torch.dtype = DTYPE) -> Call:
        inputs = [_leaf(device, 1, tokens, dim, dtype=dtype), *(_leaf(device, 1, rows, dim) for _ in range(2))]
        return Call(ops.layer_norm_modulate, inputs, inputs)

    def gated_affine(device: torch.device, dtype: torch.dtype = DTYPE) -> Call:
        x, y = (_leaf(device, 1, tokens, dim, dtype=dtype) for _ in range(2))
        gate, weight, bias = _leaf(device, 1, rows, dim), _leaf(device, dim), _leaf(device, dim)
        inputs = [x, y, gate, weight, bias]
        return Call(lambda x, y, g, w, b: ops.residual_layer_norm(x, y, g, weight=w, bias=b), inputs, inputs)

    def residual_modulated(device: torch.device, dtype: torch.dtype = DTYPE) -> Call:
        x, y = (_leaf(device, 1, tokens, dim, dtype=dtype) for _ in range(2))
        inputs = [x, y, *(_leaf(device, 1, rows, dim) for _ in range(2))]
        return Call(lambda x, y, s, c: ops.residual_layer_norm(x, y, shift=s, scale=c), inputs, inputs)

    def gated(device: torch.device, dtype: torch.dtype = DTYPE) -> Call:
        inputs = [*(_leaf(device, 1, tokens, dim, dtype=dtype) for _ in range(2)), _leaf(device, 1, rows, dim)]
        return Call(ops.gated_residual, inputs, inputs)

    def rotary(device: torch.device, dtype: torch.dtype = DTYPE) -> Call:
        x, weight = _leaf(device, 1, tokens, dim, dtype=dtype), _leaf(device, dim)
        angle = _leaf(device, tokens, dim // heads // 2).detach()
        function = lambda x, w, c, s: ops.rms_norm_rope(x, w, c, s, num_heads=heads)  # noqa: E731
        return Call(function, [x, weight, angle.cos(), angle.sin()], [x, weight])

    tables = 2 * tokens * (dim // heads // 2) * 4
    return [
        case("layer_norm_modulate", "bf16", modulated, 2 * pass_ + 2 * row, 3 * pass_ + 3 * row),
        case("residual_layer_norm", "gate+affine", gated_affine, 4 * pass_ + row, 6 * pass_ + 2 * row),
        case("residual_layer_norm", "modulation", residual_modulated, 4 * pass_ + 2 * row, 4 * pass_ + 3 * row),
        case("gated_residual", "bf16", gated, 3 * pass_ + row, 3 * pass_ + 2 * row),
        case("rms_norm_rope", "rotary", rotary, 2 * pass_ + tables, 3 * pass_ + tables),
    ]


def embedding_case(rows: int, dim: int) -> Case:
    """dual_timestep_embedding: far too small for a bandwidth, listed for its launch overhead."""

    def build(device: torch.device, dtype: torch.dtype = DTYPE) -> Call:
        inputs = [_leaf(device, rows, dim, dtype=dtype) for _ in range(2)]
        gate = torch.tensor(0.25, device=device)
        return Call(lambda t, r: ops.dual_timestep_embedding(t, r, gate), inputs, inputs)

    size = rows * dim * DTYPE.itemsize
    return Case("dual_timestep_embedding", "gated", rows, dim, rows, build, 4 * size, 6 * size)


def gelu_case(tokens: int, dim: int) -> Case:
    """The tanh-GELU of a feed-forward layer on ``[1, L, D]``; native on the CPU, torch's elsewhere."""

    def build(device: torch.device, dtype: torch.dtype = DTYPE) -> Call:
        inputs = [_leaf(device, 1, tokens, dim, dtype=dtype)]
        return Call(ops.gelu, inputs, inputs)

    pass_ = tokens * dim * DTYPE.itemsize
    return Case("gelu", "tanh", tokens, dim, 1, build, 2 * pass_, 3 * pass_)


def attention_case(tokens: int, dim: int, head_dim: int) -> Case:
    """Self-attention over ``[1, L, H, Dh]``, native on the CPU; bytes are not what it is bound by."""

    def build(device: torch.device, dtype: torch.dtype = DTYPE) -> Call:
        inputs = [_leaf(device, 1, tokens, dim // head_dim, head_dim, dtype=dtype) for _ in range(3)]
        return Call(ops.attention, inputs, inputs)

    pass_ = tokens * dim * DTYPE.itemsize
    return Case("attention", f"Dh={head_dim}", tokens, dim, 1, build, 4 * pass_, 8 * pass_)


def flow_map_cases(batch: int, latents: tuple[int, ...]) -> list[Case]:
    """The two operators of the pretrain loss on ``[B, F, C, H, W]`` in fp32, half of the samples with r != t."""
    shape, rows = (batch, *latents), batch // 2
    size = torch.Size(latents).numel()

    def times(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.linspace(0.2, 0.9, batch, device=device)
        return t, t * 0.5, torch.arange(rows, device=device)

    def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> Call:
        t, _, index = times(device)
        latents, noise = _leaf(device, *shape, dtype=dtype), _leaf(device, *shape, dtype=dtype)
        function = lambda x, e: ops.flow_map_inputs(x, e, t, 0.005, index)  # noqa: E731
        return Call(function, [latents, noise], [latents, noise])

    def loss(device: torch.device, dtype: torch.dtype = torch.float32) -> Call:
        t, r, index = times(device)
        pred, uncond, latents, noise = (_leaf(device, *shape, dtype=dtype) for _ in range(4))
        plus, minus = (_leaf(device, rows, *shape[1:], dtype=dtype) for _ in range(2))
        function = lambda p: ops.flow_map_loss(  # noqa: E731
            p, uncond, plus, minus, latents, noise, t, r, torch.ones_like(t), 3.0, 0.01, rows=index
        )
        return Call(function, [pred], [pred], training=True)

    whole, part = batch * size * 4, rows * size * 4
    return [
        Case("flow_map_inputs", "fp32", batch, size, rows, inputs, 3 * whole + 2 * part, 3 * whole + 2 * part),
        Case("flow_map_loss", "fp32", batch, size, rows, loss, 5 * whole + 2 * part, 2 * whole),
    ]


def model_cases() -> list[Case]:
    """Every operator at the shapes of both models."""
    cases = [case for dim in (1536, 5120) for rows in (1, 21) for case in row_cases(TOKENS, dim, rows)]
    cases += [embedding_case(21, dim) for dim in (1536, 5120)]
    return cases + flow_map_cases(8, LATENTS)


def small_cases() -> list[Case]:
    """Every operator at shapes that an interpreter can run and fp64 can check."""
    cases = [*row_cases(21, 1536, 7), *row_cases(17, 256, 1), embedding_case(3, 1536)]
    return cases + flow_map_cases(4, (3, 4, 6, 10))
