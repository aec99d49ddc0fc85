"""Sample videos of the averaged student during training, at any number of steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyflow.models.network import has_flow_map, is_causal
from anyflow.sampling import sample, sample_causal
from anyflow.training.distributed import Mesh
from anyflow.training.ema import EMA
from anyflow.training.limits import MAX_BATCH, MAX_TIMESTEPS
from anyflow.training.updates import build_scheduler
from anyflow.utils.validation import SettingError, require_text, require_whole

if TYPE_CHECKING:
    from anyflow.training.config import Recipe
    from anyflow.training.preview import PreviewConfig
    from anyflow.training.sample_metrics import MetricsConfig


def require_sampled(config: PreviewConfig | MetricsConfig) -> None:
    """Check the settings that previews and metrics share.

    Raises:
        SettingError: one of them cannot work.
    """
    require_whole("every", config.every, least=0)
    if not config.step_counts or min(config.step_counts) < 1:
        raise SettingError("step_counts", f"must hold positive counts, got {config.step_counts}")
    for count in config.step_counts:
        require_whole("step_counts", count, most=MAX_TIMESTEPS)
    require_whole("num_samples", config.num_samples, most=MAX_BATCH)
    for prompt in config.prompts:
        require_text("prompts", prompt)


class AveragedSampler:
    """Sample the network with its averages in place of its parameters, in a context.

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
        causal = recipe.pretrain.causal
        self._causal = is_causal(student)
        self._chunk_partition = None if causal is None else causal.chunk_partition
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

    def sample(self, noise: Tensor, prompt_embeds: Tensor, num_inference_steps: int) -> Tensor:
        """Sample one video: a long one fills the memory.

        Args:
            noise: ``[F, C, H, W]``.
            prompt_embeds: ``[1, S, text_dim]``.
            num_inference_steps: network evaluations; of each chunk for a causal student.

        Returns:
            Its latents ``[F, C, H, W]`` fp32 on the CPU.

        Raises:
            FloatingPointError: they hold NaN or infinity; found when all evaluations are done.
        """
        sample_video: Callable[..., Tensor] = sample
        if self._causal:
            sample_video = partial(sample_causal, chunk_partition=self._chunk_partition)
        latents = sample_video(
            self._student,
            self._scheduler,
            noise[None].to(self._device),
            prompt_embeds.to(self._device),
            num_inference_steps=num_inference_steps,
            use_mean_velocity=self._flow_map,
        )
        return latents[0].float().cpu()
