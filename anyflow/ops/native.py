"""Load the extension ``anyflow._C``, which registers the native kernels."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

HOW_TO_BUILD = (
    "build it with `pip install -e . --no-build-isolation` in a checkout (needs torch, cmake, "
    "ninja, pybind11 and a C++ compiler), or set ANYFLOW_BACKEND=eager to run without it"
)


def load() -> ModuleType | None:
    """Import ``anyflow._C``, or return None where ``ANYFLOW_BACKEND`` says to do without it.

    Raises:
        ImportError: the extension is not built, or was built for another torch.
    """
    try:
        return importlib.import_module("anyflow._C")
    except ImportError as error:
        if os.environ.get("ANYFLOW_BACKEND") in ("eager", "triton"):
            return None
        if importlib.util.find_spec("anyflow._C") is None:
            problem = "the native extension anyflow._C is not built"
        else:
            problem = (
                f"the native extension anyflow._C does not load with torch {torch.__version__} "
                f"({error}): rebuild it"
            )
        raise ImportError(f"{problem}; {HOW_TO_BUILD}", name="anyflow._C") from error


EXTENSION = load()


# kernel -> types of the devices that it has an implementation for
_devices: dict[str, tuple[str, ...]] = {}


def register(kernel: str) -> None:
    """Note the devices that ``anyflow::<kernel>_native``, once defined, is implemented for."""
    has_kernel, name = torch._C._dispatch_has_kernel_for_dispatch_key, f"anyflow::{kernel}_native"
    _devices[kernel] = tuple(
        device for device in ("cpu", "cuda") if has_kernel(name, device.upper())
    )


def missing_kernel(kernel: str, device: torch.device) -> str | None:
    """Return why ``anyflow::<kernel>`` has no native kernel for a device, or None if it has one."""
    if device.type in _devices[kernel]:
        return None
    if EXTENSION is None:
        return "the native extension is not built"
    if device.type == "cuda":
        return (
            f"no native CUDA kernel of {kernel} (the CUDA kernels are "
            f"{EXTENSION.build_info()['cuda']})"
        )
    return f"no native kernel of {kernel} for {device.type}"
