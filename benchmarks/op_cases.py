"""The operators at the shapes of the 1.3B and 14B models, with the bytes and FLOPs of each.

The byte counts are lower bounds: every tensor of the size of the activations read once or written
once, plus the modulation rows and tables. A kernel at the bandwidth of a copy takes exactly that
long. FLOPs are those of matrix products, two per multiplication; what is done once per element is
not what a kernel waits for, and not counted.
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
class OperatorCall:
    """``function(*inputs)``; gradients are taken of ``wanted``, which are among the inputs."""

    function: Callable[..., Any]
    inputs: Sequence[Any]
    wanted: Sequence[Tensor]
    # its forward computes the gradient too, so that without gradients it is another kernel
    training: bool = False

    def outputs(self) -> tuple[Tensor, ...]:
        """Run forward."""
        result = self.function(*self.inputs)
        return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Work:
    """What one direction of an operator cannot do without.

    Attributes:
        elements: read and written, of the dtype that the operator is given.
        wide: read and written, of fp32 whatever that dtype is: modulation rows, weights, tables.
        flops: of matrix products.
    """

    elements: int
    wide: int = 0
    flops: int = 0

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes that must be moved."""
        return self.elements * dtype.itemsize + 4 * self.wide


@dataclass(frozen=True)
class Example:
    """An operator at one shape.

    Attributes:
        op: operator.
        variant: which of its forms.
        tokens, dim, rows: L, D and R; for the flow-map operators B, numel of a sample and the rows
            with r != t.
        call: makes the inputs on a device, in ``dtype`` unless told otherwise.
        forward, backward: what each direction must do.
        dtype: in which the operator runs in a model.
    """

    op: str
    variant: str
    tokens: int
    dim: int
    rows: int
    call: Callable[..., OperatorCall]
    forward: Work
    backward: Work
    dtype: torch.dtype = DTYPE

    @property
    def name(self) -> str:
        """Unique name: operator, variant and shape."""
        return f"{self.op}[{self.variant}] L={self.tokens} D={self.dim} R={self.rows}"

    @property
    def forward_bytes(self) -> int:
        """Bytes that forward must move in ``dtype``."""
        return self.forward.bytes(self.dtype)

    @property
    def backward_bytes(self) -> int:
        """Bytes that backward must move in ``dtype``."""
        return self.backward.bytes(self.dtype)


