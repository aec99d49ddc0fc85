"""Loading a transformer from a diffusers folder of safetensors, against diffusers'
``from_pretrained``.

The file is in the system's cache, so that the disk is no part of it. A step also reads every weight
once: diffusers maps a file of the right dtype into memory and copies nothing, which only moves the
reading to the first use.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import peers
import pytest
import torch
from interleave import OURS
from peers import SMALL, WAN_1B, Size
from torch import Tensor
from workloads import Contest, Line, Setting, Workload

from anyflow.formats import load_transformer

DIFFUSERS = "diffusers"
MEDIUM = Size("110M", 12, 64, 12, 3072, 1024, 32, (1, 5, 16, 32, 32))


def _load(size: Size, setting: Setting) -> Contest:
    import diffusers

    peer, _ = peers.models(size, setting.device)
    folder = setting.folder / "transformer"
    peer.save_pretrained(folder)
    num_bytes = sum(p.numel() * p.element_size() for p in peer.parameters())
    del peer

    @torch.no_grad()
    def read(model: Any) -> Tensor:
        """The sum of each parameter; the model itself goes before the next one comes."""
        return torch.stack([p.float().sum() for _, p in sorted(model.named_parameters())])

    def ours() -> Tensor:
        return read(load_transformer(folder, dtype=size.dtype, device=setting.device))

    def theirs() -> Tensor:
        model = diffusers.AnyFlowTransformer3DModel.from_pretrained(folder, torch_dtype=size.dtype)
        return read(model.to(setting.device))

    # from the file, to the model, and once more
    return Contest({OURS: ours, DIFFUSERS: theirs}, bytes=3 * num_bytes)


def _workload(size: Size, device: str, quick: bool = False) -> Workload:
    name = f"loading/transformer/{size.label}"
    return Workload(
        name, (DIFFUSERS,), partial(_load, size), device, size.dtype, quick, memory=True
    )


WORKLOADS = [
    _workload(SMALL, "cpu", quick=True),
    _workload(MEDIUM, "cpu"),
    _workload(WAN_1B, "cuda"),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_loading(workload: Workload, measured: Line) -> None:
    """From files to a model on the device."""
