"""Step along a flow map by Euler: ``x_r = x_t - (t - r) u(x_t, t, r)``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow.schedulers.config import SchedulerConfig
from anyflow.schedulers.schedule import MAX_STEPS, checked_schedule, read_numbers
from anyflow.schedulers.shift import invert_shift, nearest_weight, shift_times, train_weight_grid
from anyflow.utils.devices import widest_float
from anyflow.utils.documents import read_json, shortened
from anyflow.utils.transfer import to_device
from anyflow.utils.validation import brief, whole_number

CONFIG_NAME = "scheduler_config.json"
# a timestep this close to an entry of the schedule is that entry (in timesteps, as in diffusers)
_ON_SCHEDULE = 1e-3


@dataclass
class FlowMapEulerDiscreteSchedulerOutput:
    """Hold the result of :meth:`FlowMapEulerDiscreteScheduler.step`, the sample at r."""

    prev_sample: Tensor

    def __getitem__(self, index: int | str) -> Tensor:
        return (self.prev_sample,)[index] if isinstance(index, int) else getattr(self, index)


class FlowMapEulerDiscreteScheduler:
    """Step between any two times, both of which the caller may choose.

    Timesteps are in [0, num_train_timesteps], sigmas in [0, 1], and sigma = timestep /
    num_train_timesteps always. The class works as the ``scheduler`` of
    ``diffusers.AnyFlowPipeline``.

    Args:
        num_train_timesteps: N, the timestep of pure noise, at most 10^6.
        shift: s in [1e-6, 1e6] of the shift ``S(u) = s u / (1 + (s - 1) u)``; Wan uses 5.
        weight_type: training weight, ``"beta08"``, ``"gaussian"`` or ``"uniform"``.

    Raises:
        ValueError: a setting is out of range.
    """

    order = 1
    init_noise_sigma = 1.0
    config_name = CONFIG_NAME

    sigmas: Tensor
    timesteps: Tensor
    num_inference_steps: int

    def __init__(
        self, num_train_timesteps: int = 1000, shift: float = 1.0, weight_type: str = "beta08"
    ) -> None:
        self._configure(SchedulerConfig(num_train_timesteps, shift, weight_type))  # type: ignore[arg-type]
        self.set_timesteps(min(self._n, MAX_STEPS))

    def _configure(self, config: SchedulerConfig) -> None:
        self.config = config
        self._weights: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config.items())})"

    # Configuration files --------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | SchedulerConfig, **overrides: Any
    ) -> FlowMapEulerDiscreteScheduler:
        """Build a scheduler from a configuration, in which overrides take precedence.

        Keys that start with an underscore (diffusers' bookkeeping) are skipped.

        Raises:
            ValueError: the configuration is no mapping, or has a key this scheduler does not know.
        """
        if not isinstance(config, (Mapping, SchedulerConfig)):
            raise ValueError(
                f"a scheduler's configuration must be a mapping of settings, got {brief(config)}"
            )
        settings = {
            k: v
            for k, v in {**dict(config.items()), **overrides}.items()
            if not str(k).startswith("_")
        }
        known = [field.name for field in fields(SchedulerConfig)]
        if unknown := sorted(str(name)[:80] for name in settings if name not in known):
            raise ValueError(
                f"unknown scheduler settings {', '.join(unknown[:12])}; expected {', '.join(known)}"
            )
        return cls(**settings)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, subfolder: str | None = None, **overrides: Any
    ) -> FlowMapEulerDiscreteScheduler:
        """Load a scheduler from ``scheduler_config.json``, or a folder or subfolder that holds it.

        Raises:
            ValueError: the file does not exist, cannot be read, or holds a setting this
                scheduler does not know.
        """
        file = Path(path) if subfolder is None else Path(path) / subfolder
        file = file / CONFIG_NAME if os.path.isdir(file) else file
        if not os.path.lexists(file):
            raise ValueError(f"no {CONFIG_NAME} at {shortened(file)}")
        config = read_json(file)
        try:
            return cls.from_config(config, **overrides)
        except ValueError as error:
            raise ValueError(f"{shortened(file)}: {error}") from None

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``scheduler_config.json`` into a folder, which is created if needed."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {"_class_name": type(self).__name__, **dict(self.config.items())}
        (directory / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n")

    # Schedule -------------------------------------------------------------------------------------

    def apply_shift(self, sigmas: Any) -> Any:
        """Return ``S(u) = s u / (1 + (s - 1) u)`` of a number or tensor in [0, 1]."""
        return shift_times(sigmas, self.config.shift)

    def invert_shift(self, sigmas: Any) -> Any:
        """Undo :meth:`apply_shift`."""
        return invert_shift(sigmas, self.config.shift)

    def set_shift(self, shift: float) -> None:
        """Change the shift and rebuild the default schedule at the current number of steps.

        Raises:
            ValueError: shift is not a positive finite number.
        """
        self._configure(replace(self.config, shift=shift))
        self.set_timesteps(self.num_inference_steps, self.sigmas.device)

    def schedule(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | Tensor | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> Tensor:
        """Return the sigmas of a schedule, fp64 ``[n + 1]`` on CPU, descending to 0.

        The scheduler is not changed. Without ``sigmas`` or ``timesteps`` the schedule is
        ``S(linspace(1, 0, n + 1))``. Custom values are used verbatim, never shifted again; a
        terminal 0 is appended unless it is there already.

        Raises:
            ValueError: no length is given or lengths disagree; values are NaN, out of range or not
                descending.
        """
        if sigmas is not None and timesteps is not None:
            raise ValueError("give either sigmas or timesteps, not both")
        if sigmas is None and timesteps is None:
            if num_inference_steps is None:
                raise ValueError(
                    "num_inference_steps is required unless sigmas or timesteps are given"
                )
            n = whole_number("num_inference_steps", num_inference_steps, high=MAX_STEPS)
            return self.apply_shift(torch.linspace(1, 0, n + 1, dtype=torch.float64))
        name, top = ("sigmas", 1.0) if sigmas is not None else ("timesteps", self._n)
        given = read_numbers(name, sigmas if sigmas is not None else timesteps)
        values = checked_schedule(name, given, top)
        n = len(values) - 1
        # A caller that counted the terminal 0 it passed means the same schedule.
        if num_inference_steps not in (None, n, len(given)):
            raise ValueError(f"num_inference_steps={num_inference_steps}, but {name} has {n} steps")
        return values / top

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        sigmas: Sequence[float] | Tensor | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Set the sampling schedule: ``timesteps[n]``, and ``sigmas[n + 1]`` with the terminal 0.

        Arguments and errors are those of :meth:`schedule`; ``device`` is where both tensors are
        put.
        """
        values = self.schedule(num_inference_steps, sigmas=sigmas, timesteps=timesteps)
        # on the host: looking up a step must not wait for a GPU
        self._schedule = (values[:-1] * self._n).tolist()
        dtype = widest_float("cpu" if device is None else device)
        self.sigmas = values.to(device=device, dtype=dtype)
        self.timesteps = (values[:-1] * self._n).to(device=device, dtype=dtype)
        self.num_inference_steps = len(self._schedule)
        self._step_index: int | None = None
        self._begin_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Return the number of the next step; None before the first :meth:`step`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Return the first step of a schedule entered midway; None: the timestep tells it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Enter the schedule at ``begin_index``, which only affects :attr:`step_index`."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor) -> int | None:
        """Return the index of a timestep on the current schedule, or None if it is not there."""
        value = float(timestep)
        index = min(range(len(self._schedule)), key=lambda i: abs(self._schedule[i] - value))
        return index if abs(self._schedule[index] - value) <= _ON_SCHEDULE else None

    # Steps ----------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the sample as it is, which is how flow maps take it."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        r_timestep: float | Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMapEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Move a sample from t to r: ``x_r = x_t - (t - r) / N * u``, in fp32 at least.

        Numbers and CPU tensors are validated. Device tensors are taken as they are, so that no step
        waits for the GPU; without ``r_timestep``, a device ``timestep`` must be read to find the
        next one.

        Args:
            model_output: u, ``[B, F, ...]``.
            timestep: t: a number, ``[]``, ``[B]`` or ``[B, F]``, in [0, N]. Per-sample values are
                honored.
            sample: x_t, the shape of model_output.
            r_timestep: r <= t; as timestep. None takes the entry that follows ``timestep`` on the
                schedule.
            return_dict: False returns a 1-tuple.

        Returns:
            ``.prev_sample``, x_r in sample's dtype.

        Raises:
            ValueError: shapes do not fit, times are out of range, NaN or ascending, or r cannot be
                inferred.
        """
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} must "
                "match"
            )
        if r_timestep is None:
            r_timestep = self._next_timestep(timestep)
        t = self._times("timestep", timestep, sample)
        r = self._times("r_timestep", r_timestep, sample)
        known = _on_host(timestep) and _on_host(r_timestep)
        if known and _ascends(_host(timestep), _host(r_timestep)):
            raise ValueError(
                f"r_timestep must not exceed timestep, got r={r_timestep}, t={timestep}"
            )
        acc = torch.promote_types(sample.dtype, torch.float32)
        width = ((t - r) / self._n).to(acc)
        previous = (sample.to(acc) - width * model_output.to(acc)).to(sample.dtype)
        self._advance(timestep)
        return FlowMapEulerDiscreteSchedulerOutput(previous) if return_dict else (previous,)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Add noise up to ``timestep``: ``(1 - sigma) x0 + sigma noise``, in sample's dtype.

        Args:
            sample: x0, ``[B, F, ...]``.
            timestep: a number, ``[]``, ``[B]`` or ``[B, F]``, in [0, N].
            noise: the shape of sample.
        """
        if noise.shape != sample.shape:
            raise ValueError(
                f"noise {tuple(noise.shape)} and sample {tuple(sample.shape)} must match"
            )
        acc = torch.promote_types(sample.dtype, torch.float32)
        sigma = (self._times("timestep", timestep, sample) / self._n).to(acc)
        return ((1 - sigma) * sample.to(acc) + sigma * noise.to(acc)).to(sample.dtype)

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor
    ) -> Tensor:
        """Call :meth:`scale_noise`, with the argument order of diffusers' training schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def get_train_weight(self, timesteps: Tensor) -> Tensor:
        """Return the fp32 training weight of each timestep in [0, N], of any shape.

        The weight is that of the nearest point of the shifted grid, normalized over the grid, never
        over the batch; see :func:`anyflow.schedulers.shift.train_weight_grid`.
        """
        device = timesteps.device
        if device not in self._weights:
            tau, weight = train_weight_grid(self.config.weight_type, self.config.shift)
            dtype = widest_float(device)
            self._weights[device] = (
                to_device(tau, device, dtype),
                to_device(weight, device, dtype),
            )
        tau, weight = self._weights[device]
        return nearest_weight(timesteps.to(tau.dtype) / self._n, tau, weight).to(torch.float32)

    @property
    def _n(self) -> int:
        return self.config.num_train_timesteps

    def _times(self, name: str, value: float | Tensor, like: Tensor) -> Tensor:
        if _on_host(value):
            host = _host(value)
            if not bool(((host >= 0) & (host <= self._n)).all()):  # NaN fails both
                raise ValueError(f"{name} must be in [0, {self._n}], got {value}")
        dtype = widest_float(like.device)
        if isinstance(value, Tensor):
            times = to_device(value, like.device, dtype)
        else:
            # filled there, not copied
            times = torch.full((), float(value), dtype=dtype, device=like.device)
        if times.ndim and times.shape != like.shape[: times.ndim] and times.numel() != 1:
            raise ValueError(
                f"{name} {tuple(times.shape)} must be a number, [B] or [B, F] of "
                f"{tuple(like.shape)}"
            )
        return times.reshape(times.shape + (1,) * (like.ndim - times.ndim))

    def _next_timestep(self, timestep: float | Tensor) -> Tensor:
        values = torch.as_tensor(timestep)
        following = [*self._schedule[1:], 0.0]
        result = []
        for value in values.flatten().tolist():
            index = self.index_for_timestep(value)
            if index is None:
                raise ValueError(
                    f"timestep {value} is not on the schedule, so the next one is unknown; pass "
                    "r_timestep explicitly"
                )
            result.append(following[index])
        return torch.tensor(result, dtype=torch.float64).reshape(values.shape)

    def _advance(self, timestep: float | Tensor) -> None:
        if self._step_index is None:
            index = self._begin_index
            if index is None and _on_host(timestep):
                index = self.index_for_timestep(_host(timestep).flatten()[0])
            self._step_index = 0 if index is None else index
        self._step_index += 1


def _on_host(value: float | Tensor) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _host(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _ascends(t: Tensor, r: Tensor) -> bool:
    """Check whether any r exceeds its t; either may be per sample, the other per frame."""
    ndim = max(t.ndim, r.ndim)
    t, r = (v.reshape(v.shape + (1,) * (ndim - v.ndim)) for v in (t, r))
    return bool((r > t).any())
