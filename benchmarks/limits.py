"""What this machine can do at most, measured in the same run: the bandwidth of a copy and the rate
of a product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from interleave import OURS, Budget, Interleaved, Step

_BUDGET = Budget(0.3)
_SMALLEST_COPY = 2**16
_LARGEST_COPY = {"cpu": 2**27, "cuda": 2**30}
_MATRIX = {"cpu": 1024, "cuda": 8192}


class Limits:
    """Measured when first asked for, then kept. The best of many times: a limit is what nothing
    gets past.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copy: dict[int, float] = {}
        self._product: dict[torch.dtype, float] = {}

    def copy_bandwidth(self, num_bytes: int) -> float:
        """Bytes per second, read plus written, of a copy that moves about so many: those that fit
        in a cache are faster than any that do not.
        """
        size = 2 ** math.ceil(math.log2(max(num_bytes / 2, _SMALLEST_COPY)))
        size = min(size, _LARGEST_COPY[self.device.type])
        if size not in self._copy:
            source = torch.ones(size, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._copy[size] = 2 * size / self._shortest(lambda: target.copy_(source))
        return self._copy[size]

    def product_rate(self, dtype: torch.dtype) -> float:
        """FLOP per second of a square matrix product, by the fastest library that torch brings for
        it.

        On a processor that is not Intel's, torch's own fp32 product is MKL's, which stays at AVX2
        there; oneDNN's uses AVX-512, so the limit is the better one of both.
        """
        if dtype not in self._product:
            n = _MATRIX[self.device.type]
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            steps: list[Step] = [lambda: F.linear(a, b)]
            onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
            if dtype == torch.float32 and self.device.type == "cpu" and onednn is not None:
                steps.append(lambda: onednn(a, b, None, "none", [], ""))
            self._product[dtype] = 2 * n**3 / min(self._shortest(step) for step in steps)
        return self._product[dtype]

    def shortest_time(self, num_bytes: int, flops: int, dtype: torch.dtype) -> float:
        """Seconds below which work of so many bytes and FLOPs cannot be: the larger of the two at
        their limits.
        """
        moving = num_bytes / self.copy_bandwidth(num_bytes) if num_bytes else 0.0
        computing = flops / self.product_rate(dtype) if flops else 0.0
        return max(moving, computing)

    def _shortest(self, step: Step) -> float:
        with torch.no_grad():
            step()
            rounds = Interleaved({OURS: step}, self.device)
            rounds.run(rounds.remaining_rounds(_BUDGET))
            rounds.wait_for_quiet(_BUDGET)
        return min(rounds.times[OURS])
