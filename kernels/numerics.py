"""Round fp32 results to the dtype of a tensor."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """Round fp32 to a tensor's dtype, to nearest even."""
    # Triton's interpreter truncates to bf16
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        return (
            ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        )
    return value.to(dtype)
