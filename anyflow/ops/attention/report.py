"""Explain the choice of a backend of attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anyflow.ops.attention.backends import ATTENTION_BACKENDS, AttentionCall, unsupported
from anyflow.ops.attention.choice import allowed, automatic, describe_call, unavailable
from anyflow.ops.attention.dispatch import _forced_backend
from anyflow.ops.backend import forced_backend
from anyflow.utils.devices import default_device


@dataclass(frozen=True)
class AttentionChoice:
    """Hold one line of :func:`attention_report`.

    Attributes:
        name: the backend.
        available: whether it runs here for the tensors asked about.
        chosen: whether :func:`anyflow.models.attention.attention` runs it for them.
        reason: why, or why not, in one phrase.
    """

    name: str
    available: bool
    chosen: bool
    reason: str


def attention_report(
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    requires_grad: bool = False,
) -> dict[str, AttentionChoice]:
    """Explain for every backend whether it runs on a device, whether it is chosen, and why.

    Args:
        device: None means CUDA where torch finds it, else the CPU.
        dtype: dtype of query, key and value.
        head_dim: Dh.
        requires_grad: whether a gradient is needed.

    Returns:
        Backend name to :class:`AttentionChoice`. None is chosen where a forced backend cannot run.
    """
    device = default_device() if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    call = describe_call(device, dtype, head_dim, requires_grad, 8, False, forced_backend())
    forced, by = _forced_backend(None)
    chosen = automatic(call) if forced is None else forced
    report = {}
    for name in ATTENTION_BACKENDS:
        problem = unavailable(name, call) or unsupported(name, call)
        if name == forced:
            reason = by if problem is None else f"{by}: {problem}"
        elif problem is not None:
            reason = problem
        elif forced is not None:
            reason = f"{forced} is {by}"
        else:
            reason = _preferred(name, chosen, call)
        if name == "flash" and device.type == "cuda" and call.flash is not None:
            reason += f" (the kernel is {call.flash}'s, activated in torch.nn.attention)"
        report[name] = AttentionChoice(
            name, problem is None, name == chosen and problem is None, reason
        )
    return report


def _preferred(name: str, chosen: str, call: AttentionCall) -> str:
    """Return why an automatic choice is a backend that could run, or another one."""
    if name == chosen:
        from_list = call.device.type == "cuda" or name == "native"
        return "first choice that takes the tensors" if from_list else "torch's own choice off CUDA"
    if not allowed(name, call.enabled):
        return "disabled by sdpa_kernel or torch.backends.cuda"
    return f"{chosen} is preferred"
