"""Describe examples of every operator: its operands at any size, and the work that they cost.

The self-check, the benchmarks, the ahead-of-time compilation of the kernels and the tests take
their inputs from this catalog. An :class:`Example` is an operator, a variant of its operands and
their sizes; nothing is allocated before :meth:`Example.arguments` or :meth:`Example.call`.

:class:`LeastWork` counts lower bounds: every tensor of the size of the activations is read once or
written once, and so are modulation rows and tables. A kernel at the bandwidth of a copy takes
exactly that long. FLOPs are those of matrix products, two for each multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from anyflow.ops._example import Arguments, Draws, Example, LeastWork
from anyflow.ops._example import OperatorCall as OperatorCall
from anyflow.ops._example import as_tuple as as_tuple
from anyflow.ops._example import moved as moved
from anyflow.ops._example import public_call as public_call
from anyflow.ops._example import registered_calls as registered_calls

TOKENS, FRAMES = 32760, 21  # 480 x 832 pixels, 81 frames: 21 latent frames of 30 x 52 patches
LATENTS = (FRAMES, 16, 60, 104)  # [F, C, H, W] of the same video
MODEL_DIMS = (1536, 5120)  # D of the 1.3B and of the 14B model
HEAD_DIM = 128  # of both models

RESIDUAL_VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "gate": ("gate",),
    "affine": ("weight", "bias"),
    "gate+weight": ("gate", "weight"),
    "gate+affine": ("gate", "weight", "bias"),
    "modulation": ("shift", "scale"),
    "gate+modulation": ("gate", "shift", "scale"),
}

# Operators on tokens ------------------------------------------------------------------------------


def layer_norm_modulate(tokens: int, dim: int, rows: int = 1, batch: int = 1) -> Example:
    """Return the example of a modulated LayerNorm: ``[B, L, D]`` by ``[B, R, D]``."""
    numel, row = batch * tokens * dim, batch * rows * dim

    def make(draw: Draws) -> Arguments:
        x = draw(batch, tokens, dim)
        shift, scale = (draw(batch, rows, dim, wide=True) for _ in range(2))
        return {"x": x, "shift": shift, "scale": scale}

    forward, backward = LeastWork(numel, numel, 2 * row), LeastWork(2 * numel, numel, row, 2 * row)
    return Example("layer_norm_modulate", "", tokens, dim, rows, forward, backward, make)


def residual_layer_norm(
    variant: str,
    tokens: int,
    dim: int,
    rows: int = 1,
    batch: int = 1,
    gate_rows: int | None = None,
) -> Example:
    """Return the example of a residual and the norm after it.

    Args:
        variant: key of ``RESIDUAL_VARIANTS``.
        tokens, dim, rows, batch: L, D, R and B.
        gate_rows: R of the gate, where it differs.
    """
    names = RESIDUAL_VARIANTS[variant]
    gate = rows if gate_rows is None else gate_rows
    shapes = {"gate": (batch, gate, dim), "weight": (dim,), "bias": (dim,)}
    shapes |= dict.fromkeys(("shift", "scale"), (batch, rows, dim))
    numel, gated, modulated = batch * tokens * dim, "gate" in names, "shift" in names
    gate_row, row = gated * batch * gate * dim, modulated * batch * rows * dim

    def make(draw: Draws) -> Arguments:
        x, y = draw(batch, tokens, dim), draw(batch, tokens, dim)
        others = {
            name: draw(*shape, wide=True) if name in names else None
            for name, shape in shapes.items()
        }
        return {"x": x, "y": y, **others}

    forward = LeastWork(2 * numel, 2 * numel, gate_row + 2 * row)
    # without a gate the gradients of x and y are one tensor, and y is not read
    backward = LeastWork(
        (3 + gated) * numel, (1 + gated) * numel, gate_row + row, gate_row + 2 * row
    )
    return Example("residual_layer_norm", variant, tokens, dim, rows, forward, backward, make)


def gated_residual(tokens: int, dim: int, rows: int = 1, batch: int = 1) -> Example:
    """Return the example of a gated residual; the gradient of x is that of the result."""
    numel, row = batch * tokens * dim, batch * rows * dim

    def make(draw: Draws) -> Arguments:
        x, y = draw(batch, tokens, dim), draw(batch, tokens, dim)
        return {"x": x, "y": y, "gate": draw(batch, rows, dim, wide=True)}

    forward, backward = LeastWork(2 * numel, numel, row), LeastWork(2 * numel, numel, row, row)
    return Example("gated_residual", "", tokens, dim, rows, forward, backward, make)


def rms_norm_rope(
    tokens: int,
    dim: int,
    rows: int = 1,
    heads: int | None = None,
    batch: int = 1,
    rotary: bool = True,
) -> Example:
    """Return the example of an RMS norm, a head split and a rotation.

    Args:
        tokens, dim, batch: L, D and B.
        rows: of its neighbors in a model, for its name only.
        heads: by default those of a model of this width.
        rotary: rotate.
    """
    count = max(dim // HEAD_DIM, 1) if heads is None else heads
    half = dim // count // 2
    numel, tables = batch * tokens * dim, 2 * tokens * half * rotary

    def make(draw: Draws) -> Arguments:
        x, weight = draw(batch, tokens, dim), draw(dim, wide=True)
        angle = draw(tokens, half, wide=True, gradient=False)
        cos, sin = (angle.cos(), angle.sin()) if rotary else (None, None)
        return {"x": x, "weight": weight, "cos": cos, "sin": sin, "num_heads": count}

    forward, backward = LeastWork(numel, numel, tables), LeastWork(2 * numel, numel, tables)
    variant = "rotary" if rotary else "no rotary"
    return Example("rms_norm_rope", variant, tokens, dim, rows, forward, backward, make)


def dual_timestep_embedding(
    rows: int, dim: int, fusion: str = "gated", learned: bool = False
) -> Example:
    """Return the example of two embeddings ``[N, D]`` that are fused and activated.

    Args:
        rows, dim: N and D.
        fusion: ``"gated"`` or ``"additive"``.
        learned: the gate wants a gradient.
    """
    numel = rows * dim

    def make(draw: Draws) -> Arguments:
        embeddings = {name: draw(rows, dim) for name in ("t_emb", "r_emb")}
        gate = torch.full((), 0.25, device=draw.device, dtype=draw.wide).requires_grad_(learned)
        return {**embeddings, "gate": gate, "fusion": fusion}

    forward, backward = LeastWork(2 * numel, 2 * numel), LeastWork(4 * numel, 2 * numel)
    return Example("dual_timestep_embedding", fusion, rows, dim, rows, forward, backward, make)


def gelu(tokens: int, dim: int, batch: int = 1) -> Example:
    """Return the example of the tanh-GELU of a feed-forward layer."""
    numel = batch * tokens * dim
    forward, backward = LeastWork(numel, numel), LeastWork(2 * numel, numel)
    return Example(
        "gelu",
        "tanh",
        tokens,
        dim,
        1,
        forward,
        backward,
        lambda draw: {"x": draw(batch, tokens, dim)},
    )


def linear(tokens: int, dim: int, out: int, batch: int = 1, bias: bool = True) -> Example:
    """Return the example of a linear layer, ``[B, L, D]`` to ``[B, L, N]``.

    Backward is two products of the size of forward's: the gradients of the input and of the weight.
    """
    x, y, weight = batch * tokens * dim, batch * tokens * out, dim * out + out * bias
    flops = 2 * batch * tokens * dim * out

    def make(draw: Draws) -> Arguments:
        tensors = {"x": draw(batch, tokens, dim), "weight": draw(out, dim)}
        return tensors | {"bias": draw(out) if bias else None}

    forward = LeastWork(x + weight, y, flops=flops)
    backward = LeastWork(x + weight + y, x + weight, flops=2 * flops)
    return Example("linear", f"N={out}", tokens, dim, 1, forward, backward, make)


def attention(
    tokens: int, dim: int, head_dim: int, keys: int | None = None, batch: int = 1
) -> Example:
    """Return the example of attention over ``[B, L, H, Dh]``, which bytes do not bound.

    Forward is two products of L x S x D. Backward has five: the scores again, and the gradients of
    the scores, of the queries, of the keys and of the values.

    Args:
        tokens, dim, head_dim, batch: L, H Dh, Dh and B.
        keys: S, by default L.
    """
    length, heads = tokens if keys is None else keys, dim // head_dim
    queries, others = batch * tokens * dim, batch * length * dim
    product = 2 * batch * tokens * length * dim

    def make(draw: Draws) -> Arguments:
        lengths = {"q": tokens, "k": length, "v": length}
        return {name: draw(batch, n, heads, head_dim) for name, n in lengths.items()}

    forward = LeastWork(queries + 2 * others, queries, flops=2 * product)
    # the result and its gradient are read too
    backward = LeastWork(3 * queries + 2 * others, queries + 2 * others, flops=5 * product)
    return Example("attention", f"Dh={head_dim}", tokens, dim, 1, forward, backward, make)


# Operators of the pretrain loss -------------------------------------------------------------------


@dataclass(frozen=True)
class FrameTimes:
    """Describe the times of a batch of frames.

    Attributes:
        per_frame: ``[B, F]`` in place of ``[B]``.
        dtype: dtype of the times.
    """

    per_frame: bool = False
    dtype: torch.dtype = torch.float32

    def linear(self, first: float, last: float, samples: int, frames: int, draw: Draws) -> Tensor:
        """Return times that differ, from ``first`` to ``last``."""
        shape = (samples, frames) if self.per_frame else (samples,)
        count = samples * frames if self.per_frame else samples
        times = torch.linspace(first, last, count, device=draw.device, dtype=torch.float64)
        return times.view(shape).to(torch.promote_types(self.dtype, draw.wide))


def flow_map_inputs(
    shape: Sequence[int],
    picked: Sequence[int] | None,
    times: FrameTimes | None = None,
    with_x_t: bool = False,
) -> Example:
    """Return the example of points on the path and beside it.

    Args:
        shape: ``[B, F, ...]`` of the latents.
        picked: indices of the samples with neighbors; None for all.
        times: times of the samples.
        with_x_t: put x_t into the batch too.
    """
    samples, frames = shape[:2]
    kind = FrameTimes() if times is None else times
    size = torch.Size(shape[1:]).numel()
    n = samples if picked is None else len(picked)
    whole, part = samples * size, n * size
    wide = 2 * part + with_x_t * whole

    def make(draw: Draws) -> Arguments:
        latents, noise = draw(*shape), draw(*shape)
        spans = {"t": (0.1, 0.9), "epsilon_plus": (0.005, 0.006), "epsilon_minus": (0.004, 0.005)}
        times = {name: kind.linear(*span, samples, frames, draw) for name, span in spans.items()}
        return {
            "latents": latents,
            "noise": noise,
            **times,
            "picked": _indices(picked, draw),
            "dtype": draw.dtype,
            "with_x_t": with_x_t,
        }

    forward = LeastWork(2 * whole, whole, wide_written=wide)
    backward = LeastWork(whole, 2 * whole, wide_read=wide)
    sizes = (samples, size, n)
    return Example("flow_map_inputs", "", *sizes, forward, backward, make, torch.float32)


def flow_map_loss(
    shape: Sequence[int],
    picked: Sequence[int] | None,
    times: FrameTimes | None = None,
    guidance: float = 3.0,
) -> Example:
    """Return the example of the regression loss; without guidance (1) there is no ``uncond``.

    Args:
        shape: ``[B, F, ...]`` of the prediction.
        picked: indices of the samples with neighbors; None for all.
        times: times of the samples.
        guidance: g.
    """
    samples, frames = shape[:2]
    kind = FrameTimes() if times is None else times
    size = torch.Size(shape[1:]).numel()
    n = samples if picked is None else len(picked)
    whole, part = samples * size, n * size

    def make(draw: Draws) -> Arguments:
        tensors: Arguments = {"pred": draw(*shape), "uncond": None}
        if guidance != 1:
            tensors["uncond"] = draw(*shape, gradient=False)
        # the neighbors are evaluated, and kept, in fp32
        for name in ("u_plus", "u_minus"):
            tensors[name] = draw(n, *shape[1:], wide=True, gradient=False)
        for name in ("latents", "noise"):
            tensors[name] = draw(*shape, gradient=False)
        t, weight = (kind.linear(*span, samples, frames, draw) for span in ((0.1, 0.9), (0.5, 1.5)))
        return {
            **tensors,
            "t": t,
            "r": t * 0.5,
            "weight": weight,
            "width": kind.linear(0.009, 0.011, n, frames, draw),
            "picked": _indices(picked, draw),
            "guidance": guidance,
            "need_grad": True,
        }

    passes = 3 + (guidance != 1)
    forward = LeastWork(passes * whole, whole, wide_read=2 * part)
    sizes, backward = (samples, size, n), LeastWork(whole, whole)
    return Example("flow_map_loss", "", *sizes, forward, backward, make, torch.float32)


def _indices(picked: Sequence[int] | None, draw: Draws) -> Tensor | None:
    if picked is None:
        return None
    return torch.tensor(list(picked), dtype=torch.int64, device=draw.device)


# Sizes --------------------------------------------------------------------------------------------


def row_examples(tokens: int, dim: int, rows: int) -> list[Example]:
    """List the operators of a block over ``[1, L, D]`` tokens with ``[1, R, D]`` modulation."""
    residual = partial(residual_layer_norm, tokens=tokens, dim=dim, rows=rows)
    return [
        layer_norm_modulate(tokens, dim, rows),
        residual("gate+affine"),
        residual("modulation"),
        gated_residual(tokens, dim, rows),
        rms_norm_rope(tokens, dim, rows),
    ]


def flow_map_examples(batch: int, latents: Sequence[int]) -> list[Example]:
    """List both operators of the pretrain loss; half of the B samples are picked."""
    shape, picked = (batch, *latents), range(batch // 2)
    return [flow_map_inputs(shape, picked), flow_map_loss(shape, picked)]


def model_examples() -> list[Example]:
    """List every operator of a block and of the loss at the sizes of both models."""
    found = [
        example
        for dim in MODEL_DIMS
        for rows in (1, FRAMES)
        for example in row_examples(TOKENS, dim, rows)
    ]
    found += [dual_timestep_embedding(FRAMES, dim) for dim in MODEL_DIMS]
    return found + flow_map_examples(8, LATENTS)


def small_examples() -> list[Example]:
    """List every operator at sizes of milliseconds, with odd numbers of everything but D.

    The kernels take multiples of 8 for D; 88 is no multiple of 16. Every operand that can have a
    gradient wants one.
    """
    dim, shape, picked = 88, (3, 5, 2, 3, 7), (2, -3)
    return [
        attention(13, 72, 24, keys=9, batch=2),
        dual_timestep_embedding(3, dim, "gated", learned=True),
        dual_timestep_embedding(3, dim, "additive", learned=True),
        flow_map_inputs(shape, picked, FrameTimes(per_frame=True)),
        flow_map_loss(shape, picked),
        gated_residual(15, dim, 5, batch=2),
        gelu(7, dim, batch=3),
        layer_norm_modulate(15, dim, 5, batch=2),
        linear(300, dim, 96, batch=2),  # enough rows for oneDNN
        residual_layer_norm("gate+affine", 15, dim, 3, batch=2),
        residual_layer_norm("modulation", 7, dim, batch=2),
        rms_norm_rope(13, dim, heads=4, batch=2),
    ]
