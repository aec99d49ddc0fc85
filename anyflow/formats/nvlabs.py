"""Find the weights in NVlabs' training files: the average, or the parameters themselves.

A training file is a dictionary of ``torch.save`` with ``global_step``, ``world_size``, ``ema`` and
``model_state_dict_g``; a merged one has a single state dict. The names in both may be those of PEFT
(:mod:`anyflow.formats.adapter_keys`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anyflow.formats.errors import CheckpointFormatError

SECTIONS = {"ema": "ema", "raw": "model_state_dict_g"}


def training_weights(content: dict[str, Any], weights: str | None, path: Path) -> dict[str, Any]:
    """Return the state dict that a training file keeps, or the content of a file with only one.

    Args:
        content: what the file holds.
        weights: ``"ema"`` or ``"raw"``; None takes the average, or the only weights.
        path: names the file in errors.

    Raises:
        CheckpointFormatError: the file has no such weights.
    """
    present = [kind for kind, key in SECTIONS.items() if isinstance(content.get(key), dict)]
    if weights is None:
        return content[SECTIONS[present[0]]] if present else content
    if weights not in present:
        has = " and ".join(present) if present else "one set of weights only"
        raise CheckpointFormatError(f"weights={weights!r}: {path} has {has}")
    return content[SECTIONS[weights]]
