"""Define and check the settings of the flow-map scheduler."""

from __future__ import annotations

from collections.abc import ItemsView, KeysView
from dataclasses import dataclass
from typing import Any, Literal

from anyflow.schedulers.shift import WEIGHT_TYPES
from anyflow.utils.validation import SettingError, brief, is_finite_number, whole_number

MAX_TRAIN_TIMESTEPS = 10**6
MIN_SHIFT, MAX_SHIFT = 1e-6, 1e6  # beyond, neighbors on the schedule are one number


@dataclass(frozen=True)
class SchedulerConfig:
    """Hold the settings of a scheduler, as attributes and as a mapping; the defaults are Wan's.

    Args:
        num_train_timesteps: N, the timestep of pure noise, at most ``MAX_TRAIN_TIMESTEPS``.
        shift: s in [1e-6, 1e6] of the shift ``S(u) = s u / (1 + (s - 1) u)`` (algorithm.md,
            equation 3).
        weight_type: training weight, ``"beta08"``, ``"gaussian"`` or ``"uniform"``.

    Raises:
        SettingError: a setting is out of range.
    """

    num_train_timesteps: int = 1000
    shift: float = 5.0
    weight_type: Literal["beta08", "gaussian", "uniform"] = "beta08"

    def __post_init__(self) -> None:
        number = whole_number(
            "num_train_timesteps", self.num_train_timesteps, high=MAX_TRAIN_TIMESTEPS
        )
        if not is_finite_number(self.shift) or not MIN_SHIFT <= self.shift <= MAX_SHIFT:
            raise SettingError(
                "shift",
                f"must be a positive number, from {MIN_SHIFT:g} to {MAX_SHIFT:g}, got "
                f"{brief(self.shift)}",
            )
        if self.weight_type not in WEIGHT_TYPES:
            raise SettingError(
                "weight_type",
                f"must be one of {', '.join(WEIGHT_TYPES)}, got {brief(self.weight_type)}",
            )
        # numbers of NumPy and torch become Python's, which a file can hold
        object.__setattr__(self, "num_train_timesteps", number)
        object.__setattr__(self, "shift", float(self.shift))

    def __getitem__(self, key: str) -> Any:
        return vars(self)[key]

    def __contains__(self, key: object) -> bool:
        return key in vars(self)

    def keys(self) -> KeysView[str]:
        """Return the names of the settings."""
        return vars(self).keys()

    def items(self) -> ItemsView[str, Any]:
        """Return the names and values of the settings."""
        return vars(self).items()

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting, or the default for a name that is none."""
        return vars(self).get(key, default)


def _refuse(self: SchedulerConfig, name: str, value: object) -> None:
    raise AttributeError(
        f"scheduler.config.{name} is read-only; use set_shift(), or from_config(config, {name}=...)"
    )


SchedulerConfig.__setattr__ = _refuse  # type: ignore[method-assign,assignment]  # says what to do
