"""Configure the pretrain loss."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow.methods.causal import CausalConfig
from anyflow.methods.time_pairs import check_ratios
from anyflow.utils.validation import SettingError, require_number, require_positive


@dataclass(frozen=True)
class PretrainConfig:
    """Hold the settings of the pretrain loss; the defaults are the published ones.

    Args:
        diffusion_ratio: share of the global batch with r = t.
        consistency_ratio: share of the global batch with r = 0.
        epsilon: half-width of the central difference, in timesteps of the scheduler.
        fuse_guidance_scale: g > 0, the guidance distilled into the model; 1 runs no unconditional
            forward.
        boundary: ``"one_sided"`` keeps t +- epsilon inside [0, 1] and divides by the width used;
            ``"extrapolate"`` leaves [0, 1], as the reference trainer does.
        derivative: ``"central"`` difference, or ``"jvp"`` for exact forward-mode (math attention;
            three network calls).
        prompt_dropout: chance that a prompt is replaced by the negative embedding (0.1 in the
            published recipe).
        i2v_prob: chance that an update trains image-to-video: frame 0 is kept clean and left out of
            the loss.
        velocity_target: ``"data"`` regresses on the velocity ``noise - x0`` of a pair, which is
            right in the mean over pairs only; ``"teacher"`` regresses on the velocity of a trained
            network at (x_t, t), and takes the time derivative along it, too. A teacher costs one
            more evaluation and removes the scatter of pairs from the target.
        causal: settings of the causal model, whose loss is on the last chunks of a video after
            clean ones; None trains a bidirectional model.

    Raises:
        SettingError: a value is out of range.
    """

    diffusion_ratio: float = 0.5
    consistency_ratio: float = 0.25
    epsilon: float = 5.0
    fuse_guidance_scale: float = 3.0
    boundary: str = "one_sided"
    derivative: str = "central"
    prompt_dropout: float = 0.0
    i2v_prob: float = 0.0
    velocity_target: str = "data"
    causal: CausalConfig | None = None

    def __post_init__(self) -> None:
        check_ratios(self.diffusion_ratio, self.consistency_ratio)
        for name in ("epsilon", "fuse_guidance_scale"):
            require_positive(name, getattr(self, name))
        choices = {
            "boundary": ("one_sided", "extrapolate"),
            "derivative": ("central", "jvp"),
            "velocity_target": ("data", "teacher"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SettingError(name, f"must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("prompt_dropout", "i2v_prob"):
            require_number(name, getattr(self, name))
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(name, f"must be in [0, 1], got {getattr(self, name)}")
        if self.causal is not None:
            self._check_causal()

    def _check_causal(self) -> None:
        """Raise a SettingError for what the loss on chunks does not have."""
        if self.velocity_target == "teacher":
            raise SettingError(
                "velocity_target",
                "must be 'data' with causal settings: a teacher sees no chunks before a video's "
                "last, got 'teacher'",
            )
        if self.i2v_prob > 0:
            raise SettingError(
                "i2v_prob",
                "must be 0 with causal settings: a causal model continues pictures and videos "
                f"by its chunks, got {self.i2v_prob}",
            )

    def check_timesteps(self, num_train_timesteps: int) -> None:
        """Raise a SettingError unless ``epsilon`` fits a scheduler's range of timesteps."""
        if self.epsilon >= num_train_timesteps / 2:
            raise SettingError(
                "epsilon",
                f"must be below half of num_train_timesteps={num_train_timesteps}, "
                f"got {self.epsilon}",
            )

    @property
    def is_flow_matching(self) -> bool:
        """Tell whether the loss is flow matching, which evaluates nothing without gradient."""
        return self.diffusion_ratio == 1 and self.fuse_guidance_scale == 1
