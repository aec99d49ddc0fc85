"""Update one network: AdamW, its learning rate by step, clipping, and the finite guard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from anyflow.training.distributed import clip_gradients
from anyflow.training.ema import local_parts
from anyflow.training.guard import TrainingError, check_finite
from anyflow.utils.validation import (
    SettingError,
    require_number,
    require_positive,
    require_whole,
)

__all__ = ["NetworkOptimizer", "OptimizerConfig", "TrainingError", "check_finite", "lr_factor"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Hold the settings of AdamW, its schedule and the clipping for one network.

    Args:
        lr: peak learning rate.
        betas: AdamW's decay rates of the mean of gradients and of their squares.
        eps: AdamW's epsilon.
        weight_decay: AdamW's decoupled weight decay.
        schedule: after the warm-up, ``"constant"`` or ``"cosine"`` down to ``min_lr_ratio`` at the
            last step.
        warmup_steps: linear warm-up; the first step has ``lr / warmup_steps``.
        min_lr_ratio: end of the cosine, as a share of lr.
        clip_norm: largest norm of this network's gradient.
    """

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip_norm"):
            require_positive(name, getattr(self, name))
        for beta in self.betas:
            require_number("betas", beta)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise SettingError("betas", f"must be two numbers in [0, 1), got {self.betas}")
        for name in ("weight_decay", "min_lr_ratio"):
            require_number(name, getattr(self, name), least=0)
        require_whole("warmup_steps", self.warmup_steps, least=0)
        if self.min_lr_ratio > 1:
            raise SettingError("min_lr_ratio", f"must be <= 1, got {self.min_lr_ratio}")


def lr_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the share of the peak learning rate of update ``step`` (from 0).

    The first of w warm-up updates has 1 / w and the last one 1; the cosine ends at ``min_lr_ratio``
    with the last update.
    """
    warmup = max(config.warmup_steps, 1)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = min((step + 1 - warmup) / (total_steps - warmup), 1.0)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


class NetworkOptimizer:
    """Run AdamW on the parameters of ``network`` that train.

    The state exists from the start, as zeros: a checkpoint has tensors to be loaded into.

    Args:
        name: name of the network, in error messages and checkpoints.
        network: after sharding; at least one parameter must require a gradient.
        config: settings.
        total_steps: where the cosine ends.
    """

    def __init__(
        self, name: str, network: nn.Module, config: OptimizerConfig, total_steps: int
    ) -> None:
        self.name, self.network, self.config, self.total_steps = name, network, config, total_steps
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        assert self.parameters, f"no parameter of the {name} trains"
        self._adamw = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for p in self.parameters.values():
            self._adamw.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p.detach()),
                "exp_avg_sq": torch.zeros_like(p.detach()),
            }

    def lr(self, step: int) -> float:
        """Return the learning rate of update ``step`` (from 0)."""
        return self.config.lr * lr_factor(self.config, step, self.total_steps)

    def update(
        self, step: int, losses: Mapping[str, Tensor], norms: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Guard, clip and apply the gradients of update ``step`` (from 0); return their norm.

        The gradients are dropped afterwards.

        Args:
            step: number of the update.
            losses: scalars that must be finite.
            norms: norms of networks' outputs, by phrases such as ``"score of the teacher"``;
                suspected before the losses.

        Raises:
            TrainingError: one of these or the gradients' norm is not finite; parameters and state
                are untouched.
        """
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        # Before clipping: a norm that is not finite spoils every gradient.
        parts = dict(
            zip(gradients, torch._foreach_norm(local_parts(list(gradients.values()))), strict=True)
        )
        norm = clip_gradients(self.parameters.values(), self.config.clip_norm)
        own = {
            f"{name} of the {self.name}": value
            for name, value in {**losses, "gradient norm": norm}.items()
        }
        check_finite(step, {**({} if norms is None else norms), **own}, parts)
        for group in self._adamw.param_groups:
            group["lr"] = self.lr(step)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters and optimizer state, without copies, by their names in a checkpoint."""
        tensors = {f"{self.name}/{n}": p.detach() for n, p in self.parameters.items()}
        for n, p in self.parameters.items():
            state = self._adamw.state[p]
            tensors.update(
                {
                    f"optimizer/{self.name}/{n}/{key}": state[key]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
            )
        return tensors
