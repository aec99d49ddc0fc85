"""The optimizer of one network: AdamW, its learning rate as a function of the step, clipping, and the finite guard."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anyflow.training.config import OptimizerConfig
from anyflow.training.distributed import clip_gradients
from anyflow.training.ema import local_parts


class TrainingError(FloatingPointError):
    """A loss or a gradient is NaN or infinite."""


def lr_factor(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The share of the peak learning rate that update ``step`` (from 0) uses: warm-up, then constant or cosine.

    The first of w warm-up updates has 1 / w and the last one 1; the cosine ends at ``min_lr_ratio`` with the last
    update.
    """
    warmup = max(config.warmup_steps, 1)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = min((step + 1 - warmup) / (total_steps - warmup), 1.0)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class NetworkOptimizer:
    """AdamW on the parameters of ``network`` that train.

    The state exists from the start, as zeros: a checkpoint has tensors to be loaded into.

    Args:
        name: of the network, in error messages and checkpoints.
        network: after sharding; at least one parameter must require a gradient.
        config: settings.
        total_steps: where the cosine ends.
    """

    def __init__(self, name: str, network: nn.Module, config: OptimizerConfig, total_steps: int) -> None:
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
        """Learning rate of update ``step`` (from 0)."""
        return self.config.lr * lr_factor(self.config, step, self.total_steps)

    def update(self, step: int, losses: Mapping[str, Tensor]) -> Tensor:
        """Guard, clip and apply the gradients of update ``step`` (from 0), then drop them; returns their norm.

        Raises:
            TrainingError: the norm or one of the losses (scalars) is not finite; parameters and state are untouched.
        """
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        # Before clipping: a norm that is not finite spoils every gradient.
        norms = dict(zip(gradients, torch._foreach_norm(local_parts(list(gradients.values()))), strict=True))
        norm = clip_gradients(self.parameters.values(), self.config.clip_norm)
        check_finite(self.name, step, {**losses, "gradient norm": norm}, norms)
        for group in self._adamw.param_groups:
            group["lr"] = self.lr(step)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimizer state themselves, by their names in a checkpoint."""
        tensors = {f"{self.name}/{n}": p.detach() for n, p in self.parameters.items()}
        for n, p in self.parameters.items():
            state = self._adamw.state[p]
            tensors.update(
                {f"optimizer/{self.name}/{n}/{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
            )
        return tensors


def check_finite(network: str, step: int, values: Mapping[str, Tensor], gradient_norms: Mapping[str, Tensor]) -> None:
    """Raise on every rank if a value is NaN or infinite on any; one synchronization with the device.

    Args:
        network: named in the error.
        step: number of the update, from 0; reported from 1.
        values: scalars, in the order in which they are suspected.
        gradient_norms: of each parameter (this rank's part), read only to report.

    Raises:
        TrainingError: naming the first value that is not finite and, if there is one, the first such gradient.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    bad = ~torch.isfinite(torch.stack([v.detach().float() for v in values.values()]))
    if several:
        bad = bad.to(torch.uint8)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    flags = [bool(flag) for flag in bad.tolist()]
    if not any(flags):
        return
    found = [(i, name) for i, (name, norm) in enumerate(gradient_norms.items()) if not math.isfinite(norm.item())][:1]
    if several:
        everywhere: list[list[tuple[int, str]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, found)
        found = sorted(item for rank in everywhere for item in rank)
    value = next(name for name, flag in zip(values, flags, strict=True) if flag)
    gradient = f"; the first such gradient is that of {found[0][1]}" if found else ""
    raise TrainingError(
        f"step {step + 1}: {value} of the {network} is not finite{gradient}. Nothing was updated by it; "
        "try a lower learning rate, a longer warm-up or precision=fp32"
    )
