"""Timing: variants in interleaved rounds, so that what else the machine does hits all of them.

Kernels on a GPU are timed by replaying CUDA graphs of several calls, so that launch overhead stays
out; whole networks call by call, where it belongs to what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from op_cases import Call

from anyflow.ops import use_backend

CALLS = 10  # per graph: the launch of a graph costs as much as a small kernel
ROUNDS = 15

Step = Callable[[], object]
OnError = Callable[[str, Exception], None]
Samples = dict[str, list[float]]  # milliseconds of every round, by variant


def medians(samples: Samples) -> dict[str, float]:
    """Median milliseconds of each variant."""
    return {name: statistics.median(values) for name, values in samples.items()}


# Kernels ------------------------------------------------------------------------------------------


def variants(
    call: Call, direction: str, backends: tuple[str, ...], compiler: str | None = "inductor"
) -> dict[str, Step]:
    """One function for every backend and for the compiled reference, each of which runs one
    direction once.
    """
    # a compiled backward that runs many times keeps what it reads
    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()
    steps = {backend: _step(call, direction, backend, call.function) for backend in backends}
    if compiler is not None:
        compiled = torch.compile(call.function, fullgraph=True, backend=compiler)
        steps["compile"] = _step(call, direction, "eager", compiled)
    return steps


def _step(call: Call, direction: str, backend: str, function: Callable[..., object]) -> Step:
    own = Call(function, call.inputs, call.wanted, call.training)
    cuda = call.inputs[0].is_cuda

    def forward() -> object:
        with use_backend(backend), torch.set_grad_enabled(call.training):
            return own.outputs()

    if direction == "forward":
        return forward
    # Backward runs on the stream of its forward pass, which must be the one that the graph is
    # captured on.
    with use_backend(backend), torch.cuda.stream(_stream() if cuda else None):
        outputs = own.outputs()
        cotangents = [torch.randn_like(o) for o in outputs]
    if cuda:
        torch.cuda.synchronize()

    def backward() -> object:
        with use_backend(backend):
            return torch.autograd.grad(outputs, call.wanted, cotangents, retain_graph=True)

    return backward


_streams: list[torch.cuda.Stream] = []


def _stream() -> torch.cuda.Stream:
    if not _streams:
        _streams.append(torch.cuda.Stream())
    return _streams[0]


def kernels(
    steps: dict[str, Step],
    device: torch.device,
    rounds: int = ROUNDS,
    on_error: OnError | None = None,
) -> Samples:
    """Measure milliseconds of one call of each step, all of them in every round.

    Args:
        steps: by variant.
        device: they run on.
        rounds: of measurements.
        on_error: told of a step that raises, which is then left out; without it, the exception goes
            on.
    """
    if device.type != "cuda":
        return calls(steps, device, rounds=min(rounds, 3), on_error=on_error)[0]
    graphs = {}
    for name, step in steps.items():
        try:
            graphs[name] = _capture(step)
        except Exception as error:
            if on_error is None:
                raise
            on_error(name, error)
    steps = {name: steps[name] for name in graphs}
    samples: Samples = {name: [] for name in steps}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(start.elapsed_time(end) / CALLS)
    return samples


def captured(step: Step) -> Step:
    """The replay of a CUDA graph of one call, which writes the result where the captured call
    did.
    """
    return _capture(step, calls=1).replay


def _capture(step: Step, calls: int = CALLS) -> torch.cuda.CUDAGraph:
    with torch.cuda.stream(_stream()):
        for _ in range(min(calls, 3)):  # compiles, autotunes, fills the allocator
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream()):
        for _ in range(calls):
            step()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return graph


# Networks -----------------------------------------------------------------------------------------


def calls(
    steps: dict[str, Step],
    device: torch.device,
    rounds: int,
    goes_on: Callable[[], bool] = lambda: True,
    on_error: OnError | None = None,
) -> tuple[Samples, dict[str, int]]:
    """Measure milliseconds and peak bytes of every step, called once in each round; steps must be
    warm.

    Args:
        steps: by variant.
        device: they run on.
        rounds: at most; the first one is always finished.
        goes_on: asked before each further round.
        on_error: told of a step that raises, which is then left out; without it, the exception goes
            on.

    Returns:
        The samples, and on a GPU the most memory that was allocated during a call, weights
        included.
    """
    samples: Samples = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    for index in range(rounds):
        if index and not goes_on():
            break
        for name in list(samples):
            try:
                milliseconds, peak = once(steps[name], device)
            except Exception as error:
                if on_error is None:
                    raise
                del samples[name]
                on_error(name, error)
                continue
            samples[name].append(milliseconds)
            if peak is not None:
                peaks[name] = max(peaks.get(name, 0), peak)
    return samples, peaks


def once(step: Step, device: torch.device) -> tuple[float, int | None]:
    """Milliseconds of one call, and on a GPU the peak of the memory allocated during it."""
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return (time.perf_counter() - started) * 1e3, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result: Any = step()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end), torch.cuda.max_memory_allocated(device)


# Limits -------------------------------------------------------------------------------------------


def copies(device: torch.device, size: int) -> Samples:
    """Milliseconds of copies of ``size`` bytes on the device: the driver's, and one by an
    element-wise kernel.
    """
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    steps: dict[str, Step] = {
        "by the driver": lambda: target.copy_(source),
        "by a kernel": lambda: torch.bitwise_not(source, out=target),
    }
    return kernels(steps, device)


def copy_bandwidth(device: torch.device, size: int = 320 * 2**20) -> float:
    """Bytes/s, read plus written, of the faster copy of ``size`` bytes on the device."""
    return 2 * size / min(medians(copies(device, size)).values()) * 1e3


def matmul_rate(
    device: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16
) -> tuple[float, list[float]]:
    """FLOP/s of a product of random ``size x size`` matrices (of zeros, GPUs are faster), and its
    milliseconds.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    samples = kernels({"matmul": lambda: torch.mm(a, b, out=out)}, device)["matmul"]
    return 2 * size**3 / statistics.median(samples) * 1e3, samples
