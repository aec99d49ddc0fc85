"""Choose the backend of attention for a kind of tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch

from anyflow.ops.attention.backends import (
    BACKENDS,
    TORCH_KERNELS,
    AttentionCall,
    enabled,
    flash_implementation,
    missing,
    torch_choice,
    unsupported,
)

_CUDNN_PREFERRED = 90900  # the cuDNN from which torch itself prefers it on Hopper and Blackwell


def describe_call(*tensors: Any) -> AttentionCall:
    """Return a call from the first fields of :class:`AttentionCall` and the switches in force."""
    deterministic = (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    return AttentionCall._make((*tensors, deterministic, enabled(), flash_implementation()))


@torch.compiler.assume_constant_result  # evaluated, not traced: it reads switches and runs probes
def select(forced: str | None, by: str, *tensors: Any) -> tuple[str, bool]:
    """Return the backend of a call; False beside it where torch by itself runs no other one.

    Args:
        forced: the name of a backend, or None.
        by: who forces it, for errors.
        tensors: the first fields of :class:`AttentionCall`.

    Raises:
        RuntimeError: the forced backend is not available.
        ValueError: the forced backend does not take such tensors.
    """
    call = describe_call(*tensors)
    if forced is None:
        name = automatic(call)
        known = name in BACKENDS  # not where torch chooses none
        return name, known and (name not in TORCH_KERNELS or torch_choice(call) != name)
    problem = unavailable(forced, call)
    if problem is not None:
        raise RuntimeError(f"attention: backend {forced!r} ({by}) is not available: {problem}")
    problem = unsupported(forced, call)
    if problem is not None:
        raise ValueError(f"attention: backend {forced!r} ({by}) does not support {problem}")
    return forced, True


@functools.cache
def automatic(call: AttentionCall) -> str:
    """Return the first backend in the order of preference that takes the tensors, or torch's."""
    for name in _candidates(call):
        problem = unavailable(name, call) or unsupported(name, call)
        if allowed(name, call.enabled) and problem is None:
            return name
    return torch_choice(call)


def _candidates(call: AttentionCall) -> tuple[str, ...]:
    if call.device.type != "cuda" or not torch.cuda.is_available():
        return ("native",)
    # AMD's capability numbers mean something else
    amd = torch.version.hip is not None
    capability = (0, 0) if amd else torch.cuda.get_device_capability(call.device)
    cudnn = torch.backends.cudnn.version()
    return preference(capability, 0 if cudnn is None else cudnn, call.flash)


def preference(
    capability: tuple[int, int], cudnn: int, flash: str | None = None
) -> tuple[str, ...]:
    """List the backends in the order of preference for an NVIDIA GPU.

    Measured on an H200 (compute capability 9.0) at the 1.3B model's self-attention, in TFLOP/s
    forward and backward: cuDNN 604 and 517, torch's flash kernel 352 and 305, the memory-efficient
    one 177 and 126 (docs/performance.md, "attention, TFLOP/s").

    The rest of the order is by reputation, and not measured here: FlashAttention-3 before cuDNN on
    Hopper, cuDNN first on Blackwell, flash_attn_2 before torch's flash kernel, and no cuDNN on
    Ampere and Ada, where torch does not prefer it either.

    Args:
        capability: the GPU's compute capability.
        cudnn: the version of cuDNN, such as 91002; 0 where torch has none.
        flash: the implementation that the user has activated in place of torch's flash kernel,
            ``"FA3"`` or ``"FA4"``; it comes first.
    """
    newest = ("flash_attn_3", "cudnn") if cudnn >= _CUDNN_PREFERRED else ("flash_attn_3",)
    order = (
        *(newest if capability >= (9, 0) else ()),
        "flash_attn_2",
        "flash",
        "efficient",
        "math",
    )
    return order if flash is None else ("flash", *(name for name in order if name != "flash"))


def allowed(name: str, enabled: frozenset[str]) -> bool:
    """Check that torch's switches leave a backend on."""
    return BACKENDS[name].switch in enabled


def unavailable(name: str, call: AttentionCall) -> str | None:
    """Return why a backend cannot run here, or None: it is missing, or ruled out by the user."""
    if name == "native" and call.operators is not None and call.operators[0] != "native":
        return "anyflow.ops runs on {!r}, {}".format(*call.operators)
    return missing(name, call.device)
