"""List the problems of a checkpoint, for ``load_transformer``, ``convert`` and ``inspect``."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow.formats.checkpoint import Checkpoint
from anyflow.models import AnyFlowTransformer3DModel


def problems_of(
    checkpoint: Checkpoint,
    model: AnyFlowTransformer3DModel,
    *,
    dtype: torch.dtype | None = None,
    bidirectional: bool = False,
) -> list[str]:
    """List everything for which a checkpoint cannot be loaded; empty for a sound checkpoint.

    Args:
        checkpoint: open.
        model: model of its architecture; the parameters may be on the meta device.
        dtype, bidirectional: of ``load_transformer``.
    """
    lines = [
        *_of_kind(checkpoint, bidirectional),
        *_of_adapters(checkpoint),
        *checkpoint.differences(model),
    ]
    stored = stored_dtypes(checkpoint, names_in_fp32(model))
    if dtype is None and len(stored) > 1:
        lines.append(f"the parameters are stored in {' and '.join(stored)}; give dtype")
    return lines


def stored_dtypes(checkpoint: Checkpoint, wide: set[str]) -> list[str]:
    """Return the types of the parameters whose type ``dtype`` decides, by name, sorted."""
    infos = checkpoint.reader.infos
    return sorted({infos[own].dtype for name, own in checkpoint.names.items() if name not in wide})


def names_in_fp32(model: AnyFlowTransformer3DModel) -> set[str]:
    """Return the names of the parameters that are fp32 at least in any case, as in diffusers."""
    kept = set(model._keep_in_fp32_modules)
    return {name for name, _ in model.named_parameters() if kept & set(name.split("."))}


def others_left_out(checkpoint: Checkpoint) -> str:
    """Name the other models' tensors in a checkpoint's file, which nothing reads."""
    return ", ".join(f"{count} tensors of {part}" for part, count in checkpoint.others.items())


class FiniteWeights:
    """Find the tensors with NaN or infinity among those of a model, by one reduction for each.

    The results stay where the tensors are until :meth:`not_finite` is called, so that a device is
    waited for once.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._extremes: list[Tensor] = []

    @torch.no_grad()
    def add(self, name: str, tensor: Tensor) -> None:
        """Reduce one tensor; a tensor with NaN has NaN as its smallest and largest value."""
        if tensor.numel() and not tensor.is_meta:
            self._names.append(name)
            self._extremes.append(torch.stack(torch.aminmax(tensor)).float())

    def not_finite(self) -> list[str]:
        """Return the names of the tensors with NaN or infinity, in the order of :meth:`add`."""
        if not self._extremes:
            return []
        finite = torch.stack(self._extremes).isfinite().all(1).tolist()
        return [name for name, whole in zip(self._names, finite, strict=True) if not whole]


def _of_kind(checkpoint: Checkpoint, bidirectional: bool) -> list[str]:
    return ["bidirectional=True is for causal models, but it is not one"] * (
        bidirectional and not checkpoint.is_causal
    )


def _of_adapters(checkpoint: Checkpoint) -> list[str]:
    adapters = checkpoint.reader.adapters
    if not adapters or checkpoint.reader.alpha is not None:
        return []
    ranks = ", ".join(str(r) for r in sorted({a.rank for a in adapters.values()}))
    return [
        f"it has {len(adapters)} adapters of rank {ranks}, but not their alpha; give lora_alpha "
        "(--lora-alpha)"
    ]
