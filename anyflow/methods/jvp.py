"""Take the time derivative of a flow map exactly, by forward-mode differentiation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow.methods.pretrain_inputs import (
    PretrainData,
    PretrainTimes,
    TargetTerms,
    call_in_vain,
    noised,
)
from anyflow.ops import use_backend


def jvp(
    student: Any, data: PretrainData, times: PretrainTimes, num_train_timesteps: int
) -> tuple[Tensor, TargetTerms]:
    """Evaluate dF/dt of (6) along (noise - x0, 1), as a difference of width 1 from zero.

    Takes one network call for the derivative, on attention that can be differentiated forwards, and
    one more with guidance.

    Args:
        student: u(x_t, t, r).
        data: data of the batch, with a negative prompt where the loss is guided.
        times: times of the batch.
        num_train_timesteps: N, the timesteps that t = 1 stands for.

    Returns:
        x_t of (1), ``[B, F, C, H, W]``, and the terms of the target.
    """
    x_t, picked, uncond = noised(data, times), times.picked, None
    if data.negative is not None:
        with torch.no_grad():
            uncond = data.velocity(student, x_t, times.timestep, times.r_timestep, data.negative)
    if len(picked) == 0:
        call_in_vain(student, data, times, x_t)
        return x_t, TargetTerms(uncond)
    speed = torch.full_like(times.timestep[picked], float(num_train_timesteps))
    direction = (data.noise - data.x0)[picked]
    if times.first_frames is not None:
        moving = ~times.first_frames
        speed, direction = speed * moving, direction * moving.reshape(-1, 1, 1, 1)

    def u(x: Tensor, timestep: Tensor) -> Tensor:
        r_timestep, text = times.r_timestep[picked], data.text[picked]
        return data.velocity(student, x, timestep, r_timestep, text, picked)

    from anyflow.models.attention import use_attention_backend  # loads diffusers

    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        use_attention_backend("math"),
        use_backend("eager"),
    ):
        at = (x_t[picked], times.timestep[picked])
        slope = torch.func.jvp(u, at, (direction, speed))[1]
    return x_t, TargetTerms(uncond, slope, torch.zeros_like(slope))
