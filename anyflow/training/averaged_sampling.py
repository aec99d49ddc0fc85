"""Videos of the averaged student during training, at any number of steps; training is left bit for
bit as it was.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor

from anyflow.models.network import has_flow_map
from anyflow.sampling import sample
from anyflow.training.config import Recipe
from anyflow.training.distributed import Mesh
from anyflow.training.ema import EMA
from anyflow.training.steps import build_scheduler


class AveragedSampler:
    """Samples the network with its averages in place of its parameters; a context manager.

    Collective: every rank samples equally often, at the same step counts.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        student: the network; its parameters are back, bit for bit, when the context ends.
        ema: its average.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, student: torch.nn.Module, ema: EMA) -> None:
        self._bf16, self._device = recipe.precision == "bf16", mesh.device
        self._student, self._ema = student, ema
        self._scheduler, self._flow_map = build_scheduler(recipe), has_flow_map(student)
        self._open = ExitStack()

    def __enter__(self) -> AveragedSampler:
        with ExitStack() as opened:
            opened.enter_context(self._ema.applied(self._student))
            opened.enter_context(
                torch.autocast(
                    self._device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=False
                )
            )
            self._open = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._open.close()

    def sample(self, noise: Tensor, prompt_embeds: Tensor, num_steps: int) -> Tensor:
        """Sample one video: a long one fills the memory.

        Args:
            noise: ``[F, C, H, W]``.
            prompt_embeds: ``[1, S, text_dim]``.
            num_steps: network evaluations.

        Returns:
            Its latents ``[F, C, H, W]`` fp32 on the CPU.

        Raises:
            FloatingPointError: they hold NaN or infinity; found when all evaluations are done.
        """
        latents = sample(
            self._student,
            self._scheduler,
            noise[None].to(self._device),
            prompt_embeds.to(self._device),
            num_inference_steps=num_steps,
            use_mean_velocity=self._flow_map,
        )
        return latents[0].float().cpu()
