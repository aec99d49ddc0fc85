"""Loading a transformer from any format: built without memory, then filled tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from anyflow.checkpoints.architecture import FlowMap
from anyflow.checkpoints.checkpoint import Checkpoint, ReadOptions, open_checkpoint
from anyflow.checkpoints.errors import CheckpointFormatError, listed
from anyflow.checkpoints.readers import FLOATS
from anyflow.models import AnyFlowTransformer3DModel


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
) -> AnyFlowTransformer3DModel:
    """Load the transformer of a checkpoint: all of it, or an error. Under inference mode it is an ordinary one too.

    Memory: the model, one tensor (three in fp64 where an adapter is merged) and some tens of MB of the mapped file.

    Args:
        path: a pipeline's folder, a transformer's folder, or a file (``.safetensors``, its index, ``.pt``).
        dtype: of the parameters; None keeps the one that is stored. What the model keeps in fp32
            (``_keep_in_fp32_modules``) is at least fp32 in any case, as in diffusers.
        device: where the parameters go, one after the other.
        subfolder: of a folder, in place of ``transformer``.
        flow_map: makes a plain Wan model a flow map (``enable_flow_map``); for a flow map whose file does not say it
            (as a ``.pt``), how the second timestep enters.
        weights: ``"ema"`` or ``"raw"`` of a training file; None takes the average, or what there is.
        lora_alpha: of adapters that are to be merged, where no ``adapter_config.json`` says it.
        attention_head_dim: where there is no ``config.json`` and it is not Wan's 128.
        bidirectional: take a causal model without its two causal tensors, as a bidirectional one.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointFormatError: the checkpoint is damaged, incomplete, contradicts itself or an argument, or is not
            understood. The message lists what is wrong.
        ValueError: an argument is not possible.
    """
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype}")
    device = torch.device(device)
    options = ReadOptions(subfolder, weights, lora_alpha, attention_head_dim, flow_map)
    # Adapters are merged in fp64, which not every other device has.
    checkpoint = open_checkpoint(path, options, merge_on=str(device) if device.type == "cuda" else "cpu")
    if lora_alpha is not None and not checkpoint.reader.adapters:
        raise CheckpointFormatError(f"lora_alpha={lora_alpha} was given, but {path} has no adapters")
    model = _empty_model(checkpoint, bidirectional)
    wide = _names_in_fp32(model)
    dtype = _stored_dtype(checkpoint, wide) if dtype is None else dtype

    parameters = dict(model.named_parameters())
    for name, own in checkpoint.names.items():
        target = torch.promote_types(dtype, torch.float32) if name in wide else dtype
        _assign(
            model, name, torch.empty(parameters[name].shape, dtype=target, device=device), checkpoint.reader.read(own)
        )
    model.to(device)  # the gate, which no file holds
    if flow_map is not None and checkpoint.architecture.flow_map is None:
        model.enable_flow_map(flow_map.gate_value, flow_map.deltatime_type, flow_map.fusion)
    return model


def _empty_model(checkpoint: Checkpoint, bidirectional: bool) -> AnyFlowTransformer3DModel:
    path = checkpoint.path
    if checkpoint.is_causal and not bidirectional:
        raise CheckpointFormatError(
            f"{path} is a causal model, and this class is bidirectional; bidirectional=True loads it without"
            f"{listed(checkpoint.causal) if checkpoint.causal else ' its causal parts'}"
        )
    if bidirectional and not checkpoint.is_causal:
        raise CheckpointFormatError(f"bidirectional=True is for causal models, but {path} is not one")
    adapters = checkpoint.reader.adapters
    if adapters and checkpoint.reader.alpha is None:
        ranks = ", ".join(str(r) for r in sorted({a.rank for a in adapters.values()}))
        raise CheckpointFormatError(
            f"{path} has {len(adapters)} adapters of rank {ranks}, but not their alpha; give lora_alpha"
        )
    model = checkpoint.architecture.build_empty()
    if lines := checkpoint.differences(model):
        raise CheckpointFormatError(f"{path} does not hold the tensors of its model:{listed(lines)}")
    return model


def _names_in_fp32(model: AnyFlowTransformer3DModel) -> set[str]:
    kept = set(model._keep_in_fp32_modules)
    return {name for name, _ in model.named_parameters() if kept & set(name.split("."))}


def _stored_dtype(checkpoint: Checkpoint, wide: set[str]) -> torch.dtype:
    stored = {checkpoint.reader.infos[own].dtype for name, own in checkpoint.names.items() if name not in wide}
    if len(stored) != 1:
        raise CheckpointFormatError(f"{checkpoint.path} is stored in {' and '.join(sorted(stored))}; give dtype")
    return FLOATS[stored.pop()]


@torch.no_grad()
def _assign(model: nn.Module, name: str, target: Tensor, source: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(target.copy_(source)))
