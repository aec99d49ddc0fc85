"""Take the time derivative of a flow map by a central difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflow.methods.pretrain_inputs import PretrainData, PretrainTimes, TargetTerms, call_in_vain
from anyflow.ops import flow_map_batch


def central_difference(
    student: Any, data: PretrainData, times: PretrainTimes
) -> tuple[Tensor, TargetTerms]:
    """Evaluate u at both ends of (8), and u(x_t, t, r | ∅) of (9), in one network call.

    Args:
        student: u(x_t, t, r).
        data: data of the batch, with a negative prompt where the loss is guided.
        times: times of the batch.

    Returns:
        x_t of (1), ``[B, F, C, H, W]``, and the terms of the target.
    """
    picked, n, guided = times.picked, len(times.picked), data.negative is not None
    widths = (times.plus, times.minus)
    x_t, x = flow_map_batch(data.x0, data.noise, times.t, widths, picked, with_x_t=guided)
    if n == 0 and not guided:
        call_in_vain(student, data, times, x_t)
        return x_t, TargetTerms()
    # the batch of one call: [x₊ ; x₋ ; x_t], whose last part is there with guidance only
    r_timestep, text = times.r_timestep[picked], data.text[picked]
    timesteps = [times.plus_timestep[picked], times.minus_timestep[picked]]
    r_timesteps, texts, samples = [r_timestep, r_timestep], [text, text], [picked, picked]
    if data.negative is not None:
        timesteps.append(times.timestep)
        r_timesteps.append(times.r_timestep)
        texts.append(data.negative)
        samples.append(torch.arange(len(x_t), device=picked.device))
    with torch.no_grad():
        u = data.velocity(
            student,
            x,
            torch.cat(timesteps),
            torch.cat(r_timesteps),
            torch.cat(texts),
            torch.cat(samples),
            # x₋ attends to the clean frames of x₊
            [*range(n), *range(n), *range(2 * n, len(x))],
        )
    uncond = u[2 * n :] if guided else None
    if n == 0:
        return x_t, TargetTerms(uncond)
    return x_t, TargetTerms(uncond, u[:n], u[n : 2 * n], times.width)
