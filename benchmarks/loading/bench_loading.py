"""Time loading a transformer from a diffusers folder against diffusers' ``from_pretrained``.

The file is in the system's cache, so that the disk is no part of it. A step also reads every weight
once: diffusers maps a file of the right dtype into memory and copies nothing, which only moves the
reading to the first use.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import networks
import torch
from sizes import MEDIUM, PUBLISHED, SMALL, NetworkSize
from timing import OURS
from torch import Tensor
from workloads import Contest, Line, Place, Workload

from anyflow.formats import load_transformer

DIFFUSERS = "diffusers"


def _load(size: NetworkSize, place: Place) -> Contest:
    import diffusers

    peer = networks.peer(size, networks.ours(size, place.device))
    folder = place.folder / "transformer"
    peer.save_pretrained(folder)
    num_bytes = sum(p.numel() * p.element_size() for p in peer.parameters())
    del peer

    @torch.no_grad()
    def read(model: Any) -> Tensor:
        """Return the sum of each parameter; the model itself goes before the next one comes."""
        return torch.stack([p.float().sum() for _, p in sorted(model.named_parameters())])

    def ours() -> Tensor:
        return read(load_transformer(folder, dtype=size.dtype, device=place.device))

    def theirs() -> Tensor:
        model = diffusers.AnyFlowTransformer3DModel.from_pretrained(folder, torch_dtype=size.dtype)
        return read(model.to(place.device))

    # from the file, to the model, and once more
    return Contest({OURS: lambda: ours, DIFFUSERS: lambda: theirs}, bytes=3 * num_bytes)


def _workload(size: NetworkSize, device: str, quick: bool = False) -> Workload:
    name, build = f"loading/transformer/{size.name}", partial(_load, size)
    return Workload(name, (DIFFUSERS,), build, device, size.dtype, quick, memory=True)


WORKLOADS = [
    _workload(SMALL, "cpu", quick=True),
    _workload(MEDIUM, "cpu"),
    _workload(PUBLISHED["1.3B"], "cuda"),
]


def bench_loading(workload: Workload, measured: Line) -> None:
    """Time the way from files to a model on the device."""
