"""Load a transformer from any format: build it without memory, then fill tensor by tensor."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from anyflow.formats.architecture import CausalSettings, FlowMap
from anyflow.formats.checkpoint import Checkpoint, ReadOptions, open_checkpoint
from anyflow.formats.errors import CheckpointFormatError, listed
from anyflow.formats.problems import (
    FiniteWeights,
    names_in_fp32,
    others_left_out,
    problems_of,
    stored_dtypes,
)
from anyflow.formats.readers import FLOATS
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.utils.devices import known_device
from anyflow.utils.documents import shortened


@torch.inference_mode(False)  # what is made there can never be trained
def load_transformer(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    subfolder: str | None = None,
    flow_map: FlowMap | None = None,
    weights: str | None = None,
    lora_alpha: float | None = None,
    attention_head_dim: int | None = None,
    bidirectional: bool = False,
    causal: CausalSettings | None = None,
    strict_values: bool = False,
) -> AnyFlowTransformer3DModel:
    """Load the transformer of a checkpoint, all of it or not at all.

    The model can be trained, also if it is loaded in inference mode. Memory holds the model, one
    tensor (three in fp64 where an adapter is merged) and some tens of MB of the mapped file.

    Args:
        path: a pipeline's folder, a transformer's folder, or a file (``.safetensors``, its index,
            ``.pt``); or the name of a model on the Hugging Face Hub.
        dtype: dtype of the parameters; None keeps the one that is stored. What the model keeps in
            fp32 (``_keep_in_fp32_modules``) is at least fp32 in any case, as in diffusers.
        device: where the parameters go, one after the other.
        subfolder: subfolder of a folder, in place of ``transformer``.
        flow_map: makes a plain Wan model a flow map (``enable_flow_map``); for a flow map whose
            file does not say it (as a ``.pt``), how the second timestep enters.
        weights: ``"ema"`` or ``"raw"`` of a training file; None takes the average, or the only
            weights.
        lora_alpha: alpha of adapters that are to be merged, where no ``adapter_config.json`` says
            it.
        attention_head_dim: needed without a ``config.json``, unless it is Wan's 128.
        bidirectional: load a causal model without its two causal tensors, as a bidirectional one.
        causal: makes a bidirectional model a causal one, whose compressed patch embedding is
            interpolated from the full one (``initialize_compressed``); for a causal model whose
            file does not say its settings (as a ``.pt``), what they are in place of the published
            ones. Settings that a file says must be the same.
        strict_values: refuse weights with NaN or infinity, as they are stored or in ``dtype``.
            False warns of them.

    Returns:
        The model in evaluation mode; an :class:`~anyflow.models.AnyFlowFARTransformer3DModel`
        where the checkpoint is causal or is made so.

    Raises:
        CheckpointFormatError: the checkpoint is damaged, incomplete, contradicts itself or an
            argument, or is not understood. The message lists what is wrong, as ``inspect`` does.
        ValueError: an argument is not possible.
    """
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype}")
    device = known_device(device)
    options = ReadOptions(
        subfolder, weights, lora_alpha, attention_head_dim, flow_map, causal, bidirectional
    )
    # Adapters are merged in fp64, which not every other device has.
    checkpoint = open_checkpoint(
        path, options, merge_on=str(device) if device.type == "cuda" else "cpu"
    )
    model = _empty_model(checkpoint, options, dtype)
    if dtype is None:
        dtype = FLOATS[stored_dtypes(checkpoint, names_in_fp32(model))[0]]
    _report(checkpoint, _fill(model, checkpoint, dtype, device), strict_values)
    if isinstance(model, AnyFlowFARTransformer3DModel) and not checkpoint.is_causal:
        model.initialize_compressed()
    model.to(device)  # the gate, which no file holds
    if flow_map is not None and checkpoint.architecture.flow_map is None:
        model.enable_flow_map(flow_map.gate_value, flow_map.deltatime_type, flow_map.fusion)
    return model


def _empty_model(
    checkpoint: Checkpoint, options: ReadOptions, dtype: torch.dtype | None
) -> AnyFlowTransformer3DModel:
    """Build the model of a checkpoint that can be loaded, without memory for its parameters."""
    if options.lora_alpha is not None and not checkpoint.reader.adapters:
        raise CheckpointFormatError(
            f"lora_alpha={options.lora_alpha} was given, but {checkpoint.path} has no adapters"
        )
    model = checkpoint.architecture.build_empty()
    if lines := problems_of(checkpoint, model, dtype=dtype, bidirectional=options.bidirectional):
        raise CheckpointFormatError(
            f"{shortened(checkpoint.path)} cannot be loaded:{listed(lines)}"
        )
    return model


def _report(checkpoint: Checkpoint, not_finite: list[str], strict_values: bool) -> None:
    """Refuse or warn of values that are not finite, and say what of a file was left out."""
    path = shortened(checkpoint.path)
    if not_finite:
        count = "1 tensor has" if len(not_finite) == 1 else f"{len(not_finite)} tensors have"
        message = f"{path}: {count} NaN or infinity as loaded:{listed(not_finite)}"
        if strict_values:
            raise CheckpointFormatError(message)
        warnings.warn(f"{message}\nstrict_values=True refuses such weights", stacklevel=4)
    if checkpoint.others:
        warnings.warn(f"{path}: left out are {others_left_out(checkpoint)}", stacklevel=4)


def _fill(
    model: AnyFlowTransformer3DModel,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
) -> list[str]:
    """Read every parameter of a model, and return the names of those that are not finite."""
    parameters, values = dict(model.named_parameters()), FiniteWeights()
    wide = names_in_fp32(model)
    for name, own in checkpoint.names.items():
        kept = torch.promote_types(dtype, torch.float32) if name in wide else dtype
        target = torch.empty(parameters[name].shape, dtype=kept, device=device)
        _assign(model, name, target, checkpoint.reader.read(own))
        values.add(own, target)
    return values.not_finite()


@torch.no_grad()
def _assign(model: nn.Module, name: str, target: Tensor, source: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(target.copy_(source)))
