"""Measure what decides what to build next: layouts, padding, epilogues, joined products, launches.

Every probe is recorded under its name: milliseconds, FLOPs or bytes where they mean something, and
the probe that it is to be compared with. Probes of a group take turns in the same rounds. An error
is a result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from model.bench_model import forward
from sizes import NetworkSize
from timing import OURS, Step, captured
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.run import DeviceRun, Skip, last_line
from gpu.sections import FORWARD

ROUNDS = 5
PADDING = 128  # tokens are padded to a multiple of every tile
COPIES_MIB = (32, 96, 320, 2048)  # below an L2 cache of 50 MiB, and above
# in memory: which axes are tokens and heads
LAYOUTS = {"[B, L, H, Dh]": (1, 2), "[B, H, L, Dh]": (2, 1)}


@dataclass(frozen=True)
class Probe:
    """Describe one measurement.

    Attributes:
        name: unique.
        step: what is timed.
        known: ``flops`` and ``bytes`` (read plus written) of one call, where a rate is wanted; the
            ``tokens`` that it ran on, where padding is the question; ``against``, the probe that
            it is compared with.
    """

    name: str
    step: Step
    known: dict[str, Any]


def run_probes(run: DeviceRun) -> None:
    """Measure every probe that the budget allows.

    Raises:
        Skip: the budget allowed none.
    """
    groups: list[tuple[str, float, Callable[[], list[Probe]], bool]] = []
    for size in run.sizes.values():
        groups += [
            (f"attention {size.name}", 4.0, partial(_attention, run, size), False),
            (f"feed-forward {size.name}", 5.0, partial(_feed_forward, run, size), True),
            (f"q, k, v {size.name}", 4.0, partial(_queries_keys_values, run, size), True),
        ]
    one_frame = f"host {run.sizes['1.3B'].name}, one frame"
    groups += [
        ("copy", 2.0, partial(_copies, run), True),
        (one_frame, 8.0, partial(_host, run, one_frame), False),
    ]
    for name, seconds, make, graphs in groups:
        if not run.affords(seconds):
            run.put(name, {"skipped": "budget"})
            continue
        try:
            _measure(run, make(), graphs)
        except Skip as skip:
            run.put(name, {"skipped": str(skip)})
        except Exception as error:
            run.put(name, {"error": last_line(error)})
            run.recover()
    entries = run.file.section(run.name)["data"].values()
    if any("ms" in entry for entry in entries):
        return
    errors = [str(entry["error"]) for entry in entries if "error" in entry]
    if not errors:
        raise Skip("budget")
    run.fail(f"no probe was measured: {errors[0]}")


def _measure(run: DeviceRun, probes: list[Probe], graphs: bool) -> None:
    """Time probes beside each other; one that fails is recorded and leaves the others alone."""
    problems: dict[str, str] = {}
    for probe in probes:
        run.attempt(problems, probe.name, probe.step)
    steps = {probe.name: probe.step for probe in probes if probe.name not in problems}
    timed = run.time(steps, ROUNDS, problems, graphs)
    for probe in probes:
        found = (
            timed.milliseconds(probe.name)
            if probe.name in timed.steps
            else {"error": problems[probe.name]}
        )
        run.put(probe.name, probe.known | found)


def _draw(run: DeviceRun, *shape: int) -> Tensor:
    return torch.randn(shape, device=run.device, dtype=run.dtype)


def _counts(size: NetworkSize) -> tuple[int, int]:
    return size.tokens, -(-size.tokens // PADDING) * PADDING


def _attention(run: DeviceRun, size: NetworkSize) -> list[Probe]:
    """Compare torch's kernels, two layouts in memory, and a padded number of tokens."""
    first, second = (
        (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
        if run.cuda
        else (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    )
    layout, heads_first = LAYOUTS

    def name(kernel: SDPBackend, tokens: int, layout: str) -> str:
        backend = kernel.name.removesuffix("_ATTENTION").lower()
        return f"attention {size.name}: {backend}, {tokens} tokens, {layout} in memory"

    probes = []
    for tokens in _counts(size):
        for kernel, memory in ((first, layout), (first, heads_first), (second, layout)):
            known: dict[str, Any] = {"flops": 4.0 * tokens**2 * size.dim, "tokens": tokens}
            if tokens != size.tokens:
                known["against"] = name(kernel, size.tokens, memory)
            elif (kernel, memory) != (first, layout):
                known["against"] = name(first, tokens, layout)
            step = partial(_attend, kernel, *_attention_inputs(run, size, tokens, memory))
            probes.append(Probe(name(kernel, tokens, memory), step, known))
    return probes


def _attention_inputs(run: DeviceRun, size: NetworkSize, tokens: int, layout: str) -> list[Tensor]:
    """Draw queries, keys and values ``[1, H, L, Dh]`` that lie in memory as the layout says."""
    axes = LAYOUTS[layout]
    shape = [1, size.head_dim, size.head_dim, size.head_dim]
    shape[axes[0]], shape[axes[1]] = tokens, size.heads
    drawn = [_draw(run, *shape) for _ in range(3)]
    return [t.transpose(1, 2) for t in drawn] if axes == (1, 2) else drawn


def _attend(kernel: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with torch.no_grad(), sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(query, key, value)


def _feed_forward(run: DeviceRun, size: NetworkSize) -> list[Probe]:
    """Compare the first product of the feed-forward alone, before a GELU, and with it inside."""
    weight = _draw(run, size.ffn_dim, size.dim) / size.dim**0.5
    bias, probes = _draw(run, size.ffn_dim), []
    for count in _counts(size):
        x = _draw(run, count, size.dim)
        variants = {
            "product": partial(F.linear, x, weight, bias),
            "product, then GELU": partial(_then_gelu, x, weight, bias),
            "GELU in the epilogue": partial(
                torch._addmm_activation, bias, x, weight.t(), use_gelu=True
            ),
        }
        beside = {"GELU in the epilogue": "product, then GELU"}
        flops = 2.0 * count * size.dim * size.ffn_dim
        probes += _products(f"feed-forward {size.name}", size, count, variants, beside, flops)
    return probes


def _then_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _queries_keys_values(run: DeviceRun, size: NetworkSize) -> list[Probe]:
    """Compare three products with the same input to one of three times the width."""
    weights = [_draw(run, size.dim, size.dim) / size.dim**0.5 for _ in range(3)]
    biases = [_draw(run, size.dim) for _ in range(3)]
    joined, joined_bias, probes = torch.cat(weights), torch.cat(biases), []
    for count in _counts(size):
        x = _draw(run, count, size.dim)
        variants: dict[str, Step] = {
            "apart": partial(_apart, x, weights, biases),
            "in one": partial(F.linear, x, joined, joined_bias),
        }
        beside, flops = {"in one": "apart"}, 6.0 * count * size.dim**2
        probes += _products(f"q, k, v {size.name}", size, count, variants, beside, flops)
    return probes


def _apart(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _products(
    family: str,
    size: NetworkSize,
    count: int,
    variants: dict[str, Step],
    beside: dict[str, str],
    flops: float,
) -> list[Probe]:
    """Name the variants on ``count`` tokens; padded ones are compared with the plain ones."""
    probes = []
    for variant, step in variants.items():
        known: dict[str, Any] = {"flops": flops, "tokens": count}
        if count != size.tokens:
            known["against"] = f"{family}: {variant}, {size.tokens} rows"
        elif variant in beside:
            known["against"] = f"{family}: {beside[variant]}, {count} rows"
        probes.append(Probe(f"{family}: {variant}, {count} rows", step, known))
    return probes


def _copies(run: DeviceRun) -> list[Probe]:
    """Compare copies by size: what fits into the L2 cache is faster than the memory."""
    probes = []
    for mebibytes in (1, 2) if run.tiny else COPIES_MIB:
        size = mebibytes * 2**20
        source = torch.randint(0, 255, (size,), device=run.device, dtype=torch.uint8)
        step = partial(torch.empty_like(source).copy_, source)
        probes.append(Probe(f"copy: {mebibytes} MiB", step, {"bytes": 2.0 * size}))
    return probes


def _host(run: DeviceRun, family: str) -> list[Probe]:
    """Compare a 1.3B forward of one latent frame, launched, with its CUDA graph.

    Few tokens leave the device waiting for the host, which a video of full length hides. Recorded
    at once is the time until the host has enqueued a call.
    """
    run.require_right_kernels(FORWARD)
    size = run.sizes["1.3B"]
    step = forward(replace(size, latents=(1, *size.latents[1:])), run.place).makers[OURS]()
    launched, samples = f"{family}: launched", []
    step()
    for _ in range(ROUNDS):
        if run.cuda:
            torch.cuda.synchronize()  # nothing is left to do on the device
        started = time.perf_counter()
        step()
        samples.append((time.perf_counter() - started) * 1e3)
    enqueued = {"against": launched, "ms": statistics.median(samples), "samples_ms": samples}
    run.put(f"{family}: until enqueued", enqueued)
    if not run.cuda:
        run.put(f"{family}: CUDA graph", {"skipped": "needs a GPU"})
        return [Probe(launched, step, {})]
    graph = Probe(f"{family}: CUDA graph", captured(step), {"against": launched})
    return [Probe(launched, step, {}), graph]
