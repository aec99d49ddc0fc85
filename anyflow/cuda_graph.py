"""Keep the former place of :mod:`anyflow.models.cuda_graph` working; importing from here warns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from anyflow.utils.moved import moved

__all__ = ["CudaGraphTransformer"]

if TYPE_CHECKING:
    from anyflow.models.cuda_graph import CudaGraphTransformer
else:
    __getattr__ = moved(__name__, "anyflow.models.cuda_graph", __all__)
