"""Average a module's parameters exponentially."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from anyflow.utils.validation import SettingError, require_number, require_whole


@dataclass(frozen=True)
class EMAConfig:
    """Hold the settings of the student's average, which is sampled from and exported.

    Args:
        decay: in [0, 1).
        start_step: up to this step the average is a copy of the parameters.
    """

    decay: float = 0.999
    start_step: int = 1000

    def __post_init__(self) -> None:
        require_number("decay", self.decay)
        if not 0 <= self.decay < 1:
            raise SettingError("decay", f"must be in [0, 1), got {self.decay}")
        require_whole("start_step", self.start_step, least=0)


class EMA:
    """Keep an exponential moving average of parameters, in fp32 at least, on their device.

    An update is ``average <- decay * average + (1 - decay) * parameter``.

    Sharded parameters (DTensors) have sharded averages: every rank averages its own part.

    Args:
        module: the module whose trainable parameters are averaged.
        decay: in [0, 1).
        warmup: with k updates done, the decay is at most ``(1 + k) / (10 + k)``, so that the start
            is forgotten early.
        start_step: the number of first updates that copy the parameters instead.

    Attributes:
        updates: updates done; to resume, set it and fill the tensors of :meth:`state_dict` in
            place.

    Raises:
        ValueError: decay or start_step is out of range.
    """

    def __init__(
        self, module: nn.Module, decay: float, *, warmup: bool = True, start_step: int = 0
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if start_step < 0:
            raise ValueError(f"start_step must be >= 0, got {start_step}")
        self.decay, self.warmup, self.start_step, self.updates = decay, warmup, start_step, 0
        self._names = [name for name, p in module.named_parameters() if p.requires_grad]
        self._averages = [_wide(p) for p in module.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step towards the module's parameters."""
        decay = (
            min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        )
        if self.updates < self.start_step:
            decay = 0.0
        self.updates += 1
        averages = local_parts(self._averages)
        parameters = [
            p.detach().to(a.dtype)
            for p, a in zip(local_parts(self._parameters(module)), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, parameters, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into a module of the same parameters."""
        for parameter, average in zip(self._parameters(module), self._averages, strict=True):
            parameter.copy_(average)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the averages in place of the module's parameters, which come back bit for bit."""
        originals = [p.detach().clone() for p in self._parameters(module)]
        try:
            self.copy_to(module)
            _reshard(module)
            yield
        finally:
            with torch.no_grad():
                for parameter, original in zip(self._parameters(module), originals, strict=True):
                    parameter.copy_(original)
            _reshard(module)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages, without copies, under the parameters' own names (dots kept)."""
        return dict(zip(self._names, self._averages, strict=True))

    def _parameters(self, module: nn.Module) -> list[Tensor]:
        by_name = dict(module.named_parameters())
        missing = [name for name in self._names if name not in by_name]
        if missing:
            raise ValueError(f"module lacks the averaged parameters {', '.join(missing)}")
        return [by_name[name] for name in self._names]


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's part of each tensor, sharing memory; a plain tensor is its own part."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _wide(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)


def _reshard(module: nn.Module) -> None:
    """Drop gathered parameters.

    After a forward without backward, the root would use its gathered parameters again, although the
    shards have changed.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
