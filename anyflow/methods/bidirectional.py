"""Compute flow matching of a causal student's weights as a bidirectional model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflow.methods.pretrain_inputs import PretrainData
from anyflow.models.network import has_flow_map, velocity
from anyflow.ops import flow_map_loss
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.devices import widest_float


def bidirectional_losses(
    student: Any,
    data: PretrainData,
    t: Tensor,
    scheduler: FlowMapEulerDiscreteScheduler,
    guidance: float,
) -> Tensor:
    """Return the unweighted losses (10) at r = t with guidance (9), ``[B]``.

    The network is called once without gradient where the loss is guided, and once with gradient.

    Args:
        student: the causal model.
        data: all frames; a negative prompt where the loss is guided.
        t: ``[B]`` in [0, 1], before the shift.
        scheduler: gives the shift and N.
        guidance: g.

    Raises:
        ValueError: t has another shape, or on a CPU a value outside [0, 1].
    """
    if t.shape != data.x0.shape[:1]:
        raise ValueError(f"t must be [B={len(data.x0)}], got {tuple(t.shape)}")
    if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t must be in [0, 1] (before the shift), got {t.tolist()}")
    n, wide = scheduler.config.num_train_timesteps, widest_float(t.device)
    timestep = (scheduler.apply_shift(t.to(wide)) * n).float()
    t = timestep.to(wide) / n
    x_t = torch.lerp(data.x0, data.noise, t.to(data.x0.dtype)[:, None, None, None, None])
    r_timestep = timestep if has_flow_map(student) else None

    def u(text: Tensor) -> Tensor:
        return velocity(student, x_t, timestep, r_timestep, text, is_causal=False)

    uncond = None
    if data.negative is not None:
        with torch.no_grad():
            uncond = u(data.negative)
    return flow_map_loss(
        pred=u(data.text),
        uncond=uncond,
        u_plus=None,
        u_minus=None,
        latents=data.x0,
        noise=data.noise,
        t=t,
        r=t,
        weight=torch.ones_like(timestep),
        guidance=guidance,
        width=1.0,
    )
