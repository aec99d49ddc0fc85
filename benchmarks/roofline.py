"""Count the least work of networks and training steps, and its time at the limits of a device.

FLOPs count a multiplication and an addition as two. Bytes are the least for kernels at today's
borders: every weight read once, every activation that goes from one kernel to the next written once
and read once. A component takes at least the longer of its FLOPs at the rate of a matrix product
and its bytes at the bandwidth of a copy; components follow one another, so a forward takes at least
the sum. The limits of a card were measured where :class:`DeviceLimits` says, those of the machine
at hand by :class:`LimitMeter`; nothing else here is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sizes import NetworkSize
from timing import OURS, Interleaved, Step, TimeBudget

WIDE = 4  # bytes of an fp32 number: the residual's end, the rotary tables


@dataclass(frozen=True)
class DeviceLimits:
    """Hold the two rates that a device reaches.

    Attributes:
        name: the card, for headings.
        flops: rate of a large matrix product, in FLOP/s.
        bandwidth: rate of a large copy, read plus written, in bytes/s.
        source: where and how both were measured, in words that can be repeated.
    """

    name: str
    flops: float
    bandwidth: float
    source: str = ""


H100 = DeviceLimits(
    "H100 SXM 80 GB",
    800e12,
    3.0e12,
    "measured on one H100 SXM 80 GB with driver 580 and torch 2.11+cu130: a product of 8192 x 8192 "
    "random bf16 matrices ran at 798 TFLOP/s; a device-to-device copy, read plus written",
)
H200 = DeviceLimits(
    "H200",
    790e12,
    4.3e12,
    "measured on H200s: products of 8192 x 8192 random bf16 matrices ran at 769 to 798 TFLOP/s, "
    "788 in one run; a device-to-device copy, read plus written. In the run recorded here: 787 "
    "TFLOP/s at first and 686 under load, 4.2 TB/s (2.7 where the driver copies GiB)",
)


@dataclass(frozen=True)
class Component:
    """Hold the FLOPs and the least bytes of one part of a network."""

    name: str
    flops: float
    bytes: float

    def floor_s(self, limits: DeviceLimits, rate: float | None = None) -> float:
        """Return the seconds that the part takes at least.

        Args:
            limits: the device's.
            rate: FLOP/s that the part's own kernel reaches, where that is known; a matrix product's
                otherwise.
        """
        products = self.flops / (limits.flops if rate is None else rate)
        return max(products, self.bytes / limits.bandwidth)

    def bound(self, limits: DeviceLimits) -> str:
        """Return the limit that decides: "arithmetic" or "memory"."""
        products, copies = self.flops / limits.flops, self.bytes / limits.bandwidth
        return "arithmetic" if products >= copies else "memory"

    def times(self, count: int) -> Component:
        """Return the same part several times."""
        return replace(self, flops=count * self.flops, bytes=count * self.bytes)


SELF_ATTENTION, CROSS_ATTENTION = "self-attention", "cross-attention"
NORMS, TEXT, EMBEDDINGS = (
    "norms, rotary, residuals",
    "linear: text keys and values",
    "embeddings and projection out",
)


def block(size: NetworkSize) -> list[Component]:
    """List the components of one block on one sample.

    Norms and residuals are fused kernels, by the passes over [L, D] that each needs: norm and
    modulation 2, queries and keys normalized and rotated 2 + 2, residual and affine norm 4, queries
    of cross-attention 2, residual and modulated norm 4, gated residual 3; rotary tables twice; keys
    of the text. Their operations, about ten for every number that is read, are left out: no limit
    depends on them.
    """
    return block_on(size, size.tokens, size.tokens**2, size.tokens)


def block_on(size: NetworkSize, tokens: int, pairs: int, keys: int) -> list[Component]:
    """List the components of one block on other tokens than those of the size.

    Args:
        size: of the network.
        tokens: that the block computes.
        pairs: of a query and a key that it attends to.
        keys: that are read, among them cached ones.
    """
    text, d, f = size.text_tokens, size.dim, size.ffn_dim
    width = size.dtype.itemsize
    activation, prompt = tokens * d * width, text * d * width
    tables = 2 * 2 * tokens * (size.head_dim // 2) * WIDE
    passes = 2 + 4 + 4 + 2 + 4 + 3
    return [
        Component(SELF_ATTENTION, 4.0 * pairs * d, 2.0 * activation + 2.0 * keys * d * width),
        Component(CROSS_ATTENTION, 4.0 * tokens * text * d, 2.0 * activation + 2.0 * prompt),
        linear("linear: self-attention q, k, v, out", width, ((tokens, d, d),) * 4),
        linear("linear: cross-attention q, out", width, ((tokens, d, d),) * 2),
        # the GELU is in the product before it
        linear("linear: feed-forward", width, ((tokens, d, f), (tokens, f, d))),
        linear(TEXT, width, ((text, d, d),) * 2),
        Component(NORMS, 0.0, float(passes * activation + tables + 2 * prompt)),
    ]


def linear(name: str, width: int, products: tuple[tuple[int, int, int], ...]) -> Component:
    """Count (tokens, in, out) products with a bias."""
    flops = sum(2.0 * n * i * o for n, i, o in products)
    moved = sum(width * (n * i + i * o + o + n * o) for n, i, o in products)
    return Component(name, flops, float(moved))


def forward(size: NetworkSize) -> list[Component]:
    """List the components of one forward pass of one sample, text and times included."""
    width, tokens, d = size.dtype.itemsize, size.tokens, size.dim
    parts = [part.times(size.layers) for part in block(size)]
    last_norm = tokens * d * (width + WIDE)  # in fp32
    parts[-1] = replace(parts[-1], bytes=parts[-1].bytes + last_norm)
    text, values = size.text_tokens, size.patch_values
    # patches in and out, the text's projection, two embedders of times, their projection
    products = [(tokens, values, d, width), (tokens, d, values, WIDE)]
    products += [(text, size.text_dim, d, width), (text, d, d, width)]
    products += [(1, size.freq_dim, d, WIDE), (1, d, d, WIDE)] * 2 + [(1, d, 6 * d, width)]
    flops = sum(2.0 * n * i * o for n, i, o, _ in products)
    moved = sum(w * (n * i + i * o + n * o) for n, i, o, w in products)
    return [*parts, Component(EMBEDDINGS, flops, float(moved))]


def total(components: list[Component]) -> Component:
    """Add components up; :func:`floor_s` is more than this sum's floor."""
    return Component("total", sum(c.flops for c in components), sum(c.bytes for c in components))


