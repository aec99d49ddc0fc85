"""Configures a run's reports: videos sampled during training, their metrics, and the loss on videos
held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anyflow.utils.validation import require_text, require_whole

MAX_BATCH = 2**16
MAX_TIMESTEPS = 10**6

Logger = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class PreviewConfig:
    """Videos sampled from the average during training.

    Args:
        every: steps between previews; the last step has one, too. 0 turns them off.
        step_counts: numbers of sampling steps, one row of the grid each.
        num_samples: prompts of the data, one column of the grid each; not used with ``prompts``.
            The data's own videos are a row of the grid, too.
        prompts: prompts of one's own in place of the data's; they need ``model``.
        model: folder or hub name of a model whose text encoder encodes ``prompts``, those of
            ``metrics`` too, once, before training.
        vae: folder or hub name of a model whose VAE decodes the videos of previews and metrics;
            None shows latents in false colors.
    """

    every: int = 0
    step_counts: tuple[int, ...] = (1, 2, 4, 8)
    num_samples: int = 4
    prompts: tuple[str, ...] = ()
    model: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        _check_sampled("preview", self)
        for name in ("model", "vae"):
            if getattr(self, name) is not None:
                require_text(f"preview.{name}", getattr(self, name))


@dataclass(frozen=True)
class MetricsConfig:
    """Metrics of videos sampled from the average during training, always on the same prompts and
    noise.

    Args:
        every: steps between evaluations; the last step has one, too. 0 turns them off.
        step_counts: numbers of sampling steps, one curve of each metric each.
        num_samples: prompts of the data, a video each; not used with ``prompts``.
        prompts: prompts of one's own in place of the data's; they need ``preview.model``.
        reference_steps: sampling steps of the video of the same model that the others are compared
            with (PSNR, LPIPS); 0 leaves the comparison out.
        models: folder of the networks of CLIP similarity, LPIPS and the Fréchet video distance,
            laid out as for ``anyflow evaluate``; None leaves these metrics out.
    """

    every: int = 0
    step_counts: tuple[int, ...] = (1, 2, 4, 8)
    num_samples: int = 16
    prompts: tuple[str, ...] = ()
    reference_steps: int = 50
    models: str | None = None

    def __post_init__(self) -> None:
        _check_sampled("metrics", self)
        require_whole("metrics.reference_steps", self.reference_steps, least=0, most=MAX_TIMESTEPS)
        if self.models is not None:
            require_text("metrics.models", self.models)


def _check_sampled(name: str, config: PreviewConfig | MetricsConfig) -> None:
    require_whole(f"{name}.every", config.every, least=0)
    if not config.step_counts or min(config.step_counts) < 1:
        raise ValueError(
            f"{name}.step_counts must hold positive step counts, got {config.step_counts}"
        )
    for count in config.step_counts:
        require_whole(f"{name}.step_counts", count, most=MAX_TIMESTEPS)
    require_whole(f"{name}.num_samples", config.num_samples, most=MAX_BATCH)
    for prompt in config.prompts:
        require_text(f"{name}.prompts", prompt)


@dataclass(frozen=True)
class ValidationConfig:
    """The pretrain loss of the averaged weights on videos that are not trained on.

    Args:
        every: steps between evaluations; the last step has one, too. 0 turns them off.
        num_samples: videos of each evaluation, always the same ones. Without a ``path`` these rows
            of ``data`` are held out of training, so a run goes on only with the same number.
        path: folder of other latents, of the same shape; None takes rows of ``data``.
    """

    every: int = 0
    num_samples: int = 32
    path: str | None = None

    def __post_init__(self) -> None:
        require_whole("validation.every", self.every, least=0)
        require_whole("validation.num_samples", self.num_samples, most=MAX_BATCH)
        if self.path is not None:
            require_text("validation.path", self.path)
