"""The kernels for attention (torch's, the FlashAttention packages', ours): which of them run, and
which is best.

torch's flash kernel can be replaced by FlashAttention-3 or 4, from torch 2.11 on, by
``torch.nn.attention.activate_flash_attention_impl``. That holds for the whole process and is never
done here. Where the user has done it, it comes first.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from anyflow.ops.attention import unsupported_kind
from anyflow.ops.backend import missing

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_ENABLED = {
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
}
PACKAGES = {"flash_attn_3": "flash_attn_interface", "flash_attn_2": "flash_attn"}
_INSTALL = {
    "flash_attn_3": "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130 "
    "(or cu126)",
    "flash_attn_2": "pip install --no-build-isolation flash-attn (it is compiled by nvcc)",
}
_INSTALLED = {
    "flash_attn_3": importlib.util.find_spec("flash_attn_interface") is not None,
    # Not "flash_attn": FlashAttention-4 installs a package of that name too, without this
    # extension.
    "flash_attn_2": importlib.util.find_spec("flash_attn_2_cuda") is not None,
}
ATTENTION_BACKENDS = (*PACKAGES, "native", *KERNELS)
_OURS = (*PACKAGES, "native")  # those that torch does not know

_CUDNN_PREFERRED = 90900  # the cuDNN from which torch itself prefers it on Hopper and Blackwell

_functions: dict[str, Callable[..., Any]] = {}  # filled by _load
_PROBING = threading.RLock()  # warnings' filters and torch's switches are those of the process


class Call(NamedTuple):
    """Holds all that the choice depends on: what the tensors are (keys: 1, or 8 for more), and the
    switches.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    grad: bool
    keys: int
    compiling: bool
    operators: tuple[str, str] | None  # what anyflow.ops is forced onto, and by whom
    deterministic: bool
    enabled: frozenset[str]
    flash: str | None  # the implementation that torch's flash kernel has been replaced by


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return out.transpose(1, 2).flatten(2)


