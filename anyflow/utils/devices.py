"""Choose the device to run on, and refuse one that is not there."""

from __future__ import annotations

import torch

from anyflow.utils.validation import brief


def default_device() -> torch.device:
    """Return the GPU where torch finds one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_device(device: torch.device | str | None) -> torch.device:
    """Return the device that a name stands for, there or not; None is the default one.

    Raises:
        ValueError: PyTorch knows no such name.
    """
    try:
        return default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {brief(device)} is unknown to PyTorch") from None


def resolve_device(
    device: torch.device | str | None, *, argument: str = "device", meta: bool = True
) -> torch.device:
    """Return the device named as tensors on the device name it; None is the default one.

    Args:
        device: a name such as ``"cuda"`` or ``"cuda:1"``.
        argument: name in errors, such as ``--device``.
        meta: accept the meta device, whose tensors have no values.

    Raises:
        ValueError: the device is not there.
    """
    try:
        found = torch.empty(0, device=default_device() if device is None else device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # a build without CUDA asserts
        reason = str(error).splitlines()[0]
    else:
        if meta or found.type != "meta":
            return found
        reason = "its tensors have no values"
    name = brief(str(device) if isinstance(device, torch.device) else device)
    raise ValueError(f"{argument} {name} cannot be used here: {reason}")


def local_gpu(index: int) -> torch.device:
    """Return the GPU of this machine with a number.

    Raises:
        ValueError: fewer GPUs are here.
    """
    if index >= (count := torch.cuda.device_count()):
        raise ValueError(f"this process needs GPU {index}, and torch finds {count} here")
    return torch.device("cuda", index)
