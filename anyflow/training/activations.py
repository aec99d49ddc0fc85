"""Count the memory that a transformer block takes while it runs, on tensors without memory."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from anyflow.models.blocks import AnyFlowTransformerBlock


def block_bytes(
    block: AnyFlowTransformerBlock,
    batch: int,
    tokens: int,
    text_tokens: int,
    precision: str,
    *,
    gradient: bool = True,
    fake: bool = True,
) -> tuple[int, int]:
    """Run one block forward and backward; return the bytes of its input and of its peak.

    Its parameters are left out, and the gradients of those once they are there.

    Args:
        block: the block, with parameters on the meta device, or on the CPU without ``fake``.
        batch, tokens, text_tokens: sizes of the input.
        precision: ``"bf16"`` runs under autocast.
        gradient: False runs forward alone, as without gradient.
        fake: run on tensors without memory.
    """
    dim = block.scale_shift_table.shape[-1]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    half = dim // block.attn1.num_heads // 2
    with _fake(block) if fake else nullcontext(block) as run:
        x = torch.zeros(batch, tokens, dim, dtype=dtype, requires_grad=gradient)
        text = torch.zeros(batch, text_tokens, dim, dtype=dtype)
        others = (
            text,
            torch.zeros(batch, 1, 6, dim),
            (torch.ones(tokens, half), torch.zeros(tokens, half)),
        )
        for parameter in (p for p in run.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        memory = Allocations()
        autocast = torch.autocast(
            "cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False
        )
        with autocast, torch.set_grad_enabled(gradient), memory:
            out = run(x, *others)
            if gradient:
                out.backward(torch.ones_like(out))
    return x.nbytes, memory.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class Allocations(TorchDispatchMode):
    """Count the bytes of storages that operators make, fake or real, while they are alive.

    Attributes:
        peak: the most at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):  # what was there before is not counted
            if isinstance(tensor, Tensor):
                self._seen.setdefault(tensor.untyped_storage(), 0)
        out = func(*args, **({} if kwargs is None else kwargs))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage not in self._seen:
                self._seen[storage] = storage.nbytes()
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def _fake(block: AnyFlowTransformerBlock) -> Iterator[nn.Module]:
    """Make a copy of a block whose parameters are fakes on the CPU, in the mode of fakes."""
    twin = copy.deepcopy(block)
    with FakeTensorMode():
        for name, parameter in block.named_parameters():
            owner, _, leaf = name.rpartition(".")
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(twin.get_submodule(owner), leaf, nn.Parameter(tensor, parameter.requires_grad))
        yield twin
