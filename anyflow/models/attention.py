"""Scaled dot-product attention in the model's ``[B, L, H, Dh]`` layout, on the best backend for the device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from anyflow.ops.attention import attention as native_attention
from anyflow.ops.attention import unsupported_kind
from anyflow.ops.backend import forced_backend, missing
from anyflow.ops.library import has_tangent

_KERNELS = {
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
_MODULES = {"flash_attn_3": "flash_attn_interface", "flash_attn_2": "flash_attn"}
_INSTALL = {
    "flash_attn_3": "build it from hopper/ of github.com/Dao-AILab/flash-attention",
    "flash_attn_2": "pip install anyflow[flash]",
}
_INSTALLED = {
    "flash_attn_3": importlib.util.find_spec("flash_attn_interface") is not None,
    # Not "flash_attn": FlashAttention-4 installs a package of that name too, without this extension.
    "flash_attn_2": importlib.util.find_spec("flash_attn_2_cuda") is not None,
}
ATTENTION_BACKENDS = (*_MODULES, "native", *_KERNELS)
_OURS = (*_MODULES, "native")  # those that torch does not know

_CUDNN_PREFERRED = 90900  # the cuDNN from which torch itself prefers it on Hopper and Blackwell

_functions: dict[str, Callable[..., Any]] = {}  # filled by _load
_forced: str | None = None


@dataclass(frozen=True)
class AttentionChoice:
    """One row of :func:`attention_report`.

    Attributes:
        name: the backend.
        available: whether it runs here for the tensors asked about.
        chosen: whether :func:`attention` runs it for them.
        reason: why, or why not, in one phrase.
    """

    name: str
    available: bool
    chosen: bool
    reason: str


class _Call(NamedTuple):
    """All that the choice depends on: what the tensors are (keys: 1, or 8 for more), and the switches."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    grad: bool
    keys: int
    compiling: bool
    operators: tuple[str, str] | None  # what anyflow.ops is forced onto, and by whom
    deterministic: bool
    enabled: frozenset[str]


