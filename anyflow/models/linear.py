"""Run the model's linear layers by the operator where nothing stands between, else as modules."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from anyflow.ops import linear


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return ``layer(x)`` for any module, by :func:`anyflow.ops.linear` for plain ones on a CPU."""
    if x.is_cpu and is_plain_linear(layer):
        return linear(x, cast(Tensor, layer.weight), cast(Tensor, layer.bias))
    return cast(Tensor, layer(x))


def is_plain_linear(module: nn.Module) -> bool:
    """Check that calling the module is nothing but ``F.linear`` with its own parameters.

    A LoRA or quantized layer (another class), a quantized or sharded weight (another tensor type),
    hooks, or a ``forward`` replaced on the instance, as by accelerate's offloading and diffusers'
    layerwise casting, fail the check.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and type(module.bias) is nn.Parameter
        and "forward" not in module.__dict__
        and not module._forward_pre_hooks
        and not module._forward_hooks
    )


def no_derivative_needed(*tensors: Tensor) -> bool:
    """Check that an operator without a derivative may take the tensors: no autograd, no jvp."""
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def fuses_gelu(proj: nn.Module, x: Tensor) -> bool:
    """Check that ``torch._addmm_activation`` may compute ``gelu(proj(x))``."""
    # on a CPU the activation is the erf GELU; AMD's kernel is not measured
    if not x.is_cuda or torch.version.hip is not None:
        return False
    # hooks, adapters and autocast would be skipped
    if not is_plain_linear(proj) or torch.is_autocast_enabled(x.device.type):
        return False
    weight, bias = cast(Tensor, proj.weight), cast(Tensor, proj.bias)
    # the operator neither casts nor moves
    alike = all(t.dtype == x.dtype and t.device == x.device for t in (weight, bias))
    return alike and x.numel() > 0 and no_derivative_needed(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``gelu(x weight^T + bias)`` of one kernel: ``[..., D] -> [..., N]``.

    The operator has no derivative, and is the tanh-GELU on CUDA only.
    """
    out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])
