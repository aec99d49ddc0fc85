"""Configures a run's reports: videos sampled during training, and the loss on videos held out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anyflow.validation import require_text, require_whole

MAX_BATCH = 2**16
MAX_TIMESTEPS = 10**6

Logger = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class PreviewConfig:
    """Videos sampled from the average during training.

    Args:
        every: steps between previews; 0 turns them off.
        step_counts: numbers of sampling steps, one row of the grid each.
        num_samples: prompts of the data, one column of the grid each; not used with ``prompts``.
        prompts: prompts of one's own in place of the data's; they need ``model``.
        model: folder or hub name of a model whose text encoder encodes ``prompts``, once, before training.
        vae: folder or hub name of a model whose VAE decodes the previews; None shows latents in false colors.
    """

    every: int = 0
    step_counts: tuple[int, ...] = (1, 2, 4, 8)
    num_samples: int = 4
    prompts: tuple[str, ...] = ()
    model: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        require_whole("preview.every", self.every, least=0)
        if not self.step_counts or min(self.step_counts) < 1:
            raise ValueError(f"preview.step_counts must hold positive step counts, got {self.step_counts}")
        for count in self.step_counts:
            require_whole("preview.step_counts", count, most=MAX_TIMESTEPS)
        require_whole("preview.num_samples", self.num_samples, most=MAX_BATCH)
        for prompt in self.prompts:
            require_text("preview.prompts", prompt)
        for name in ("model", "vae"):
            if getattr(self, name) is not None:
                require_text(f"preview.{name}", getattr(self, name))
        if bool(self.prompts) != (self.model is not None):
            raise ValueError("preview.model is required with preview.prompts, and only then")


@dataclass(frozen=True)
class ValidationConfig:
    """The pretrain loss of the averaged weights on videos that are not trained on.

    Args:
        every: steps between evaluations; the last step has one, too. 0 turns them off.
        num_samples: videos of each evaluation, always the same ones. Without a ``path`` these rows of ``data`` are held
            out of training, so a run goes on only with the same number.
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
