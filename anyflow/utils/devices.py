"""Name devices, check that they exist, and give the widest dtype that they compute in."""

from __future__ import annotations

import torch

from anyflow.utils.validation import brief


def default_device() -> torch.device:
    """Return CUDA where torch finds a CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def known_device(device: torch.device | str, setting: str = "device") -> torch.device:
    """Return the device of a name, which need not exist on this machine.

    Args:
        device: a device or its name, such as ``"cuda:1"``.
        setting: the name of the argument or option, for the error.

    Raises:
        ValueError: PyTorch has no device of that name.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{setting} {brief(device)} is unknown to PyTorch") from None


def resolve_device(
    device: torch.device | str | None, setting: str = "device", *, computes: bool = False
) -> torch.device:
    """Return a device of this machine as tensors on it name it, such as ``cuda:0`` for ``cuda``.

    Args:
        device: a device or its name; None means CUDA where torch finds it, else the CPU.
        setting: the name of the argument or option, for the error.
        computes: also require that a kernel runs there, which excludes ``meta``.

    Raises:
        ValueError: the device is unknown, not there, or does not compute.
    """
    try:
        target = default_device() if device is None else device
        if computes:
            torch.ones(1, device=target).item()
        return torch.empty(0, device=target).device
    # a build of torch without CUDA asserts; a meta tensor has no item
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        name = device if isinstance(device, str) else str(device)
        reason = str(error).splitlines()[0]
        raise ValueError(f"{setting} {name!r} cannot be used here: {reason}") from None


def local_gpu(index: int) -> torch.device:
    """Return the GPU of this machine with a number.

    Raises:
        ValueError: fewer GPUs are here.
    """
    if index >= (count := torch.cuda.device_count()):
        raise ValueError(f"this process needs GPU {index}, and torch finds {count} here")
    return torch.device("cuda", index)


def widest_float(device: torch.device | str) -> torch.dtype:
    """Return fp64, or fp32 where the device has no fp64.

    Times near 1 differ by less than fp32 resolves well, and sums of many numbers need the width.
    """
    return torch.float32 if torch.device(device).type in ("mps", "npu") else torch.float64
