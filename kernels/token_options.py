"""Choose the launch options of the kernels over tokens, which hold all of D in registers.

A program reads a run of consecutive tokens of one modulation row, so that the row is read once per
run instead of once per token: in bf16, a token would otherwise read four times as many bytes of
fp32 shift and scale as of x.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import triton

# Tokens per program. A backward program also writes partial sums, which a longer run amortizes.
FORWARD_TOKENS = 16
BACKWARD_TOKENS = 32
# Elements of a token per thread, at most. Few warps leave room for many programs on a
# multiprocessor, whose loads overlap, and no lane idle: two at D = 1536 and four at D = 5120 read
# whole 16-byte vectors in every lane. Kernels that keep many tensors and sums would spill with 40.
FEW_TENSORS, MANY_TENSORS = 40, 24
FP32_BACKWARD = 16  # loaded tokens take twice the registers, and ptxas spills sooner for sm_100
# One warp, which needs no barriers, can hold a token of at most this D: 48 elements per thread.
ONE_WARP = 1536

# Warps, stages and tokens per program that were measured at least 3 % faster on an H200 than the
# rules above, for bf16 at the D of the 1.3B model (docs/performance-log.md, experiment 2).
MEASURED_D = 1536
MEASURED = {
    "layer_norm_modulate backward": (2, 4, 64),
    "residual_layer_norm forward": (1, 4, 8),
    "residual_layer_norm backward": (2, 3, 64),
    "residual_layer_norm backward, gate": (4, 4, 128),
    "gated_residual forward": (2, 4, 8),
    "gated_residual backward": (1, 3, 64),
    "rms_norm_rope backward": (2, 3, 64),
}

# the default is never written to
_overridden: ContextVar[dict[str, int]] = ContextVar("overridden", default={})  # noqa: B039


def token_options(
    d: int,
    *,
    tokens: int,
    elements: int,
    stages: int = 1,
    one_warp: bool = False,
    measured: str | None = None,
) -> dict[str, int]:
    """Return the constexpr arguments and the number of warps of a kernel over tokens.

    Args:
        d: D, elements of a token.
        tokens: tokens per program.
        elements: elements of a token per thread, at most; up to 16 warps share a token.
        stages: stages of the loop over tokens; from 3 on the loop copies ``stages - 2`` later
            tokens to shared memory meanwhile.
        one_warp: whether one warp holds a token where it can.
        measured: key of :data:`MEASURED`, whose options come first at the D that they are for;
            None for a kernel or a dtype without measured options.

    Returns:
        ``TOKENS``, ``STAGES``, ``D``, ``BLOCK_D`` (the next power of two) and ``num_warps``.
    """
    warps = min(triton.next_power_of_2(triton.cdiv(d, 32 * elements)), 16)
    if one_warp and d <= ONE_WARP:
        warps = 1
    if measured is not None and d == MEASURED_D:
        warps, stages, tokens = MEASURED[measured]
    options = {
        "TOKENS": tokens,
        "STAGES": stages,
        "D": d,
        "BLOCK_D": triton.next_power_of_2(d),
        "num_warps": warps,
    }
    return options | _overridden.get()


@contextmanager
def override_options(**options: int) -> Iterator[None]:
    """Launch the kernels over tokens with other ``TOKENS``, ``STAGES`` or ``num_warps``.

    Benchmarks time the alternatives with it.

    Raises:
        ValueError: another option is named.
    """
    unknown = sorted(set(options) - {"TOKENS", "STAGES", "num_warps"})
    if unknown:
        raise ValueError(
            f"override_options takes TOKENS, STAGES and num_warps, got {', '.join(unknown)}"
        )
    token = _overridden.set(options)
    try:
        yield
    finally:
        _overridden.reset(token)
