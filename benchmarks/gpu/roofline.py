"""Counts the least work of one forward pass, component by component, and its time at a card's
limits.

FLOPs count a multiplication and an addition as two. Bytes are the least for kernels at today's
borders: every weight read once, every activation that goes from one kernel to the next written once
and read once. A component takes at least the longer of its FLOPs at the rate of a matrix product
and its bytes at the bandwidth of a copy; components follow one another, so a forward takes at least
the sum. The limits of a card were measured where :class:`Limits` says; nothing else here is
measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpu.sizes import Size

WIDTH = 2  # bytes of a bf16 number
WIDE = 4  # of an fp32 one: the residual's end, the rotary tables


@dataclass(frozen=True)
class Limits:
    """Holds the two rates that a device reaches.

    Attributes:
        name: the card, for headings.
        flops: rate of a large bf16 matrix product, in FLOP/s.
        bandwidth: rate of a large copy, read plus written, in bytes/s.
        source: where and how both were measured, in words that can be repeated.
    """

    name: str
    flops: float
    bandwidth: float
    source: str = ""


H100 = Limits(
    "H100 SXM 80 GB",
    800e12,
    3.0e12,
    "measured on one H100 SXM 80 GB with driver 580 and torch 2.11+cu130: a product of 8192 x 8192 "
    "random bf16 "
    "matrices ran at 798 TFLOP/s; a device-to-device copy, read plus written",
)
H200 = Limits(
    "H200",
    790e12,
    4.3e12,
    "measured on H200s: products of 8192 x 8192 random bf16 matrices ran at 769 to 798 TFLOP/s, "
    "788 in one run; a "
    "device-to-device copy, read plus written. In the run recorded here: 787 TFLOP/s at first and "
    "686 under load, "
    "4.2 TB/s (2.7 where the driver copies GiB)",
)
# By the name that CUDA gives the device. The PCIe and NVL forms of these cards are slower, so names
# match as a whole.
CARDS = {"NVIDIA H100 80GB HBM3": H100, "NVIDIA H200": H200}


def card(device: str) -> Limits | None:
    """Return the limits of a device by CUDA's name for it or by the card's; None for a card that
    nobody measured.
    """
    return next((limits for name, limits in CARDS.items() if device in (name, limits.name)), None)


@dataclass(frozen=True)
class Component:
    """Holds the FLOPs and the least bytes of one part of the forward pass, all blocks together."""

    name: str
    flops: float
    bytes: float

    def floor_s(self, limits: Limits, rate: float | None = None) -> float:
        """Return the seconds that the part takes at least.

        Args:
            limits: the card's.
            rate: FLOP/s that the part's own kernel reaches, where that is known; a matrix product's
                otherwise.
        """
        return max(
            self.flops / (limits.flops if rate is None else rate), self.bytes / limits.bandwidth
        )

    def bound(self, limits: Limits) -> str:
        """Return the limit that decides: "arithmetic" or "memory"."""
        return (
            "arithmetic" if self.flops / limits.flops >= self.bytes / limits.bandwidth else "memory"
        )


SELF_ATTENTION, CROSS_ATTENTION = "self-attention", "cross-attention"


def forward(size: Size) -> list[Component]:
    """List the components of one forward pass of one sample, text and times included."""
    n, tokens, text, d, f = size.layers, size.tokens, size.text_tokens, size.dim, size.ffn_dim
    activation, prompt = tokens * d * WIDTH, text * d * WIDTH
    self_attention = Component(SELF_ATTENTION, n * 4.0 * tokens**2 * d, n * 4.0 * activation)
    cross_attention = Component(
        CROSS_ATTENTION, n * 4.0 * tokens * text * d, n * (2.0 * activation + 2.0 * prompt)
    )
    return [
        self_attention,
        cross_attention,
        _linear("linear: self-attention q, k, v, out", size, ((tokens, d, d),) * 4),
        _linear("linear: cross-attention q, out", size, ((tokens, d, d),) * 2),
        _linear("linear: feed-forward", size, ((tokens, d, f), (tokens, f, d))),
        _linear("linear: text keys and values", size, ((text, d, d),) * 2),
        _norms_and_residuals(size),
        _embeddings(size),
    ]


def _linear(name: str, size: Size, products: tuple[tuple[int, int, int], ...]) -> Component:
    """Count (rows, in, out) products in each block; the GELU is in the product before it."""
    flops = sum(2.0 * rows * i * o for rows, i, o in products)
    moved = sum(WIDTH * (rows * i + i * o + o + rows * o) for rows, i, o in products)
    return Component(name, size.layers * flops, size.layers * float(moved))


def _norms_and_residuals(size: Size) -> Component:
    """Count the fused kernels of a block, by the passes over [L, D] that each needs, and the last
    norm in fp32.

    Norm and modulation 2, queries and keys normalized and rotated 2 + 2, residual and affine norm
    4, queries of cross-attention 2, residual and modulated norm 4, gated residual 3; rotary tables
    twice; keys of the text.
    """
    tokens, d = size.tokens, size.dim
    passes = 2 + 4 + 4 + 2 + 4 + 3
    tables = 2 * 2 * tokens * (size.head_dim // 2) * WIDE
    block = passes * tokens * d * WIDTH + tables + 2 * size.text_tokens * d * WIDTH
    end = tokens * d * (WIDTH + WIDE)
    # About ten operations for every number that is read; a handful of TFLOP, which no limit depends
    # on: left out.
    return Component("norms, rotary, residuals", 0.0, float(size.layers * block + end))


def _embeddings(size: Size) -> Component:
    """Count patches in and out, the text's projection, and the times: two embedders, the
    modulation's projection.
    """
    tokens, text, d, values = size.tokens, size.text_tokens, size.dim, size.patch_values
    products = [(tokens, values, d, WIDTH), (tokens, d, values, WIDE)]
    products += [(text, size.text_dim, d, WIDTH), (text, d, d, WIDTH)]
    products += [(1, size.freq_dim, d, WIDE), (1, d, d, WIDE)] * 2 + [(1, d, 6 * d, WIDTH)]
    flops = sum(2.0 * rows * i * o for rows, i, o, _ in products)
    moved = sum(width * (rows * i + i * o + rows * o) for rows, i, o, width in products)
    return Component("embeddings and projection out", flops, float(moved))


def total(components: list[Component]) -> Component:
    """Add the components up; :func:`floor_s` takes the sum of their floors, which is more than this
    one's floor.
    """
    return Component("total", sum(c.flops for c in components), sum(c.bytes for c in components))


def floor_s(
    components: list[Component], limits: Limits, rates: Mapping[str, float] | None = None
) -> float:
    """Return the seconds of components that follow one another; ``rates`` has FLOP/s by name where
    they are known.
    """
    known = {} if rates is None else rates
    return sum(c.floor_s(limits, known.get(c.name)) for c in components)


def forward_floor_s(size: Size, limits: Limits, rates: Mapping[str, float] | None = None) -> float:
    """Return the seconds of one forward pass."""
    return floor_s(forward(size), limits, rates)


def sampling_floor_s(size: Size, steps: int, limits: Limits) -> float:
    """Return the seconds of so many steps: text and times once, the rest at every step."""
    once = ("linear: text keys and values", "embeddings and projection out")
    parts = forward(size)
    return sum(c.floor_s(limits) * (1 if c.name in once else steps) for c in parts)


# Training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluations:
    """Counts the network's evaluations in one training step, in samples: without a gradient, and
    with one.
    """

    plain: int
    graded: int


def pretrain_evaluations(batch: int, flow_map_rows: int) -> dict[str, Evaluations]:
    """Count with guidance: ours evaluates t+- for the samples with r != t alone, the peers for the
    whole batch.
    """
    return {
        "ours": Evaluations(batch + 2 * flow_map_rows, batch),
        "peers' formulation": Evaluations(3 * batch, batch),
    }


def on_policy_evaluations(batch: int, segments: int = 3) -> dict[str, Evaluations]:
    """Count a generator step (rollout with gradient, three scores) and a critic step (rollout
    without, one score).
    """
    both = Evaluations((3 + segments) * batch, (segments + 1) * batch)
    return {"ours": both, "peers' formulation": both}


def training_floor_s(
    size: Size, evaluations: Evaluations, limits: Limits, rank: int = 256
) -> float:
    """Return the seconds of a step with adapters on a frozen network and every block checkpointed.

    With a gradient, everything runs forward twice. Backward is two more of attention (gradients of
    queries and keys, and of weights and values), of norms and of the adapters, but one of the
    frozen linear layers, whose weights get no gradient.
    """
    adapters = (
        2.0 * size.layers * size.tokens * rank * (8 * size.dim + 2 * (size.dim + size.ffn_dim))
    )
    seconds = adapters / limits.flops * (evaluations.plain + 4 * evaluations.graded)
    for component in forward(size):
        frozen = component.name.startswith(("linear", "embeddings"))
        count = evaluations.plain + (3 if frozen else 4) * evaluations.graded
        seconds += component.floor_s(limits) * count
    return seconds