class use_attention_backend:
    """Force attention onto one backend, as a setter or as a context manager.

    ``use_attention_backend("math")`` takes effect at once; used as ``with use_attention_backend("math"): ...`` the
    previous choice comes back at the end of the block. ``use_attention_backend(None)`` returns to the automatic choice.
    With gradient checkpointing the block must hold the backward pass too, which runs attention again.

    Raises:
        ValueError: the name is not one of :data:`ATTENTION_BACKENDS`.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self._previous = _forced
        _forced = None if name is None else validated_backend(name)

    def __enter__(self) -> use_attention_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._previous


def attention(query: Tensor, key: Tensor, value: Tensor, *, attention_backend: str | None = None) -> Tensor:
    """Softmax attention without mask: ``softmax(query key^T / sqrt(Dh)) value``.

    A backend is forced by, nearest first: ``attention_backend``, :class:`use_attention_backend`, the environment
    variable ``ANYFLOW_ATTENTION``. Otherwise the fastest one that supports the tensors runs, among those that
    ``torch.nn.attention.sdpa_kernel`` leaves enabled: on a CPU ``"native"``, unless ``anyflow.ops.use_backend`` or
    ``ANYFLOW_BACKEND`` names another backend than that; else, and on other devices than CPU and CUDA, torch chooses.
    Under ``torch.compile`` the environment variable and the ``sdpa_kernel`` in force are those of the compilation.

    Args:
        query: ``[B, L, H, Dh]``.
        key: ``[B, S, H, Dh]``, in query's dtype (any under autocast).
        value: ``[B, S, H, Dh]``, likewise.
        attention_backend: ``"flash_attn_3"``, ``"flash_attn_2"`` (those two packages), ``"native"``
            (:func:`anyflow.ops.attention`), ``"cudnn"``, ``"flash"``, ``"efficient"``, ``"math"`` (torch's kernels), or
            None.

    Returns:
        ``[B, L, H * Dh]`` in query's dtype, or in autocast's where it is enabled.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the name of a backend is unknown; or a forced backend does not
            support these tensors.
        RuntimeError: a forced backend is not installed, or does not run on this device.
    """
    query, key, value = _autocast(query, key, value)
    _check(query, key, value)
    forced, by = _forced_backend(attention_backend)
    if forced is None and query.device.type not in ("cpu", "cuda"):
        return _sdpa(query, key, value)
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    head_dim = operator.index(query.shape[3])  # a plain int under torch.compile(dynamic=True) as well
    keys = 1 if key.shape[1] == 1 else 8  # all that a choice depends on
    kind = query.device, query.dtype, head_dim, grad, keys
    name, exact = _select(forced, by, *kind, torch.compiler.is_compiling(), forced_backend())

    if query.numel() == 0 or key.numel() == 0:
        name, exact = "math", True  # nothing to compute, and the kernels refuse empty tensors
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))  # kernels need it
    if name == "native":
        if forced is not None and has_tangent(query, key, value):
            problem = "it has no forward-mode derivative: use_attention_backend('math')"
            raise RuntimeError(f"attention: backend {forced!r} ({by}) is not available: {problem}")
        return native_attention(query, key, value).flatten(2)
    if name in _MODULES:
        return _packaged(name, query, key, value).flatten(2)
    if not exact:  # torch would choose the same: its process-wide switches stay untouched
        return _sdpa(query, key, value)
    with sdpa_kernel(_KERNELS[name]):
        return _sdpa(query, key, value)


def attention_report(
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    requires_grad: bool = False,
) -> dict[str, AttentionChoice]:
    """For every backend, whether it runs on ``device`` for such tensors, whether it is the one chosen, and why.

    Args:
        device: None means CUDA where there is a CUDA device, else the CPU.
        dtype: of query, key and value.
        head_dim: Dh.
        requires_grad: whether a gradient is needed.

    Returns:
        Backend name to :class:`AttentionChoice`. None is chosen where a forced backend cannot run.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    call = _Call(device, dtype, head_dim, requires_grad, 8, False, forced_backend(), _deterministic(), _enabled())
    forced, by = _forced_backend(None)
    chosen = forced if forced is not None else _automatic(call)
    report = {}
    for name in ATTENTION_BACKENDS:
        problem = _unavailable(name, call) or _unsupported(name, call)
        available, is_chosen = problem is None, name == chosen and problem is None
        if name == forced:
            reason = by if problem is None else f"{by}: {problem}"
        elif problem is not None:
            reason = problem
        elif is_chosen:
            ours = device.type == "cuda" or name == "native"
            reason = "first choice that takes the tensors" if ours else "torch's own choice off CUDA"
        elif forced is not None:
            reason = f"{forced} is {by}"
        elif not _allowed(name, call.enabled):
            reason = "disabled by sdpa_kernel or torch.backends.cuda"
        else:
            reason = f"{chosen} is preferred"
        report[name] = AttentionChoice(name, available, is_chosen, reason)
    return report


def validated_backend(name: str, prefix: str = "") -> str:
    """The name itself; a ValueError that lists the names if it is none of them."""
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"{prefix}unknown attention backend {name!r}; expected one of {', '.join(ATTENTION_BACKENDS)}")
    return name


def require_backend(name: str, devices: tuple[torch.device, ...]) -> None:
    """A RuntimeError that says why, if the backend runs on none of the devices."""
    problems = [_missing(name, device) for device in devices]
    if all(problem is not None for problem in problems):
        raise RuntimeError(f"attention backend {name!r} is not available: {problems[-1]}")