def _leaf(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()


def row_examples(tokens: int, dim: int, rows: int) -> list[Example]:
    """The operators on ``[1, L, D]`` tokens with ``[1, R, D]`` modulation."""
    heads = max(dim // 128, 1)
    numel, row = tokens * dim, rows * dim

    def case(
        op: str, variant: str, call: Callable[..., OperatorCall], forward: Work, backward: Work
    ) -> Example:
        return Example(op, variant, tokens, dim, rows, call, forward, backward)

    def modulated(device: torch.device, dtype: torch.dtype = DTYPE) -> OperatorCall:
        inputs = [
            _leaf(device, 1, tokens, dim, dtype=dtype),
            *(_leaf(device, 1, rows, dim) for _ in range(2)),
        ]
        return OperatorCall(ops.layer_norm_modulate, inputs, inputs)

    def gated_affine(device: torch.device, dtype: torch.dtype = DTYPE) -> OperatorCall:
        x, y = (_leaf(device, 1, tokens, dim, dtype=dtype) for _ in range(2))
        gate, weight, bias = _leaf(device, 1, rows, dim), _leaf(device, dim), _leaf(device, dim)
        inputs = [x, y, gate, weight, bias]
        return OperatorCall(
            lambda x, y, g, w, b: ops.residual_layer_norm(x, y, g, weight=w, bias=b), inputs, inputs
        )

    def residual_modulated(device: torch.device, dtype: torch.dtype = DTYPE) -> OperatorCall:
        x, y = (_leaf(device, 1, tokens, dim, dtype=dtype) for _ in range(2))
        inputs = [x, y, *(_leaf(device, 1, rows, dim) for _ in range(2))]
        return OperatorCall(
            lambda x, y, s, c: ops.residual_layer_norm(x, y, shift=s, scale=c), inputs, inputs
        )

    def gated(device: torch.device, dtype: torch.dtype = DTYPE) -> OperatorCall:
        inputs = [
            *(_leaf(device, 1, tokens, dim, dtype=dtype) for _ in range(2)),
            _leaf(device, 1, rows, dim),
        ]
        return OperatorCall(ops.gated_residual, inputs, inputs)

    def rotary(device: torch.device, dtype: torch.dtype = DTYPE) -> OperatorCall:
        x, weight = _leaf(device, 1, tokens, dim, dtype=dtype), _leaf(device, dim)
        angle = _leaf(device, tokens, dim // heads // 2).detach()
        function = lambda x, w, c, s: ops.rms_norm_rope(x, w, c, s, num_heads=heads)  # noqa: E731
        return OperatorCall(function, [x, weight, angle.cos(), angle.sin()], [x, weight])

    tables = 2 * tokens * (dim // heads // 2)

    def passes(count: int, wide: int) -> Work:
        return Work(count * numel, wide)

    return [
        case("layer_norm_modulate", "bf16", modulated, passes(2, 2 * row), passes(3, 3 * row)),
        case(
            "residual_layer_norm", "gate+affine", gated_affine, passes(4, row), passes(6, 2 * row)
        ),
        case(
            "residual_layer_norm",
            "modulation",
            residual_modulated,
            passes(4, 2 * row),
            passes(4, 3 * row),
        ),
        case("gated_residual", "bf16", gated, passes(3, row), passes(3, 2 * row)),
        case("rms_norm_rope", "rotary", rotary, passes(2, tables), passes(3, tables)),
    ]


def dual_timestep_embedding(rows: int, dim: int) -> Example:
    """dual_timestep_embedding: far too small for a bandwidth, listed for its launch overhead."""

    def build(device: torch.device, dtype: torch.dtype = DTYPE) -> OperatorCall:
        inputs = [_leaf(device, rows, dim, dtype=dtype) for _ in range(2)]
        gate = torch.tensor(0.25, device=device)
        return OperatorCall(lambda t, r: ops.dual_timestep_embedding(t, r, gate), inputs, inputs)

    numel = rows * dim
    return Example(
        "dual_timestep_embedding", "gated", rows, dim, rows, build, Work(4 * numel), Work(6 * numel)
    )


def gelu(tokens: int, dim: int) -> Example:
    """The tanh-GELU of a feed-forward layer on ``[1, L, D]``; native on the CPU, torch's
    elsewhere.
    """

    def build(device: torch.device, dtype: torch.dtype = DTYPE) -> OperatorCall:
        inputs = [_leaf(device, 1, tokens, dim, dtype=dtype)]
        return OperatorCall(ops.gelu, inputs, inputs)

    numel = tokens * dim
    return Example("gelu", "tanh", tokens, dim, 1, build, Work(2 * numel), Work(3 * numel))


def linear(tokens: int, dim: int, out: int) -> Example:
    """A linear layer, ``[1, L, D]`` to ``[1, L, N]`` with a bias; oneDNN's on the CPU, torch's
    elsewhere.

    Backward is two products of the size of forward's: the gradients of the input and of the weight.
    """

    def build(device: torch.device, dtype: torch.dtype = DTYPE) -> OperatorCall:
        inputs = [
            _leaf(device, *shape, dtype=dtype) for shape in ((1, tokens, dim), (out, dim), (out,))
        ]
        return OperatorCall(ops.linear, inputs, inputs)

    x, y, weight = tokens * dim, tokens * out, dim * out + out
    flops = 2 * tokens * dim * out
    forward, backward = (
        Work(x + weight + y, flops=flops),
        Work(2 * (x + weight) + y, flops=2 * flops),
    )
    return Example("linear", f"N={out}", tokens, dim, 1, build, forward, backward)


def attention(tokens: int, dim: int, head_dim: int) -> Example:
    """Self-attention over ``[1, L, H, Dh]``, native on the CPU; bytes are not what it is bound by.

    Forward is two products of L x L x D. Backward has five: the scores again, and the gradients of
    the scores, of the queries, of the keys and of the values.
    """

    def build(device: torch.device, dtype: torch.dtype = DTYPE) -> OperatorCall:
        inputs = [
            _leaf(device, 1, tokens, dim // head_dim, head_dim, dtype=dtype) for _ in range(3)
        ]
        return OperatorCall(ops.attention, inputs, inputs)

    numel, product = tokens * dim, 2 * tokens * tokens * dim
    forward, backward = Work(4 * numel, flops=2 * product), Work(8 * numel, flops=5 * product)
    return Example("attention", f"Dh={head_dim}", tokens, dim, 1, build, forward, backward)


def flow_map_examples(batch: int, latents: tuple[int, ...]) -> list[Example]:
    """The two operators of the pretrain loss on ``[B, F, C, H, W]`` in fp32, half of the samples
    with r != t.
    """
    shape, rows = (batch, *latents), batch // 2
    size = torch.Size(latents).numel()

    def times(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.linspace(0.2, 0.9, batch, device=device)
        return t, t * 0.5, torch.arange(rows, device=device)

    def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> OperatorCall:
        t, _, index = times(device)
        latents, noise = _leaf(device, *shape, dtype=dtype), _leaf(device, *shape, dtype=dtype)
        function = lambda x, e: ops.flow_map_inputs(x, e, t, 0.005, index)  # noqa: E731
        return OperatorCall(function, [latents, noise], [latents, noise])

    def loss(device: torch.device, dtype: torch.dtype = torch.float32) -> OperatorCall:
        t, r, index = times(device)
        pred, uncond, latents, noise = (_leaf(device, *shape, dtype=dtype) for _ in range(4))
        plus, minus = (_leaf(device, rows, *shape[1:], dtype=dtype) for _ in range(2))
        function = lambda p: ops.flow_map_loss(  # noqa: E731
            p,
            uncond,
            plus,
            minus,
            latents,
            noise,
            t,
            r,
            torch.ones_like(t),
            3.0,
            0.01,
            picked=index,
        )
        return OperatorCall(function, [pred], [pred], training=True)

    whole, part = batch * size, rows * size

    def case(op: str, call: Callable[..., OperatorCall], forward: int, backward: int) -> Example:
        return Example(
            op, "fp32", batch, size, rows, call, Work(forward), Work(backward), torch.float32
        )

    return [
        case("flow_map_inputs", inputs, 3 * whole + 2 * part, 3 * whole + 2 * part),
        case("flow_map_loss", loss, 5 * whole + 2 * part, 2 * whole),
    ]


def model_examples() -> list[Example]:
    """Every operator at the shapes of both models."""
    cases = [
        case for dim in (1536, 5120) for rows in (1, 21) for case in row_examples(TOKENS, dim, rows)
    ]
    cases += [dual_timestep_embedding(21, dim) for dim in (1536, 5120)]
    return cases + flow_map_examples(8, LATENTS)


def small_examples() -> list[Example]:
    """Every operator at shapes that an interpreter can run and fp64 can check."""
    cases = [
        *row_examples(21, 1536, 7),
        *row_examples(17, 256, 1),
        dual_timestep_embedding(3, 1536),
    ]
    return cases + flow_map_examples(4, (3, 4, 6, 10))
