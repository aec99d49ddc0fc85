"""Measure what decides whether launches and caches matter on a device.

A probe is recorded under its name: milliseconds, bytes where a rate means something, and the probe
that it is to be compared with. An error is a result. Layouts of attention, padded tokens, epilogues
and joined products were probed on an H200 and are answered: ``benchmarks/results`` has them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from model.bench_model import forward
from timing import OURS, Step, captured

from gpu.run import DeviceRun, Skip, last_line
from gpu.sections import FORWARD

ROUNDS = 5
COPIES_MIB = (32, 96, 320, 2048)  # below an L2 cache of 50 MiB, and above
HOST = "host 1.3B, one frame"


def run_probes(run: DeviceRun) -> None:
    """Measure the probes that the budget allows.

    Raises:
        Skip: the budget allowed none.
    """
    left = 0
    for name, seconds, probe in (("copy", 2.0, _copies), (HOST, 8.0, _host)):
        if not run.affords(seconds):
            run.put(name, {"skipped": "budget"})
            left += 1
            continue
        try:
            probe(run)
        except Skip as skip:
            run.put(name, {"skipped": str(skip)})
        except Exception as error:
            run.put(name, {"error": last_line(error)})
            run.fail(f"{name}: {last_line(error)}")
            run.recover()
    if left == 2:
        raise Skip("budget")


def _measure(
    run: DeviceRun, steps: dict[str, Step], known: dict[str, dict[str, Any]], graphs: bool
) -> None:
    """Time warm steps beside each other; one that fails is recorded and costs no other."""
    problems: dict[str, str] = {}
    timed = run.time(steps, ROUNDS, problems, graphs)
    for name in steps:
        found = {"error": problems[name]} if name in problems else timed.milliseconds(name)
        run.put(name, known.get(name, {}) | found)


def _copies(run: DeviceRun) -> None:
    """Compare copies by size: what fits into the L2 cache is faster than the memory."""
    steps, known = {}, {}
    for mebibytes in (1, 2) if run.tiny else COPIES_MIB:
        name, size = f"copy: {mebibytes} MiB", mebibytes * 2**20
        source = torch.randint(0, 255, (size,), device=run.device, dtype=torch.uint8)
        steps[name] = partial(torch.empty_like(source).copy_, source)
        known[name] = {"bytes": 2.0 * size}
    _measure(run, steps, known, graphs=True)


def _host(run: DeviceRun) -> None:
    """Compare a 1.3B forward of one latent frame, launched, with its CUDA graph.

    Few tokens leave the device waiting for the host, which a video of full length hides; so the
    time until the host has enqueued a call is measured too.
    """
    run.require_right_kernels(FORWARD)
    size = run.sizes["1.3B"]
    step = forward(replace(size, latents=(1, *size.latents[1:])), run.place).makers[OURS]()
    launched, graph, samples = f"{HOST}: launched", f"{HOST}: CUDA graph", []
    step()
    for _ in range(ROUNDS):
        if run.cuda:
            torch.cuda.synchronize()  # nothing is left to do on the device
        started = time.perf_counter()
        step()
        samples.append((time.perf_counter() - started) * 1e3)
    enqueued = {"against": launched, "ms": statistics.median(samples), "samples_ms": samples}
    run.put(f"{HOST}: until enqueued", enqueued)
    steps = {launched: step}
    if run.cuda:
        steps[graph] = captured(step)
    else:
        run.put(graph, {"skipped": "needs a GPU"})
    _measure(run, steps, {graph: {"against": launched}}, graphs=False)
