"""Define the backends of attention: where each exists, which tensors it takes, and how it runs.

torch's flash kernel can be replaced by FlashAttention-3 or 4, from torch 2.11 on, by
``torch.nn.attention.activate_flash_attention_impl``. That holds for the whole process and is never
done here; :func:`flash_implementation` notices where the user has done it.
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

from anyflow.ops.attention.operator import attention, unsupported_kind
from anyflow.ops.backend import missing as missing_operator
from anyflow.ops.setting import ATTENTION_BACKEND

_PROBING = threading.RLock()  # warnings' filters and torch's switches are those of the process


class AttentionCall(NamedTuple):
    """Hold all that the choice of a backend depends on: the kind of tensors, and the switches."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    grad: bool
    keys: int  # 1, or 8 for any larger number
    compiling: bool
    operators: tuple[str, str] | None  # the backend that anyflow.ops is forced onto, and by whom
    deterministic: bool
    enabled: frozenset[str]  # the kernels that torch's switches leave on
    flash: str | None  # the implementation in place of torch's flash kernel

    def tensors(self) -> str:
        """Describe the tensors for an error message."""
        return f"query of dtype {self.dtype} with head_dim {self.head_dim}"


class AttentionBackend:
    """Run attention on one kernel, and say where it exists and which tensors it takes."""

    name: str
    switch: str  # the kernel of torch whose switch turns this backend off

    def missing(self, device: torch.device) -> str | None:
        """Return why the backend does not exist on a device, or None if it does."""
        raise NotImplementedError

    def unsupported(self, call: AttentionCall) -> str | None:
        """Return what about such tensors the backend does not take, or None if it takes them."""
        raise NotImplementedError

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return attention ``[B, L, H * Dh]`` of query, key and value ``[B, L or S, H, Dh]``."""
        raise NotImplementedError


class NativeAttention(AttentionBackend):
    """Run :func:`anyflow.ops.attention`, which has a C++ kernel for the CPU."""

    name, switch = "native", "flash"  # who disables flash attention means every flash kernel

    def missing(self, device: torch.device) -> str | None:
        return missing_operator(self.name, device, "attention")

    def unsupported(self, call: AttentionCall) -> str | None:
        problem = unsupported_kind(call.dtype, call.head_dim)
        return None if problem is None else f"{call.tensors()}: {problem}"

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value).flatten(2)


class FlashPackage(AttentionBackend):
    """Run a FlashAttention package, which is imported on first use."""

    switch = "flash"
    capability = 8  # of compute, the lowest
    exact = False  # a newer GPU does not do
    multiple = 1  # of which head_dim must be

    def __init__(
        self, name: str, module: str, extension: str, operators: str, install: str
    ) -> None:
        self.name = name
        self._module, self._operators, self._install = module, operators, install
        self._installed = importlib.util.find_spec(extension) is not None
        self._function: Callable[..., Any] | None = None

    def missing(self, device: torch.device) -> str | None:
        if not self._installed:
            return f"not installed: {self._install}"
        problem = _missing_gpu(device, self.capability, nvidia=True, exact=self.exact)
        return self._load() if problem is None else problem

    def _load(self) -> str | None:
        try:
            self._function = importlib.import_module(self._module).flash_attn_func
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            # built for another torch, as a rule
            return f"installed, but does not load: {error}"
        return None

    def unsupported(self, call: AttentionCall) -> str | None:
        problem = self._limit(call)
        if problem is None and call.compiling:
            problem = self._untraceable()
        if problem is None:
            problem = _run_problem(self.run, call)
        return None if problem is None else f"{call.tensors()}: {problem}"

    def _limit(self, call: AttentionCall) -> str | None:
        if call.dtype not in (torch.float16, torch.bfloat16):
            return "it takes float16 and bfloat16"
        if call.head_dim > 256 or call.head_dim % self.multiple:
            steps = f" in steps of {self.multiple}" if self.multiple > 1 else ""
            return f"it takes head_dim up to 256{steps}"
        return None

    def _untraceable(self) -> str | None:
        if hasattr(getattr(torch.ops, self._operators), "_flash_attn_forward"):
            return None
        return "this version of the package registers no operator for torch.compile, newer ones do"

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self._function is not None, f"{self.name} runs before missing() has loaded it"
        deterministic = torch.are_deterministic_algorithms_enabled()
        out = self._function(query, key, value, deterministic=deterministic)
        # FlashAttention-3 before September 2025 returns the log-sum-exp as well.
        out = out[0] if isinstance(out, tuple) else out
        return out.flatten(2)


class FlashAttention3(FlashPackage):
    """Run FlashAttention-3, which is written for Hopper alone."""

    capability, exact, multiple = 9, True, 8


class TorchKernel(AttentionBackend):
    """Run one of the kernels of torch's ``scaled_dot_product_attention``."""

    def __init__(
        self, name: str, kernel: SDPBackend, enabled: Callable[[], bool], capability: int = 8
    ) -> None:
        self.name = self.switch = name
        self.kernel, self.enabled = kernel, enabled
        self._capability = capability

    def missing(self, device: torch.device) -> str | None:
        return _missing_gpu(device, self._capability)

    def unsupported(self, call: AttentionCall) -> str | None:
        problem = self._refusal(call)
        if problem is None:
            return None
        more = f"{', a gradient' if call.grad else ''}{', one key' if call.keys == 1 else ''}"
        return f"{call.tensors()}{more}: {problem}"

    def _refusal(self, call: AttentionCall) -> str | None:
        """Return why torch does not run the kernel, in the words of torch's warnings."""
        with _PROBING, warnings.catch_warnings(record=True) as caught, sdpa_kernel(self.kernel):
            warnings.simplefilter("always")
            if fused_choice(call) == self.name:
                return None
        words = (str(item.message).split(" (Triggered internally")[0].strip() for item in caught)
        reasons = [text for text in words if "not used because" not in text]
        return "; ".join(reasons) if reasons else "torch does not say why"

    def run(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(self.kernel):
            return sdpa(query, key, value)


class CuDNNKernel(TorchKernel):
    """Run cuDNN's attention."""

    def missing(self, device: torch.device) -> str | None:
        problem = _missing_gpu(device, self._capability, nvidia=True)
        if problem is None and not torch.backends.cudnn.is_available():
            return "torch was built without cuDNN"
        return problem


class FlashKernel(TorchKernel):
    """Run torch's flash kernel: of the CPU, or of a GPU, where another package can replace it."""

    def missing(self, device: torch.device) -> str | None:
        if device.type == "cpu":
            return None
        problem = _missing_gpu(device, self._capability)
        built = torch.version.hip is not None or torch.backends.cuda.is_flash_attention_available()
        return (
            "torch was built without flash attention" if problem is None and not built else problem
        )

    def _refusal(self, call: AttentionCall) -> str | None:
        problem = super()._refusal(call)
        if problem is None and call.flash is not None and call.device.type == "cuda":
            # torch has compared the tensors with the limits of its own kernel only
            return _run_problem(self.run, call)
        return problem


class MathKernel(TorchKernel):
    """Run torch's composed attention, which exists everywhere and takes all tensors."""

    def missing(self, device: torch.device) -> str | None:
        return _no_cuda() if device.type == "cuda" else None

    def unsupported(self, call: AttentionCall) -> str | None:
        return None


def _no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _missing_gpu(
    device: torch.device, capability: int = 8, *, nvidia: bool = False, exact: bool = False
) -> str | None:
    """Return why a device is no GPU of a compute capability (or newer), or None if it is one."""
    if device.type != "cuda":
        return f"runs on CUDA devices only, not on {device.type}"
    if (problem := _no_cuda()) is not None:
        return problem
    if torch.version.hip is not None:  # AMD's capability numbers mean something else
        return "needs an NVIDIA GPU" if nvidia else None
    major, minor = torch.cuda.get_device_capability(device)
    if major < capability or (exact and (major, minor) != (capability, 0)):
        return f"needs compute capability {capability}.0, this GPU has {major}.{minor}"
    return None


_switches = torch.backends.cuda
_TABLE: tuple[AttentionBackend, ...] = (
    FlashAttention3(
        "flash_attn_3",
        module="flash_attn_interface",
        extension="flash_attn_interface",
        operators="flash_attn_3",
        install="pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130 "
        "(or cu126)",
    ),
    FlashPackage(
        "flash_attn_2",
        module="flash_attn",
        # FlashAttention-4 installs a package "flash_attn" too, without this extension.
        extension="flash_attn_2_cuda",
        operators="flash_attn",
        install="pip install --no-build-isolation flash-attn (it is compiled by nvcc)",
    ),
    NativeAttention(),
    CuDNNKernel("cudnn", SDPBackend.CUDNN_ATTENTION, _switches.cudnn_sdp_enabled),
    FlashKernel("flash", SDPBackend.FLASH_ATTENTION, _switches.flash_sdp_enabled),
    TorchKernel(
        "efficient", SDPBackend.EFFICIENT_ATTENTION, _switches.mem_efficient_sdp_enabled, 0
    ),
    MathKernel("math", SDPBackend.MATH, _switches.math_sdp_enabled),
)
BACKENDS = {backend.name: backend for backend in _TABLE}
ATTENTION_BACKENDS = ATTENTION_BACKEND.names
assert tuple(BACKENDS) == ATTENTION_BACKENDS, "the table and the setting list the same names"
TORCH_KERNELS = {item.name: item for item in _TABLE if isinstance(item, TorchKernel)}


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run torch's ``scaled_dot_product_attention`` in this layout, ``[B, L, H * Dh]``."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return out.transpose(1, 2).flatten(2)


@functools.cache
def missing(name: str, device: torch.device) -> str | None:
    """Return why a backend does not exist on a device, or None if it does."""
    return BACKENDS[name].missing(device)


@functools.cache
def unsupported(name: str, call: AttentionCall) -> str | None:
    """Return what about such tensors a backend that exists does not take, or None."""
    return BACKENDS[name].unsupported(call)


def enabled() -> frozenset[str]:
    """Return the names of the kernels that torch's switches leave on."""
    return frozenset(name for name, backend in TORCH_KERNELS.items() if backend.enabled())


def flash_implementation() -> str | None:
    """Return the implementation in place of torch's flash kernel, such as ``"FA4"``, or None."""
    # from torch 2.11 on
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if current is None else current()


@functools.cache
def torch_choice(call: AttentionCall) -> str:
    """Return the kernel that torch itself would run."""
    with _PROBING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fused_choice(call)


def fused_choice(call: AttentionCall) -> str:
    """Return the kernel that torch would run under the switches in force, or ``"none"``."""
    with _disable_current_modes(), torch.set_grad_enabled(call.grad):
        try:
            query, key, value = (t.transpose(1, 2) for t in _probe(call))
            choice = torch._fused_sdp_choice(query, key, value)
        except (RuntimeError, AssertionError):
            # No kernel is enabled, or no such device exists; the call itself will say so.
            return "none"
    return next((name for name, it in TORCH_KERNELS.items() if it.kernel.value == choice), "none")


def _run_problem(run: Callable[..., Tensor], call: AttentionCall) -> str | None:
    """Return why a kernel fails on such tensors: only a run shows what its build takes."""
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


def _probe(call: AttentionCall) -> list[Tensor]:
    """Make the smallest query, key and value of a kind, which are real where modes are disabled."""
    options: dict[str, Any] = {
        "device": call.device,
        "dtype": call.dtype,
        "requires_grad": call.grad,
    }
    return [
        torch.zeros(1, length, 2, call.head_dim, **options) for length in (8, call.keys, call.keys)
    ]