def work(size: NetworkSize, evaluations: int = 1) -> Component:
    """Return what evaluations of the whole network do."""
    return total(forward(size)).times(evaluations)


def floor_s(
    components: list[Component], limits: DeviceLimits, rates: Mapping[str, float] | None = None
) -> float:
    """Return the seconds of components that follow one another, with known FLOP/s by name."""
    known = {} if rates is None else rates
    return sum(c.floor_s(limits, known.get(c.name)) for c in components)


def forward_floor_s(
    size: NetworkSize, limits: DeviceLimits, rates: Mapping[str, float] | None = None
) -> float:
    """Return the seconds of one forward pass."""
    return floor_s(forward(size), limits, rates)


def sampling_floor_s(size: NetworkSize, steps: int, limits: DeviceLimits) -> float:
    """Return the seconds of sampling steps: text and times once, the rest at every step."""
    parts = forward(size)
    return sum(c.floor_s(limits) * (1 if c.name in (TEXT, EMBEDDINGS) else steps) for c in parts)


# Training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluations:
    """Count the network's evaluations in a training step, in samples, with and without gradient."""

    plain: int
    graded: int

    def __add__(self, other: Evaluations) -> Evaluations:
        return Evaluations(self.plain + other.plain, self.graded + other.graded)

    def passes(self, per_graded: int) -> int:
        """Return the forward passes that cost as much."""
        return self.plain + per_graded * self.graded


