"""Loading a transformer from a diffusers folder of safetensors, against diffusers' ``from_pretrained``.

The file is in the system's cache, so that the disk is no part of it; what is left is copying and bookkeeping.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import peers
import pytest
from interleave import OURS
from peers import SMALL, WAN_1B, Size
from torch import Tensor
from workloads import Contest, Line, Setting, Workload

from anyflow.checkpoints import load_transformer

DIFFUSERS = "diffusers"
MEDIUM = Size("110M", 12, 64, 12, 3072, 1024, 32, (1, 5, 16, 32, 32))


def _load(size: Size, setting: Setting) -> Contest:
    import diffusers

    peer, _ = peers.models(size, setting.device)
    folder = setting.folder / "transformer"
    peer.save_pretrained(folder)
    num_bytes = sum(p.numel() * p.element_size() for p in peer.parameters())
    del peer

    def checked(model: Any) -> list[Tensor]:
        """A matrix of the first and of the last block; the model itself goes before the next one comes."""
        return [model.blocks[i].ffn.net[2].weight.detach().clone() for i in (0, -1)]

    def ours() -> list[Tensor]:
        return checked(load_transformer(folder, dtype=size.dtype, device=setting.device))

    def theirs() -> list[Tensor]:
        model = diffusers.AnyFlowTransformer3DModel.from_pretrained(folder, torch_dtype=size.dtype)
        return checked(model.to(setting.device))

    return Contest({OURS: ours, DIFFUSERS: theirs}, bytes=2 * num_bytes)  # read once, written once


def _workload(size: Size, device: str, quick: bool = False) -> Workload:
    name = f"loading/transformer/{size.label}"
    return Workload(name, (DIFFUSERS,), partial(_load, size), device, size.dtype, quick, memory=True)


WORKLOADS = [_workload(SMALL, "cpu", quick=True), _workload(MEDIUM, "cpu"), _workload(WAN_1B, "cuda")]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_loading(workload: Workload, measured: Line) -> None:
    """From files to a model on the device."""
