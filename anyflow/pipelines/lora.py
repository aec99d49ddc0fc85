"""Merge LoRA files of all origins into a transformer's weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from anyflow.formats.adapter_updates import LowRank, Plan, Replacement, Update
from anyflow.formats.errors import listed
from anyflow.formats.lora_file import open_lora
from anyflow.formats.readers import FLOATS
from anyflow.utils.devices import widest_float

if TYPE_CHECKING:
    from anyflow.models import AnyFlowTransformer3DModel


def merge_lora(
    transformer: AnyFlowTransformer3DModel, path: str | Path, scale: float = 1.0
) -> None:
    """Add ``scale alpha / rank B A`` to the weights of every layer that a LoRA has.

    Sampling then costs nothing more. Names are read as PEFT, diffusers, kohya and musubi, ComfyUI,
    diffusion-pipe and DiffSynth write them (:mod:`anyflow.formats.adapter_keys`), with alphas,
    ranks by layer, rsLoRA, DoRA, biases of B, and differences of weights, biases, norms and
    modulations. Everything in the file and in its configuration is applied, or the file is refused.
    Results are computed in fp64, where the device has it, and rounded once to the dtype of the
    weights.

    Args:
        transformer: changed in place, and only if everything is well; several may be merged one
            after the other.
        path: a file or a folder, as for :func:`anyflow.formats.lora_file.open_lora`.
        scale: scale of what is added; for a LoRA with magnitudes (DoRA) or with whole modules it
            must be 1.

    Raises:
        ValueError: no such file, or it is damaged; a tensor or a setting has no place in this
            transformer, or is not supported; a value is not finite, before or after merging; the
            weights are quantized or offloaded in a way that does not let them be changed. Files are
            refused with their own keys, and nothing is changed.
    """
    strength = _checked_scale(scale)
    lora = open_lora(path)
    parameters = _parameters(transformer)
    plan = lora.plan({name: tuple(p.shape) for name, p in parameters.items()})
    if strength != 1:
        _require_linear(plan, lora.path, strength)
    _require_changeable(transformer, {name: parameters[name] for name in plan.updates})
    tensors = lora.read_all()
    with torch.no_grad():
        # a result that is not finite is found before the first is written
        for name, update in plan.updates.items():
            if not torch.isfinite(_merged(parameters[name], update, tensors, strength)).all():
                raise ValueError(
                    f"LoRA {lora.path}: merged, {name} is not finite in {parameters[name].dtype}: "
                    f"{', '.join(update.keys)}; nothing was changed"
                )
        for name, update in plan.updates.items():
            parameter = parameters[name]
            with torch.inference_mode() if parameter.is_inference() else torch.no_grad():
                parameter.copy_(_merged(parameter, update, tensors, strength))


def _checked_scale(scale: float) -> float:
    try:
        strength = float(scale)
    except (TypeError, ValueError, OverflowError):
        strength = math.nan
    if isinstance(scale, (str, bool)) or not math.isfinite(strength):
        raise ValueError(f"LoRA: scale must be a finite number, got {scale!r}")
    return strength


def _parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, without the prefixes of compilation and of PEFT's layers."""
    return {
        name.replace("_orig_mod.", "").replace(".base_layer.", "."): p
        for name, p in transformer.named_parameters()
        if ".lora_" not in name
    }


def _require_linear(plan: Plan, path: Path, strength: float) -> None:
    """Refuse a scale for changes that are no sums: trainers disagree on what a part of DoRA is."""
    keys = [
        key
        for update in plan.updates.values()
        if isinstance(update, Replacement)
        or (isinstance(update, LowRank) and update.magnitude is not None)
        for key in update.keys[-1:]
    ]
    if keys:
        raise ValueError(
            f"LoRA {path}: scale must be 1, got {strength:g}, as it replaces or has "
            f"magnitudes:{listed(keys)}"
        )


def _require_changeable(transformer: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for module in transformer.modules():  # the copy that is changed may not be the one that stays
        if "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", ()):
            raise ValueError("LoRA: the weights are offloaded by groups; merge before offloading")
    for name, p in parameters.items():
        if p.is_meta:
            raise ValueError(
                f"LoRA: the weights are offloaded, and {name} is not in memory; merge before "
                "offloading"
            )
        if type(p.data) is not Tensor or p.dtype not in FLOATS.values():
            kind = f"{type(p.data).__name__} of {p.dtype}"
            raise ValueError(
                f"LoRA: {name} is {kind}, and cannot be changed: merge into weights of "
                f"{', '.join(FLOATS)}"
            )


def _merged(
    parameter: nn.Parameter, update: Update, tensors: dict[str, Tensor], strength: float
) -> Tensor:
    """Compute a parameter's new value, rounded once to its dtype."""
    wide = widest_float(parameter.device)

    def read(key: str) -> Tensor:
        return tensors[key].to(parameter.device).to(wide)

    return update.apply(parameter.to(wide), read, strength).to(parameter.dtype)
