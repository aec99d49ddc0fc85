"""The extension ``anyflow._C``: loading it, which registers the native kernels, and what it
holds.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

HOW_TO_BUILD = (
    "build it with `pip install -e . --no-build-isolation` in a checkout (needs torch, cmake, "
    "ninja, pybind11 and "
    "a C++ compiler), or set ANYFLOW_BACKEND=eager to run without it"
)


def load() -> ModuleType | None:
    """Import ``anyflow._C``; None where it is not built and ``ANYFLOW_BACKEND`` names another
    backend.

    Raises:
        ImportError: it is not built, or was built for another torch, and nothing says to do without
            it.
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
    """Note where ``anyflow::<kernel>_native``, whose schema has just been defined, is
    implemented.
    """
    has_kernel, name = torch._C._dispatch_has_kernel_for_dispatch_key, f"anyflow::{kernel}_native"
    _devices[kernel] = tuple(
        device for device in ("cpu", "cuda") if has_kernel(name, device.upper())
    )


def missing_kernel(kernel: str, device: torch.device) -> str | None:
    """Why there is no native implementation of ``anyflow::<kernel>`` for a device, or None if there
    is one.
    """
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
