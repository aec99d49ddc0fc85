"""Call a network ``u(x_t, t, r)`` as methods and samplers do, and ask what it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def velocity(
    model: Any,
    x: Tensor,
    timestep: Tensor,
    r_timestep: Tensor | None,
    prompt_embeds: Tensor,
    **conditions: Any,
) -> Tensor:
    """Return ``u(x, t, r, c)`` in fp32 at least.

    Args:
        model: the network.
        x: ``[B, F, C, H, W]``.
        timestep: t in [0, N], ``[B]`` or ``[B, F]``.
        r_timestep: r, likewise; None for the plain velocity.
        prompt_embeds: ``[B, S, text_dim]``.
        conditions: further arguments of the network, by name.
    """
    out = evaluate(
        model,
        x,
        timestep=timestep,
        r_timestep=r_timestep,
        encoder_hidden_states=prompt_embeds,
        **conditions,
    )
    return out.to(torch.promote_types(out.dtype, torch.float32))


def evaluate(model: Any, x: Tensor, **conditions: Any) -> Tensor:
    """Call a network whose output is a tuple or has ``.sample``, as diffusers' transformers."""
    out = model(hidden_states=x, **conditions, return_dict=False)
    return out[0] if isinstance(out, tuple) else out.sample


def has_flow_map(model: Any) -> bool:
    """Check that a network takes ``r_timestep``: all but one with ``r_embedder=False`` do."""
    config = getattr(unwrapped(model), "config", None)
    return True if config is None else bool(getattr(config, "r_embedder", True))


def is_causal(model: Any) -> bool:
    """Tell whether a network is the causal model, or wraps it."""
    return hasattr(unwrapped(model), "new_cache")


def require_bidirectional(**networks: Any) -> None:
    """Raise a ValueError where a network, by its role, is the causal model.

    Called without its chunks it would take noisy frames for the context of one another.
    """
    for role, network in networks.items():
        if is_causal(network):
            raise ValueError(
                f"the {role} must be a bidirectional model, which sees whole videos; this one is "
                f"the causal {type(unwrapped(network)).__name__}"
            )


def unwrapped(model: Any) -> Any:
    """Return the network inside of what ``DistributedDataParallel`` returns, or the network."""
    return getattr(model, "module", model)


def has_hooks(model: Any) -> bool:
    """Check whether accelerate or diffusers bring weights to the device around module calls only.

    No method beside the call can use such weights.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(
        hasattr(module, "_hf_hook")
        or getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        for module in modules
    )


def execution_device(module: nn.Module) -> torch.device:
    """Return the device of a module's inputs: that of its weights, or where hooks bring them."""
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
