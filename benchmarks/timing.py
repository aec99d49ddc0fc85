"""Timing on a CUDA device: CUDA graphs, so that launch overhead stays out, replayed in interleaved rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch._functorch.config
from op_cases import Call

from anyflow.ops import use_backend

CALLS = 10  # per graph: the launch of a graph costs as much as a small kernel
ROUNDS = 15

Step = Callable[[], object]


def variants(call: Call, direction: str) -> dict[str, Step]:
    """Triton, eager and compiled reference; each a function that runs one direction once."""
    torch._functorch.config.donated_buffer = False  # a compiled backward that runs many times keeps what it reads
    torch._dynamo.reset()
    return {
        "triton": _step(call, direction, "triton", call.function),
        "eager": _step(call, direction, "eager", call.function),
        "compile": _step(call, direction, "eager", torch.compile(call.function, fullgraph=True)),
    }


def _step(call: Call, direction: str, backend: str, function: Callable[..., object]) -> Step:
    own = Call(function, call.inputs, call.wanted, call.training)

    def forward() -> object:
        with use_backend(backend), torch.set_grad_enabled(call.training):
            return own.outputs()

    if direction == "forward":
        return forward
    # Backward runs on the stream of its forward pass, which must be the one that the graph is captured on.
    with use_backend(backend), torch.cuda.stream(_stream()):
        outputs = own.outputs()
        cotangents = [torch.randn_like(o) for o in outputs]
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


def interleaved(steps: dict[str, Step]) -> dict[str, float]:
    """Median milliseconds of each step, all of them measured in every round."""
    graphs = {name: _capture(step) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


def _capture(step: Step) -> torch.cuda.CUDAGraph:
    with torch.cuda.stream(_stream()):
        for _ in range(3):  # compiles, autotunes, fills the allocator
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream()):
        for _ in range(CALLS):
            step()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return graph


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """GB/s, read plus written, of a device-to-device copy of one GiB: what the operators are measured against."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = interleaved({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * size / milliseconds / 1e6
