"""How methods and samplers call a network ``u(x_t, t, r)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def velocity(
    model: Any, x: Tensor, timestep: Tensor, r_timestep: Tensor | None, prompt_embeds: Tensor
) -> Tensor:
    """``u(x, t, r, c)`` in fp32 at least: ``x[B, F, C, H, W]``, timesteps ``[B]`` or ``[B, F]`` in
    [0, N].
    """
    out = evaluate(
        model, x, timestep=timestep, r_timestep=r_timestep, encoder_hidden_states=prompt_embeds
    )
    return out.to(torch.promote_types(out.dtype, torch.float32))


def evaluate(model: Any, x: Tensor, **conditions: Any) -> Tensor:
    """Call a network; its output is a tuple or has ``.sample``, as those of diffusers'
    transformers.
    """
    out = model(hidden_states=x, **conditions, return_dict=False)
    return out[0] if isinstance(out, tuple) else out.sample


def has_flow_map(model: Any) -> bool:
    """Whether a network takes ``r_timestep``: everything but a transformer built with
    ``r_embedder=False``.
    """
    config = getattr(getattr(model, "module", model), "config", None)
    return True if config is None else bool(getattr(config, "r_embedder", True))


def has_hooks(model: Any) -> bool:
    """Whether accelerate or diffusers bring weights to the device around module calls: no other
    method can use them.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(
        hasattr(module, "_hf_hook")
        or getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        for module in modules
    )


def execution_device(module: nn.Module) -> torch.device:
    """Return the device that a module's inputs must be on: of its weights, or where hooks bring
    them.
    """
    from diffusers.hooks.group_offloading import _get_group_onload_device

    if has_hooks(module):
        try:
            return _get_group_onload_device(module)
        except ValueError:  # accelerate's hooks
            hooks = (getattr(submodule, "_hf_hook", None) for submodule in module.modules())
            devices = [
                device
                for hook in hooks
                if (device := getattr(hook, "execution_device", None)) is not None
            ]
            if devices:
                return torch.device(devices[0])
    return next(module.parameters()).device
