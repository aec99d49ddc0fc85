"""Measure how fast a run is: samples, tokens and model FLOPs a second, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from anyflow.training.distributed import Mesh
from anyflow.training.flops import peak_flops


class Throughput:
    """Count the work since the last line of metrics, and the time that training took for it.

    Args:
        mesh: this process's place in the run.
        tokens: tokens of a video, after patches.
        bf16: whether the networks run in bfloat16, for which the devices' peaks are.
    """

    def __init__(self, mesh: Mesh, tokens: int, *, bf16: bool) -> None:
        self._mesh, self._tokens = mesh, tokens
        self._peak = (
            peak_flops(torch.cuda.get_device_name(mesh.device))
            if mesh.device.type == "cuda" and bf16
            else None
        )
        self._begin, self._seconds = time.monotonic(), 0.0
        self._samples = self._flops = 0

    def add(self, samples: int, flops: int) -> None:
        """Note an update: the samples of all ranks, and the model FLOPs for them."""
        self._samples += samples
        self._flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of what is not training: validation, checkpoints, previews."""
        self._seconds += time.monotonic() - self._begin
        yield
        self._begin = time.monotonic()

    def take(self) -> dict[str, float]:
        """Return the rates and the largest rank's peak of memory since the last call.

        Collective, while paused.

        ``samples_per_second`` and ``tokens_per_second`` are of all ranks, a sample counted once
        however often the networks see it; ``tflops_per_second`` is of each device, and ``mfu`` what
        that is of the device's peak, where it is known; ``peak_memory_gb`` is what tensors took on
        a CUDA device, elsewhere the process's memory so far.
        """
        seconds = max(self._seconds, 1e-9)
        rate = self._flops / seconds / self._mesh.world_size
        values = {
            "samples_per_second": self._samples / seconds,
            "tokens_per_second": self._samples * self._tokens / seconds,
            "tflops_per_second": rate / 1e12,
        }
        if self._peak is not None:
            values["mfu"] = rate / self._peak
        values["peak_memory_gb"] = _peak_memory(self._mesh) / 1e9
        self._samples, self._flops, self._seconds = 0, 0, 0.0
        return values


def _peak_memory(mesh: Mesh) -> int:
    """Return the bytes of the rank that needed most."""
    if mesh.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(mesh.device)
        torch.cuda.reset_peak_memory_stats(mesh.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if mesh.world_size == 1:
        return peak
    peaks = torch.tensor(peak, device=mesh.device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    return int(peaks)