def pretrain_evaluations(batch: int, flow_map_samples: int) -> dict[str, Evaluations]:
    """Count a step with guidance; only the peers evaluate t+ and t- for samples with r = t too."""
    return {
        "ours": Evaluations(batch + 2 * flow_map_samples, batch),
        "peers' formulation": Evaluations(3 * batch, batch),
    }


def on_policy_evaluations(batch: int, segments: int = 3) -> dict[str, Evaluations]:
    """Count the generator's step and the critic's.

    The generator has a rollout with a gradient and three scores, the critic a rollout without one
    and a score with it.
    """
    return {
        "generator": Evaluations(3 * batch, segments * batch),
        "critic": Evaluations(segments * batch, batch),
    }


def both_on_policy(batch: int) -> Evaluations:
    """Count a generator's and a critic's step together."""
    evaluations = on_policy_evaluations(batch)
    return evaluations["generator"] + evaluations["critic"]


def training_floor_s(
    size: NetworkSize, evaluations: Evaluations, limits: DeviceLimits, rank: int = 256
) -> float:
    """Return the seconds of a step with adapters on a frozen network and every block checkpointed.

    With a gradient, everything runs forward twice. Backward is two more of attention (gradients of
    queries and keys, and of weights and values), of norms and of the adapters, but one of the
    frozen linear layers, whose weights get no gradient.
    """
    adapters = 2.0 * size.layers * size.tokens * rank * (10 * size.dim + 2 * size.ffn_dim)
    seconds = adapters / limits.flops * evaluations.passes(4)
    for component in forward(size):
        frozen = component.name.startswith(("linear", "embeddings"))
        seconds += component.floor_s(limits) * evaluations.passes(3 if frozen else 4)
    return seconds


# The machine at hand ------------------------------------------------------------------------------

_BUDGET = TimeBudget(0.3)
_SMALLEST_COPY = 2**16
_LARGEST_COPY = {"cpu": 2**27, "cuda": 2**30}
_MATRIX = {"cpu": 1024, "cuda": 8192}


class LimitMeter:
    """Measure the limits of a device when first asked for, then keep them.

    The best of many times counts: a limit is what nothing gets past.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copy: dict[int, float] = {}
        self._product: dict[torch.dtype, float] = {}

    def floor_s(self, num_bytes: float, flops: float, dtype: torch.dtype) -> float:
        """Return the seconds below which work of these bytes and FLOPs cannot be."""
        moving = num_bytes / self.copy_bandwidth(num_bytes) if num_bytes else 0.0
        return max(moving, flops / self.product_rate(dtype) if flops else 0.0)

    def copy_bandwidth(self, num_bytes: float) -> float:
        """Return the bytes/s, read plus written, of a copy that moves about ``num_bytes``.

        Copies that fit in a cache are faster than any that do not.
        """
        size = 2 ** math.ceil(math.log2(max(num_bytes / 2, _SMALLEST_COPY)))
        size = min(size, _LARGEST_COPY[self.device.type])
        if size not in self._copy:
            source = torch.ones(size, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            self._copy[size] = 2 * size / self._shortest(lambda: target.copy_(source))
        return self._copy[size]

    def product_rate(self, dtype: torch.dtype) -> float:
        """Return the FLOP/s of a square matrix product by the fastest library of torch.

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

    def _shortest(self, step: Step) -> float:
        with torch.no_grad():
            step()
            rounds = Interleaved({OURS: step}, self.device, graphs=True)
            rounds.run(rounds.remaining_rounds(_BUDGET))
            rounds.wait_for_quiet(_BUDGET)
        return min(rounds.times[OURS])
