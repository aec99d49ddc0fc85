"""Provide attention to models: :func:`attention` on the best backend for the device.

The backends, the choice among them and the report are in :mod:`anyflow.ops.attention`.
"""

from anyflow.ops.attention.backends import ATTENTION_BACKENDS
from anyflow.ops.attention.choice import preference
from anyflow.ops.attention.dispatch import (
    _forced_backend,
    attention,
    require_backend,
    use_attention_backend,
)
from anyflow.ops.attention.report import AttentionChoice, attention_report

__all__ = [
    "ATTENTION_BACKENDS",
    "AttentionChoice",
    "_forced_backend",
    "attention",
    "attention_report",
    "preference",
    "require_backend",
    "use_attention_backend",
]
