"""Small measurements that decide what to build next: layouts, padding, epilogues, joined products,
launches, copies.

Every probe is recorded under its name: milliseconds, FLOPs or bytes where they mean something, and
the probe that it is to be compared with. Probes that are compared take turns in the same rounds. An
error is a result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timing
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import networks
from gpu.context import Context, Skip, last_line
from gpu.sizes import Size
from gpu.tiles import padded

ROUNDS = 5
COPIES_MIB = (32, 96, 320, 2048)  # below an L2 cache of 50 MiB, and above
# in memory: which axes are tokens and heads
LAYOUTS = {"[B, L, H, Dh]": (1, 2), "[B, H, L, Dh]": (2, 1)}


@dataclass(frozen=True)
class Probe:
    """Describes one measurement.

    Attributes:
        name: unique.
        step: what is timed.
        flops, moved: FLOPs, and bytes read plus written, of one call; None where no rate is wanted.
        against: the probe that it is compared with, or None.
        tokens: that it ran on, where padding is the question.
    """

    name: str
    step: timing.Step
    flops: float | None = None
    moved: float | None = None
    against: str | None = None
    tokens: int | None = None

    def entry(self, **result: Any) -> dict[str, Any]:
        """Return what is recorded, with a result: ``ms`` and ``samples_ms``, ``error`` or
        ``skipped``.
        """
        known = {
            "flops": self.flops,
            "bytes": self.moved,
            "against": self.against,
            "tokens": self.tokens,
        }
        return {name: value for name, value in known.items() if value is not None} | result


def run_probes(context: Context) -> None:
    """Measure every probe that the budget allows.

    Raises:
        Skip: the budget allowed none.
    """
    groups: list[tuple[str, float, Callable[[], list[Probe]], bool]] = []
    for size in context.sizes.values():
        groups.append((f"attention {size.name}", 4.0, partial(_attention, context, size), False))
    for size in context.sizes.values():
        groups.append(
            (f"feed-forward {size.name}", 5.0, partial(_feed_forward, context, size), True)
        )
        groups.append(
            (f"q, k, v {size.name}", 4.0, partial(_queries_keys_values, context, size), True)
        )
    groups.append(("copy", 2.0, partial(_copies, context), True))
    for name, seconds, make, graphs in groups:
        if not context.affords(seconds):
            context.put(name, {"skipped": "budget"})
            continue
        try:
            _measure(context, make(), graphs)
        except Exception as error:
            context.put(name, {"error": last_line(error)})
            _recover(context)
    _host(context)
    entries = context.file.section(context.name)["data"].values()
    if any("ms" in entry for entry in entries):
        return
    errors = [str(entry["error"]) for entry in entries if "error" in entry]
    if not errors:
        raise Skip("budget")
    context.fail(f"no probe was measured: {errors[0]}")


def _measure(context: Context, probes: list[Probe], graphs: bool) -> None:
    """Time probes in the same rounds; one that fails is recorded and leaves the others alone.

    Args:
        context: of the run.
        probes: with inputs that exist already.
        graphs: replay CUDA graphs of several calls, so that launches stay out; for what takes less
            than about 10 ms.
    """
    able: dict[str, Probe] = {}
    for probe in probes:
        try:
            probe.step()
            timing.once(probe.step, context.device)
            able[probe.name] = probe
        except Exception as error:
            context.put(probe.name, probe.entry(error=last_line(error)))
            _recover(context)
    steps = {name: probe.step for name, probe in able.items()}
    if graphs:
        samples = timing.kernels(steps, context.device, ROUNDS)
    else:
        samples, _ = timing.calls(steps, context.device, ROUNDS)
    for name, values in samples.items():
        context.put(name, able[name].entry(ms=statistics.median(values), samples_ms=values))


def _recover(context: Context) -> None:
    """Give memory back after an error; raise where the error has broken the device."""
    if context.cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _draw(context: Context, *shape: int) -> Tensor:
    return torch.randn(shape, device=context.device, dtype=context.dtype)


# Attention ----------------------------------------------------------------------------------------


def _attention(context: Context, size: Size) -> list[Probe]:
    """Compare torch's kernels, two layouts in memory, and a number of tokens that is a multiple of
    every tile.
    """
    first, second = (
        (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
        if context.cuda
        else (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    )
    ours, heads_first = LAYOUTS
    probes = []
    for tokens in (size.tokens, padded(size.tokens)):
        for kernel, layout in ((first, ours), (first, heads_first), (second, ours)):
            name = partial(_attention_name, size)
            against = None
            if tokens != size.tokens:
                against = name(kernel, size.tokens, layout)
            elif (kernel, layout) != (first, ours):
                against = name(first, tokens, ours)
            step = partial(_attend, kernel, *_attention_inputs(context, size, tokens, layout))
            flops = 4.0 * tokens**2 * size.dim
            probes.append(
                Probe(name(kernel, tokens, layout), step, flops, against=against, tokens=tokens)
            )
    return probes


def _attention_name(size: Size, kernel: SDPBackend, tokens: int, layout: str) -> str:
    backend = kernel.name.removesuffix("_ATTENTION").lower()
    return f"attention {size.name}: {backend}, {tokens} tokens, {layout} in memory"


def _attention_inputs(context: Context, size: Size, tokens: int, layout: str) -> list[Tensor]:
    """Draw queries, keys and values ``[1, H, L, Dh]`` that lie in memory as the layout says."""
    axes = LAYOUTS[layout]
    shape = [1, size.head_dim, size.head_dim, size.head_dim]
    shape[axes[0]], shape[axes[1]] = tokens, size.heads
    drawn = [_draw(context, *shape) for _ in range(3)]
    return [t.transpose(1, 2) for t in drawn] if axes == (1, 2) else drawn


def _attend(kernel: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with torch.no_grad(), sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(query, key, value)


# Products -----------------------------------------------------------------------------------------


def _feed_forward(context: Context, size: Size) -> list[Probe]:
    """Compare the first product of the feed-forward alone, then a GELU, and with the GELU in its
    epilogue.
    """
    weight, bias = (
        _draw(context, size.ffn_dim, size.dim) / size.dim**0.5,
        _draw(context, size.ffn_dim),
    )
    probes = []
    for rows in (size.tokens, padded(size.tokens)):
        x, flops = _draw(context, rows, size.dim), 2.0 * rows * size.dim * size.ffn_dim
        variants: dict[str, timing.Step] = {
            "product": partial(F.linear, x, weight, bias),
            "product, then GELU": partial(_then_gelu, x, weight, bias),
            "GELU in the epilogue": partial(
                torch._addmm_activation, bias, x, weight.t(), use_gelu=True
            ),
        }
        beside = {"GELU in the epilogue": "product, then GELU"}
        probes += _products(f"feed-forward {size.name}", size.tokens, rows, variants, beside, flops)
    return probes


def _queries_keys_values(context: Context, size: Size) -> list[Probe]:
    """Compare three products with the same input to one of three times the width."""
    weights = [_draw(context, size.dim, size.dim) / size.dim**0.5 for _ in range(3)]
    biases = [_draw(context, size.dim) for _ in range(3)]
    joined, joined_bias = torch.cat(weights), torch.cat(biases)
    probes = []
    for rows in (size.tokens, padded(size.tokens)):
        x, flops = _draw(context, rows, size.dim), 6.0 * rows * size.dim**2
        variants: dict[str, timing.Step] = {
            "apart": partial(_apart, x, weights, biases),
            "in one": partial(F.linear, x, joined, joined_bias),
        }
        probes += _products(
            f"q, k, v {size.name}", size.tokens, rows, variants, {"in one": "apart"}, flops
        )
    return probes


def _then_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _apart(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _products(
    family: str,
    tokens: int,
    rows: int,
    variants: dict[str, timing.Step],
    beside: dict[str, str],
    flops: float,
) -> list[Probe]:
    """Name the variants; padded rows are compared with as many as there are tokens."""
    probes = []
    for variant, step in variants.items():
        against = None
        if rows != tokens:
            against = f"{family}: {variant}, {tokens} rows"
        elif variant in beside:
            against = f"{family}: {beside[variant]}, {rows} rows"
        probes.append(
            Probe(f"{family}: {variant}, {rows} rows", step, flops, against=against, tokens=rows)
        )
    return probes


# Copies -------------------------------------------------------------------------------------------


def _copies(context: Context) -> list[Probe]:
    """Compare copies by size: what fits into the L2 cache is faster than the memory."""
    probes = []
    for mebibytes in (1, 2) if context.tiny else COPIES_MIB:
        source = torch.randint(
            0, 255, (mebibytes * 2**20,), device=context.device, dtype=torch.uint8
        )
        target = torch.empty_like(source)
        probes.append(
            Probe(
                f"copy: {mebibytes} MiB", partial(target.copy_, source), moved=2.0 * source.numel()
            )
        )
    return probes


# Host ---------------------------------------------------------------------------------------------


def _host(context: Context) -> None:
    """Time a 1.3B forward of one latent frame: until the host has enqueued it, whole, and as a CUDA
    graph.

    So few tokens leave the device waiting for the host, which a video of full length hides.
    """
    size = context.sizes["1.3B"]
    size = replace(size, latents=(1, *size.latents[1:]))
    family = f"host {size.name}, one frame"
    if not context.affords(8.0):
        context.put(family, {"skipped": "budget"})
        return
    try:
        _require_right_kernels(context)
        model, data = networks.build(context, size), networks.inputs(context, size)
        step = partial(_call, model, data.ours())
        launched, graph = f"{family}: launched", f"{family}: CUDA graph"
        _measure(context, [Probe(launched, step)], graphs=False)
        values = _enqueue(context, step)
        probe = Probe(f"{family}: until enqueued", step, against=launched)
        context.put(probe.name, probe.entry(ms=statistics.median(values), samples_ms=values))
        if context.cuda:
            replay = Probe(graph, timing.captured(step), against=launched)
            _measure(context, [Probe(launched, step), replay], graphs=False)
        else:
            context.put(graph, {"skipped": "needs a GPU"})
    except Skip as skip:
        context.put(family, {"skipped": str(skip)})
    except Exception as error:
        context.put(family, {"error": last_line(error)})
        _recover(context)


def _require_right_kernels(context: Context) -> None:
    backend = "triton" if context.cuda else "native"
    wrong = sorted(op for op, backends in context.wrong_kernels().items() if backend in backends)
    if wrong:
        raise Skip(f"a wrong kernel is not timed: {', '.join(wrong)}")


def _call(model: Any, arguments: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(*arguments, return_dict=False)[0]
        return result


def _enqueue(context: Context, step: timing.Step) -> list[float]:
    """Return the milliseconds until a call returns, with nothing left to do on the device before
    it.
    """
    samples = []
    for _ in range(ROUNDS):
        if context.cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        samples.append((time.perf_counter() - started) * 1e3)
    if context.cuda:
        torch.cuda.synchronize()
    return samples
