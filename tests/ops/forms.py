"""List the examples that the operators' tests run: forms, sizes, nothing, dtypes, signatures."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from checks import backends, dtypes

from anyflow.ops.examples import (
    RESIDUAL_VARIANTS,
    Example,
    FrameTimes,
    attention,
    dual_timestep_embedding,
    flow_map_inputs,
    flow_map_loss,
    gated_residual,
    gelu,
    layer_norm_modulate,
    linear,
    residual_layer_norm,
    rms_norm_rope,
    row_examples,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPE = (4, 3, 2, 3, 5)  # [B, F, C, H, W]
PER_FRAME = FrameTimes(per_frame=True)
FUSIONS = ("gated", "additive")
PICKED = {"all": None, "some": (2, 0), "any order": (-1, 0, 2, 2, -4), "none": ()}
# L, D, Dh, S, B
ATTENTION = (
    (300, 128, 64),
    (257, 192, 64, 32, 2),  # keys of one block
    (33, 64, 64, 1000),
    (1000, 64, 64, 33),
    (1, 48, 16, 7, 2),
    (7, 72, 24, 1, 2),
    (1, 8, 8),
    (65, 144, 72, 130),
    (97, 256, 128, 121),
    (50, 256, 256, 129),  # the widest head
    (50, 208, 104, 119, 2),
)


def labeled(label: str, *examples: Example) -> list[Example]:
    """Name what the variant of examples does not tell."""
    return [replace(e, variant=f"{e.variant} {label}".strip()) for e in examples]


def label(example: Example) -> str:
    """Name an example in the id of a test."""
    parts = (example.op, example.variant, f"{example.tokens}x{example.dim}x{example.rows}")
    return "-".join(part.replace(" ", "_") for part in parts if part)


def over(
    examples: Sequence[Example],
    kinds: Sequence[torch.dtype] | None = None,
    kernels: bool = False,
    widest: bool = False,
    slow_interpreted: bool = False,
) -> pytest.MarkDecorator:
    """Parametrize by the examples, the backends of their operators, and dtypes that these take.

    Args:
        examples: calls of operators.
        kinds: dtypes; by default all.
        kernels: leave the reference out.
        widest: take the widest dtype alone: fp64 of the reference, fp32 of a kernel.
        slow_interpreted: mark Triton's kernels as slow, which are interpreted on a CPU.
    """
    found = []
    for example in examples:
        for name in backends(example.op)[kernels:]:
            taken = dtypes(example.op, name)[: 1 if widest else None]
            for dtype in taken if kinds is None else [kind for kind in kinds if kind in taken]:
                kind = str(dtype).removeprefix("torch.")
                case = f"{label(example)}-{name}-{kind}"
                marks = [pytest.mark.slow] if slow_interpreted and name == "triton" else []
                found.append(pytest.param(example, name, dtype, id=case, marks=marks))
    return pytest.mark.parametrize(("example", "backend", "dtype"), found, indirect=["backend"])


# Small, in every dtype but fp16: each variant, one row and several, sizes of one, no power of two.
FORMS = [
    *(layer_norm_modulate(*sizes) for sizes in ((12, 16, 3, 2), (7, 96), (1, 8, 1, 3))),
    *(gated_residual(*sizes) for sizes in ((12, 16, 3, 2), (7, 96), (1, 8, 1, 3))),
    *(residual_layer_norm(variant, 6, 16, 3, batch=2) for variant in RESIDUAL_VARIANTS),
    residual_layer_norm("gate+affine", 5, 24),
    residual_layer_norm("modulation", 1, 8, batch=2),
    *(rms_norm_rope(6, 24, heads=3, batch=2, rotary=rotary) for rotary in (True, False)),
    rms_norm_rope(1, 8, heads=4, batch=3),
    rms_norm_rope(7, 72, heads=12),
    rms_norm_rope(17, 24, heads=1, batch=2),
    *labeled("odd heads", rms_norm_rope(5, 24, heads=8, batch=2, rotary=False)),
    *(dual_timestep_embedding(3, 16, fusion) for fusion in FUSIONS),
    *labeled(
        "learned", *(dual_timestep_embedding(5, 1000, f, True) for f in ("gated", "additive"))
    ),
    dual_timestep_embedding(1, 7),
    gelu(5, 16, batch=2),
    gelu(1280, 24),
    linear(5, 16, 24, batch=2),
    *labeled("no bias", linear(1, 33, 1, batch=3, bias=False)),
    linear(193, 130, 101, batch=2),  # large enough for oneDNN, with odd sizes
    linear(1031, 184, 190),  # and for its product of the weight's gradient
    *(attention(*sizes) for sizes in ATTENTION),
    *(
        example
        for (picks, picked), per_frame in product(PICKED.items(), (False, True))
        if (picks, per_frame) not in (("some", False), ("none", True))
        for example in labeled(
            f"{picks}{' per frame' * per_frame}",
            flow_map_inputs(SHAPE, picked, FrameTimes(per_frame), with_x_t=per_frame),
            flow_map_loss(SHAPE, picked, FrameTimes(per_frame), guidance=1 + 2 * per_frame),
        )
    ),
]
# In bf16: the widths of models and beyond, lengths that no run of 16 or 32 tokens divides;
# frames of one element, and of any number of chunks.
SIZES = [
    *(
        example
        for index, sizes in enumerate(((3, 1536, 1), (1, 2048, 1), (2, 5120, 1), (1, 8192, 1)))
        for example in row_examples(*sizes)
        if example.variant != ("modulation", "gate+affine")[index % 2]
    ),
    layer_norm_modulate(74, 40, 2),
    gated_residual(74, 40, 2),
    *(rms_norm_rope(35, 56, heads=4, rotary=rotary) for rotary in (True, False)),
    residual_layer_norm("modulation", 3, 1536),
    residual_layer_norm("gate+affine", 74, 40, 2),
    *(
        residual_layer_norm("gate+modulation", 6, 8, rows, batch=2, gate_rows=gate)
        for gate, rows in ((1, 3), (3, 1), (2, 3), (6, 2))
    ),
    *(dual_timestep_embedding(n, d) for n, d in ((7, 96), (3, 1536), (1023, 1), (4, 256))),
    *(
        example
        for shape, picked in product(
            ((2, 1, 1), (3, 2, 2), (1, 5, 7), (2, 3, 1023), (1, 2, 4, 16, 33), (1, 1, 8, 2, 64)),
            (None, (-1,)),
        )
        for example in (
            flow_map_inputs(shape, picked, PER_FRAME, with_x_t=True),
            flow_map_loss(shape, picked),
        )
    ),
]
# 33 tokens of each row: two programs and a part of one forward, one and a part backward.
SLOW = [e for e in row_examples(165, 96, 5) if e.variant != "gate+affine"]
EMPTY = [
    *(layer_norm_modulate(n, 8, 2, b) for n, b in ((6, 0), (0, 2))),
    *(gated_residual(n, 8, 2, b) for n, b in ((6, 0), (0, 2))),
    *(residual_layer_norm(v, n, 8, 2, b) for v in RESIDUAL_VARIANTS for n, b in ((6, 0), (0, 2))),
    *(rms_norm_rope(n, 16, 1, 2, b, r) for n, b in ((6, 0), (0, 2)) for r in (True, False)),
    *(dual_timestep_embedding(n, d, learned=True) for n, d in ((0, 8), (3, 0))),
    *(gelu(n, 3, b) for n, b in ((2, 0), (0, 2))),
    *(
        linear(n, k, m, b)
        for n, k, m, b in ((0, 4, 3, 2), (4, 4, 3, 0), (2, 4, 0, 1), (2, 0, 3, 1))
    ),
    *(attention(*sizes) for sizes in ((4, 16, 8, 4, 0), (0, 16, 8, 4, 2), (4, 16, 8, 0, 2))),
    *(
        example
        for shape, picked in product(((0, 3, 2), (4, 0, 2), (4, 3, 0, 5)), (None, ()))
        for example in (flow_map_inputs(shape, picked), flow_map_loss(shape, picked))
    ),
]
# One of each signature: what optional operands are there, and what the backward is given.
KINDS = [
    layer_norm_modulate(12, 16, 3, batch=2),
    gated_residual(12, 16, 3, batch=2),
    *(
        residual_layer_norm(variant, 6, 16, 3, batch=2)
        for variant in ("plain", "gate+weight", "gate+affine", "modulation")
    ),
    *(rms_norm_rope(6, 24, heads=3, batch=2, rotary=rotary) for rotary in (True, False)),
    *(
        dual_timestep_embedding(3, 16, f, learned)
        for f, learned in (("gated", True), ("additive", False))
    ),
    gelu(3, 16, batch=2),
    linear(6, 16, 5, batch=2),
    *labeled("no bias", linear(6, 16, 5, batch=2, bias=False)),
    attention(13, 72, 24, keys=9, batch=2),
    flow_map_inputs(SHAPE, (3, 0, -1), PER_FRAME, with_x_t=True),
    *labeled("all", flow_map_inputs(SHAPE, None)),
    flow_map_loss(SHAPE, (3, 0, 3), PER_FRAME),
    *labeled("all", flow_map_loss(SHAPE, None, guidance=1.0)),
]
# also as large as oneDNN wants them
LAID_OUT = [*KINDS, linear(64, 512, 512)]
EPS = [e for e in KINDS if e.op.endswith(("modulate", "layer_norm", "rope"))]
# Operands in dtypes of their own: none may be rounded to that of another one. None: left out.
MIXED = [
    (layer_norm_modulate(6, 8, 2, 2), {"shift": BF16, "scale": BF16}, FP32),
    (gated_residual(6, 8, 2, 2), {"y": BF16}, FP32),
    (gated_residual(6, 8, 2, 2), {"y": FP32}, BF16),
    (gated_residual(6, 8, 2, 2), {"y": FP16, "gate": BF16}, FP32),
    *(
        (gated_residual(5, 7, 1, 2), {"y": y, "gate": None}, x)
        for x, y in ((FP32, FP32), (FP32, BF16), (BF16, FP32), (FP16, FP16))
    ),
    *(
        (residual_layer_norm(variant, 6, 8, 2, 2), {"y": y}, x)
        for variant in ("plain", "affine", "gate+modulation")
        for x, y in ((BF16, FP32), (FP32, BF16), (FP16, FP32))
    ),
    (rms_norm_rope(6, 16, heads=2, batch=2), {"cos": FP16, "sin": FP16}, FP32),
    (rms_norm_rope(6, 16, heads=2, batch=2), {"cos": FP16, "sin": FP16}, BF16),
    (dual_timestep_embedding(3, 16), {"r_emb": FP32}, BF16),
    (dual_timestep_embedding(3, 16), {"r_emb": FP16}, FP32),
    (flow_map_inputs(SHAPE, (1, 2)), {"noise": FP32, "dtype": FP32}, BF16),
    (flow_map_inputs(SHAPE, (1, 2)), {"t": FP64, "epsilon_plus": FP64}, BF16),
    (flow_map_loss(SHAPE, (1, 2)), {"t": FP64, "r": FP64, "width": FP64}, BF16),
    (flow_map_loss(SHAPE, (1, 2)), {"u_plus": BF16, "u_minus": BF16, "latents": FP32}, BF16),
    (flow_map_loss(SHAPE, None, guidance=1.0), {"u_plus": None, "u_minus": None}, FP32),
]
# Rows, weights and velocities in the dtype of the tokens, which a model has in fp32.
NARROW = [e for e in KINDS if e.op.endswith(("modulate", "residual", "layer_norm", "rope", "loss"))]