def packaged(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = _functions[name](
        query, key, value, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    # FlashAttention-3 before September 2025 returns the log-sum-exp as well.
    return out[0] if isinstance(out, tuple) else out


def enabled() -> frozenset[str]:
    return frozenset(name for name, enabled in _ENABLED.items() if enabled())


def allowed(name: str, enabled: frozenset[str]) -> bool:
    # who disables flash attention means all of it
    return ("flash" if name in _OURS else name) in enabled


def flash_implementation() -> str | None:
    """Return the implementation activated in place of torch's flash kernel, such as ``"FA4"``, or
    None.
    """
    # from torch 2.11 on
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


def deterministic() -> bool:
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


@functools.cache
def automatic(call: Call) -> str:
    gpu = call.device.type == "cuda" and torch.cuda.is_available()
    capability = (
        torch.cuda.get_device_capability(call.device)
        if gpu and torch.version.hip is None
        else (0, 0)
    )
    cudnn = torch.backends.cudnn.version()
    for name in (
        preference(capability, 0 if cudnn is None else cudnn, call.flash) if gpu else ("native",)
    ):
        problem = unavailable(name, call) or unsupported(name, call)
        if allowed(name, call.enabled) and problem is None:
            return name
    return torch_choice(call)


def preference(
    capability: tuple[int, int], cudnn: int, flash: str | None = None
) -> tuple[str, ...]:
    """List the backends from fast to slow, for an NVIDIA GPU's compute capability and a cuDNN
    version such as 91002.

    An implementation that the user has activated in place of torch's flash kernel, ``"FA3"`` or
    ``"FA4"``, comes first.

    Hopper: FlashAttention-3, then cuDNN, both far above FlashAttention-2. Blackwell: cuDNN alone
    has kernels of its own. Ampere and Ada: FlashAttention-2 is written for them, and torch does not
    prefer cuDNN there either.
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


def unavailable(name: str, call: Call) -> str | None:
    """Say why a backend cannot run here, or None: there is none, or the user wants no native
    kernels.
    """
    if name == "native" and call.operators is not None and call.operators[0] != "native":
        return "anyflow.ops runs on {!r}, {}".format(*call.operators)
    return missing_backend(name, call.device)


@functools.cache
def missing_backend(name: str, device: torch.device) -> str | None:
    """Say why a backend does not exist on a device, or None if it does."""
    if name in PACKAGES and not _INSTALLED[name]:
        return f"not installed: {_INSTALL[name]}"
    if name == "native":
        return missing(name, device, "attention")
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if name == "math" or (name == "flash" and device.type == "cpu"):
        return None
    if device.type != "cuda":
        return f"runs on CUDA devices only, not on {device.type}"
    if torch.version.hip is not None:  # AMD's capability numbers mean something else
        return "needs an NVIDIA GPU" if name in ("cudnn", *PACKAGES) else None
    major, minor = torch.cuda.get_device_capability(device)
    if name == "flash_attn_3" and (major, minor) != (9, 0):
        return f"needs compute capability 9.0, this GPU has {major}.{minor}"
    if name != "efficient" and major < 8:
        return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "torch was built without cuDNN"
    if name == "flash" and not torch.backends.cuda.is_flash_attention_available():
        return "torch was built without flash attention"
    return _load(name) if name in PACKAGES else None


@functools.cache
def _load(name: str) -> str | None:
    """Import a package on first use, and say why that failed, or None."""
    try:
        _functions[name] = importlib.import_module(PACKAGES[name]).flash_attn_func
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ) as error:  # built for another torch, as a rule
        return f"installed, but does not load: {error}"
    return None


@functools.cache
def unsupported(name: str, call: Call) -> str | None:
    """Say what about such tensors a backend that exists does not support, or None."""
    if name == "math":
        return None
    what = f"query of dtype {call.dtype} with head_dim {call.head_dim}"
    if name == "native":
        problem = unsupported_kind(call.dtype, call.head_dim)
        return None if problem is None else f"{what}: {problem}"
    if name in KERNELS:
        what += f"{', a gradient' if call.grad else ''}{', one key' if call.keys == 1 else ''}"
        problem = _kernel_problem(name, call)
        if (
            problem is None
            and name == "flash"
            and call.flash is not None
            and call.device.type == "cuda"
        ):
            problem = _run_problem(_flash, call)  # torch asks the limits of its own kernel
    elif call.dtype not in (torch.float16, torch.bfloat16):
        problem = "it takes float16 and bfloat16"
    elif call.head_dim > 256 or (name == "flash_attn_3" and call.head_dim % 8):
        problem = "it takes head_dim up to 256" + (
            " in steps of 8" if name == "flash_attn_3" else ""
        )
    elif call.compiling and not hasattr(
        getattr(torch.ops, name.removesuffix("_2")), "_flash_attn_forward"
    ):
        problem = (
            "this version of the package registers no operator for torch.compile, newer ones do"
        )
    else:
        problem = _run_problem(functools.partial(packaged, name), call)
    return None if problem is None else f"{what}: {problem}"


def _kernel_problem(name: str, call: Call) -> str | None:
    """Say why one of torch's kernels does not take such tensors, in the words of torch's
    warnings.
    """
    with _PROBING, warnings.catch_warnings(record=True) as caught, sdpa_kernel(KERNELS[name]):
        warnings.simplefilter("always")
        if _fused_choice(call) == name:
            return None
    words = (str(warning.message).split(" (Triggered internally")[0].strip() for warning in caught)
    return (
        "; ".join(text for text in words if "not used because" not in text)
        or "torch does not say why"
    )


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(KERNELS["flash"]):
        return sdpa(query, key, value)


def _run_problem(run: Callable[..., Tensor], call: Call) -> str | None:
    """Say why a kernel does not run such tensors: only a run shows what its build was compiled
    for.
    """
    try:
        with _disable_current_modes(), torch.set_grad_enabled(call.grad):
            probe = _probe(call)
            out = run(*probe)
            if call.grad:
                torch.autograd.grad(out.sum(), probe)
            torch.cuda.synchronize(call.device)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None


@functools.cache
def torch_choice(call: Call) -> str:
    """Return what torch itself would run."""
    with _PROBING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _fused_choice(call)


def _fused_choice(call: Call) -> str:
    with _disable_current_modes(), torch.set_grad_enabled(call.grad):
        try:
            query, key, value = (t.transpose(1, 2) for t in _probe(call))
            choice = torch._fused_sdp_choice(query, key, value)
        except (
            RuntimeError,
            AssertionError,
        ):  # no enabled kernel, or no such device; the call itself will say so
            return "none"
    return next((name for name, kernel in KERNELS.items() if kernel.value == choice), "none")


def _probe(call: Call) -> list[Tensor]:
    """Make the smallest query, key and value of a kind: real ones, where the fake-tensor modes are
    disabled.
    """
    return [
        torch.zeros(
            1,
            length,
            2,
            call.head_dim,
            device=call.device,
            dtype=call.dtype,
            requires_grad=call.grad,
        )
        for length in (8, call.keys, call.keys)
    ]
