"""Provide tiny transformers, and random arguments for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow.models import use_attention_backend
from anyflow.ops.native import EXTENSION

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 80,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


@dataclass
class Inputs:
    """Hold the arguments of a forward, per frame; ``image`` only for models that take one."""

    x: Tensor
    t: Tensor
    r: Tensor
    text: Tensor
    image: Tensor | None

    def tuple(self) -> tuple[Tensor | None, ...]:
        """Return the arguments in the order of diffusers' forward."""
        return self.x, self.t, self.r, self.text, self.image


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Return a configuration with two layers."""
    return dict(TINY)


@pytest.fixture
def make_inputs(generator: torch.Generator) -> Callable[..., Inputs]:
    """Return ``make_inputs(b, f, h, w, image=False, per_sample=False)``: fp32, 1000 >= t >= r."""

    def make(
        b: int = 2,
        f: int = 3,
        h: int = 4,
        w: int = 6,
        *,
        image: bool = False,
        per_sample: bool = False,
    ) -> Inputs:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        t = 1000 * torch.rand(b, f, generator=generator)
        r = t * torch.rand(b, f, generator=generator)
        if per_sample:
            t, r = (v[:, :1].expand(b, f).contiguous() for v in (t, r))
        return Inputs(
            randn(b, f, 16, h, w), t, r, randn(b, 7, 20), randn(b, 5, 12) if image else None
        )

    return make


@pytest.fixture(autouse=True)
def _automatic_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start and end every test with the automatic choice of an attention backend."""
    monkeypatch.delenv("ANYFLOW_ATTENTION", raising=False)
    with use_attention_backend(None):
        yield


@pytest.fixture
def qkv(generator: torch.Generator) -> Callable[..., tuple[Tensor, ...]]:
    """Return ``qkv((B, L, S, H, Dh), dtype=fp32, grad=False)``: query, key and value."""

    def make(
        shape: tuple[int, ...] = (2, 37, 7, 3, 64),
        dtype: torch.dtype = torch.float32,
        grad: bool = False,
    ) -> Any:
        b, l, s, h, d = shape
        tensors = (torch.randn(b, n, h, d, generator=generator).to(dtype) for n in (l, s, s))
        return tuple(t.requires_grad_(grad) for t in tensors)

    return make


class Operators(TorchDispatchMode):
    """Record the names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def operators_of() -> Callable[..., list[str]]:
    """Return ``operators_of(function, *args, **kwargs)``: the names of the operators that run."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
        with Operators() as operators:
            function(*args, **kwargs)
        return operators.names

    return run


@pytest.fixture
def automatic() -> str:
    """Return the backend of attention that is chosen for fp32 on this CPU."""
    return (
        "flash" if EXTENSION is None or EXTENSION.cpu_instruction_set() == "generic" else "native"
    )


@pytest.fixture
def kernel_among() -> Callable[[list[str]], str]:
    """Return ``kernel_among(operators)``: the CPU kernel of attention that they hold."""

    def kernel(names: list[str]) -> str:
        if any(name.removeprefix("anyflow.").startswith("attention") for name in names):
            return "native"
        if any("flash_attention_for_cpu" in name for name in names):
            return "flash"
        return "math" if any("softmax" in name for name in names) else "none"

    return kernel


@pytest.fixture
def kernel_of(
    operators_of: Callable[..., list[str]], kernel_among: Callable[[list[str]], str]
) -> Callable[..., str]:
    """Return ``kernel_of(function, *args, **kwargs)``: the CPU kernel of attention that runs."""
    return lambda *args, **kwargs: kernel_among(operators_of(*args, **kwargs))
