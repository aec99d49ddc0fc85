"""Provide softmax attention: the native operator, and the choice among all backends of attention.

``operator.py`` is the operator with its reference and its C++ kernel; ``backends.py`` is the table
of backends; ``choice.py`` says which of them runs; ``dispatch.py`` runs it; ``report.py`` explains
it. What a model calls is imported from :mod:`anyflow.models.attention`.
"""

from anyflow.ops.attention.operator import (
    attention,
    attention_backward_reference,
    attention_reference,
)

__all__ = ["attention", "attention_backward_reference", "attention_reference"]
