"""Guard against values that are not finite, before an update and before a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow.training.ema import local_parts


class TrainingError(FloatingPointError):
    """Say that a loss, a gradient, a network's output or its state is NaN or infinite.

    Attributes:
        step: number of the update, from 1.
        network: the one that failed: student, critic or teacher.
    """

    def __init__(self, message: str, step: int, network: str) -> None:
        super().__init__(message)
        self.step, self.network = step, network


def check_finite(
    step: int, values: Mapping[str, Tensor], gradient_norms: Mapping[str, Tensor]
) -> None:
    """Raise on every rank if a value is NaN or infinite on any; wait once for the device.

    Args:
        step: number of the update, from 0; reported from 1.
        values: scalars by phrases that end in a network's name, such as ``"loss of the student"``,
            in the order in which they are suspected.
        gradient_norms: norm of each parameter's gradient (this rank's part), read only to report.

    Raises:
        TrainingError: naming the first value that is not finite and, if there is one, the first
            such gradient.
    """
    flags = _anywhere(~torch.isfinite(torch.stack([v.detach().float() for v in values.values()])))
    if not any(flags):
        return
    found = [
        (i, name)
        for i, (name, norm) in enumerate(gradient_norms.items())
        if not math.isfinite(norm.item())
    ][:1]
    if _several():
        everywhere: list[list[tuple[int, str]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, found)
        found = sorted(item for rank in everywhere for item in rank)
    value = next(name for name, flag in zip(values, flags, strict=True) if flag)
    # else the gradients are spoiled by another network's output
    own = "loss" in value or "gradient" in value
    gradient = f"; the first such gradient is that of {found[0][1]}" if found and own else ""
    message = f"step {step + 1}: {value} is not finite{gradient}. Nothing was updated by it"
    raise TrainingError(message, step + 1, value.rpartition(" ")[2])


@torch.no_grad()
def check_state(done: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise on every rank if a checkpoint's tensor is not finite on any; wait once.

    The norm of a parameter or an average is checked in fp32: one that overflows makes every loss
    overflow, too.

    Args:
        done: updates done.
        tensors: those of a checkpoint, by their names in it: ``student/...``,
            ``optimizer/student/...``, ``ema/...``.

    Raises:
        TrainingError: naming the first such tensor.
    """
    names = sorted(tensors, key=lambda name: name.startswith("optimizer/"))
    state = [name for name in names if name.startswith("optimizer/")]
    weights = names[: len(names) - len(state)]
    norms = [
        norm
        for chosen, order in ((weights, 2.0), (state, math.inf))
        for norm in torch._foreach_norm(
            _filled(local_parts([tensors[name] for name in chosen])), order
        )
    ]
    flags = _anywhere(~torch.isfinite(torch.stack([norm.float() for norm in norms])))
    if not any(flags):
        return
    name = next(name for name, flag in zip(names, flags, strict=True) if flag)
    network = next((part for part in name.split("/") if part in ("student", "critic")), "student")
    message = (
        f"step {done}: {name} of the {network} is not finite, or its norm is not. No checkpoint "
        "was written of it"
    )
    raise TrainingError(message, done, network)


def _filled(parts: list[Tensor]) -> list[Tensor]:
    """Put a zero in place of each empty part: nothing has no largest value.

    A rank may have an empty part of a small tensor.
    """
    return [part if part.numel() else part.new_zeros(1) for part in parts]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _anywhere(flags: Tensor) -> list[bool]:
    """Read the flags that are set on any rank; one wait for the device."""
    if _several():
        flags = flags.to(torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