def _forced_backend(argument: str | None) -> tuple[str | None, str]:
    if argument is not None:
        return validated_backend(argument, "attention_backend: "), "forced by attention_backend="
    if _forced is not None:
        return _forced, "forced by use_attention_backend()"
    name = os.environ.get("ANYFLOW_ATTENTION")
    if name:
        return validated_backend(name, "ANYFLOW_ATTENTION: "), "forced by ANYFLOW_ATTENTION"
    return None, ""


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does for torch's own attention; the packages know nothing of it."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # meta is an error there
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor, length in (("query", query, "L"), ("key", key, "S"), ("value", value, "S")):
        if tensor.ndim != 4:
            raise ValueError(f"attention: {name} must be [B, {length}, H, Dh], got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"attention: {name} must be of a floating-point dtype, got {tensor.dtype}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"attention: {name} is {tensor.dtype} on {tensor.device}, query is {query.dtype} on {query.device}"
            )
    b, _, h, d = query.shape
    if key.shape[0] != b or key.shape[2] != h or key.shape[3] != d:
        raise ValueError(f"attention: key must be [B={b}, S, H={h}, Dh={d}] to fit query, got {tuple(key.shape)}")
    if value.shape != key.shape:
        raise ValueError(f"attention: value {tuple(value.shape)} must have the shape of key {tuple(key.shape)}")


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def _packaged(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = _functions[name](query, key, value, deterministic=torch.are_deterministic_algorithms_enabled())
    # FlashAttention-3 before September 2025 returns the log-sum-exp as well.
    return out[0] if isinstance(out, tuple) else out


@torch.compiler.assume_constant_result  # evaluated, not traced: it reads switches and runs probes
def _select(forced: str | None, by: str, *tensors: Any) -> tuple[str, bool]:
    """The backend of a call, and whether torch must be told to run exactly that one."""
    call = _Call._make((*tensors, _deterministic(), _enabled()))
    if forced is None:
        name = _automatic(call)
        return name, name in _KERNELS and _torch_choice(call) != name
    problem = _unavailable(forced, call)
    if problem is not None:
        raise RuntimeError(f"attention: backend {forced!r} ({by}) is not available: {problem}")
    problem = _unsupported(forced, call)
    if problem is not None:
        raise ValueError(f"attention: backend {forced!r} ({by}) does not support {problem}")
    return forced, True


def _enabled() -> frozenset[str]:
    return frozenset(name for name, enabled in _ENABLED.items() if enabled())


def _allowed(name: str, enabled: frozenset[str]) -> bool:
    return ("flash" if name in _OURS else name) in enabled  # who disables flash attention means all of it


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


@functools.cache
def _automatic(call: _Call) -> str:
    gpu = call.device.type == "cuda" and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(call.device) if gpu and torch.version.hip is None else (0, 0)
    for name in preference(capability, torch.backends.cudnn.version() or 0) if gpu else ("native",):
        problem = _unavailable(name, call) or _unsupported(name, call)
        if _allowed(name, call.enabled) and problem is None:
            return name
    return _torch_choice(call)


def preference(capability: tuple[int, int], cudnn: int) -> tuple[str, ...]:
    """The backends from fast to slow, for an NVIDIA GPU's compute capability and a cuDNN version such as 91002.

    Hopper: FlashAttention-3, then cuDNN, both far above FlashAttention-2 (SPEC D21). Blackwell: cuDNN alone has kernels
    of its own. Ampere and Ada: FlashAttention-2 is written for them, and torch does not prefer cuDNN there either.
    """
    newest = ("flash_attn_3", "cudnn") if cudnn >= _CUDNN_PREFERRED else ("flash_attn_3",)
    return (*(newest if capability >= (9, 0) else ()), "flash_attn_2", "flash", "efficient", "math")


def _unavailable(name: str, call: _Call) -> str | None:
    """Why a backend cannot run here, or None: there is none, or the user wants no native kernels."""
    if name == "native" and call.operators is not None and call.operators[0] != "native":
        return "anyflow.ops runs on {!r}, {}".format(*call.operators)
    return _missing(name, call.device)


@functools.cache
def _missing(name: str, device: torch.device) -> str | None:
    """Why a backend does not exist on a device, or None if it does."""
    if name in _MODULES and not _INSTALLED[name]:
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
        return "needs an NVIDIA GPU" if name in ("cudnn", *_MODULES) else None
    major, minor = torch.cuda.get_device_capability(device)
    if name == "flash_attn_3" and (major, minor) != (9, 0):
        return f"needs compute capability 9.0, this GPU has {major}.{minor}"
    if name != "efficient" and major < 8:
        return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "torch was built without cuDNN"
    if name == "flash" and not torch.backends.cuda.is_flash_attention_available():
        return "torch was built without flash attention"
    return _load(name) if name in _MODULES else None


@functools.cache
def _load(name: str) -> str | None:
    """Import a package on first use; why that failed, or None."""
    try:
        _functions[name] = importlib.import_module(_MODULES[name]).flash_attn_func
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # built for another torch, as a rule
        return f"installed, but does not load: {error}"
    return None


@functools.cache
def _unsupported(name: str, call: _Call) -> str | None:
    """What about such tensors a backend that exists does not support, or None."""
    if name == "math":
        return None
    what = f"query of dtype {call.dtype} with head_dim {call.head_dim}"
    if name == "native":
        problem = unsupported_kind(call.dtype, call.head_dim)
        return None if problem is None else f"{what}: {problem}"
    if name in _KERNELS:
        what += f"{', a gradient' if call.grad else ''}{', one key' if call.keys == 1 else ''}"
        problem = _kernel_problem(name, call)
    elif call.dtype not in (torch.float16, torch.bfloat16):
        problem = "it takes float16 and bfloat16"
    elif call.head_dim > 256 or (name == "flash_attn_3" and call.head_dim % 8):
        problem = "it takes head_dim up to 256" + (" in steps of 8" if name == "flash_attn_3" else "")
    elif call.compiling and not hasattr(getattr(torch.ops, name.removesuffix("_2")), "_flash_attn_forward"):
        problem = "this version of the package registers no operator for torch.compile, newer ones do"
    else:
        problem = _package_problem(name, call)
    return None if problem is None else f"{what}: {problem}"


def _kernel_problem(name: str, call: _Call) -> str | None:
    """Why one of torch's kernels does not take such tensors, in the words of torch's warnings."""
    with warnings.catch_warnings(record=True) as caught, sdpa_kernel(_KERNELS[name]):
        warnings.simplefilter("always")
        if _fused_choice(call) == name:
            return None
    words = (str(warning.message).split(" (Triggered internally")[0].strip() for warning in caught)
    return "; ".join(text for text in words if "not used because" not in text) or "torch does not say why"


def _package_problem(name: str, call: _Call) -> str | None:
    """Why a package does not run such tensors: only a run shows what its build was compiled for."""
    try:
        with _disable_current_modes(), torch.set_grad_enabled(call.grad):
            probe = _probe(call)
            out = _packaged(name, *probe)
            if call.grad:
                torch.autograd.grad(out.sum(), probe)
            torch.cuda.synchronize(call.device)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None


@functools.cache
def _torch_choice(call: _Call) -> str:
    """What torch itself would run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _fused_choice(call)


def _fused_choice(call: _Call) -> str:
    with _disable_current_modes(), torch.set_grad_enabled(call.grad):
        try:
            query, key, value = (t.transpose(1, 2) for t in _probe(call))
            choice = torch._fused_sdp_choice(query, key, value)
        except (RuntimeError, AssertionError):  # no enabled kernel, or no such device; the call itself will say so
            return "none"
    return next((name for name, kernel in _KERNELS.items() if kernel.value == choice), "none")


def _probe(call: _Call) -> list[Tensor]:
    """The smallest query, key and value of a kind; real ones, where the modes of a fake-tensor mode are disabled."""
    return [
        torch.zeros(1, length, 2, call.head_dim, device=call.device, dtype=call.dtype, requires_grad=call.grad)
        for length in (8, call.keys, call.keys)
    ]
