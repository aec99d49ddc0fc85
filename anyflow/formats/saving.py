"""Write a transformer as a folder for diffusers, and convert any format to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from anyflow.formats.architecture import ANYFLOW, ANYFLOW_FAR, WAN, CausalSettings, FlowMap
from anyflow.formats.errors import CheckpointFormatError
from anyflow.formats.files import CONFIG, find_files, read_json
from anyflow.formats.hub import local_checkpoint
from anyflow.formats.loading import load_transformer
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.locking import locks_folder
from anyflow.utils.writing import require_empty, whole_folder

# The older class differs in the name, and in the default of a setting that it always writes.
_SCHEDULERS = ("FlowMapEulerDiscreteScheduler", "FlowMapDiscreteScheduler")


@locks_folder("out", beside=True)
def save(
    model: AnyFlowTransformer3DModel,
    out: Path | str,
    *,
    scheduler: FlowMapEulerDiscreteScheduler | None = None,
    max_shard_size: int | str = "10GB",
) -> Path:
    """Write ``out/transformer`` and, if it is given, ``out/scheduler``, whole or not at all.

    A flow map is written for diffusers' ``AnyFlowTransformer3DModel``, a causal one for its
    ``AnyFlowFARTransformer3DModel`` and a plain model for its ``WanTransformer3DModel``; all load
    it bit for bit (``tests/formats/test_saving.py``), and so does :func:`load_transformer`.

    Args:
        model: without adapters.
        out: a new or empty folder.
        scheduler: the scheduler whose settings are written.
        max_shard_size: largest size of one file, in bytes or as ``"10GB"``.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` is not empty or in use, or diffusers has no such model.
        OSError: the system refuses to write, such as on a full disk; ``out`` is unchanged.
    """
    return _save(model, Path(out), scheduler, max_shard_size)


def _save(
    model: AnyFlowTransformer3DModel,
    out: Path,
    scheduler: FlowMapEulerDiscreteScheduler | None,
    max_shard_size: int | str,
) -> Path:
    _diffusers_config(model)  # before anything is written
    with whole_folder(out) as partial:
        write_transformer(model, partial / "transformer", max_shard_size=max_shard_size)
        if scheduler is not None:
            scheduler.save_pretrained(partial / "scheduler")
    return out


def write_transformer(
    model: AnyFlowTransformer3DModel, folder: Path, *, max_shard_size: int | str = "10GB"
) -> None:
    """Write a model with the ``config.json`` of diffusers' class for it, or raise a ValueError."""
    config = _diffusers_config(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


@locks_folder("out", beside=True)
def convert(
    path: Path | str,
    out: Path | str,
    *,
    to: Literal["diffusers"] = "diffusers",
    dtype: torch.dtype | None = None,
    subfolder: str | None = None,
    flow_map: FlowMap | None = None,
    weights: str | None = None,
    lora_alpha: float | None = None,
    attention_head_dim: int | None = None,
    bidirectional: bool = False,
    causal: CausalSettings | None = None,
    shift: float | None = None,
    max_shard_size: int | str = "10GB",
    strict_values: bool = False,
) -> Path:
    """Write a checkpoint of any format as :func:`save` does.

    Args:
        path: as for :func:`load_transformer`, like the arguments that are not listed here.
        out: a new or empty folder.
        to: the format to write.
        shift: shift of the scheduler that is written. None takes over the flow-map scheduler of the
            pipeline that the checkpoint is part of, or writes none without one.
        max_shard_size: largest size of one file, in bytes or as ``"10GB"``.

    Returns:
        ``out``.

    Raises:
        ValueError: as :func:`load_transformer` and :func:`save`.
        OSError: as :func:`save`.
    """
    if to != "diffusers":
        raise ValueError(f"to must be diffusers, got {to!r}")
    require_empty(Path(out))
    scheduler = (
        load_scheduler(path, subfolder)
        if shift is None
        else FlowMapEulerDiscreteScheduler(shift=shift)
    )
    model = load_transformer(
        path,
        dtype=dtype,
        subfolder=subfolder,
        flow_map=flow_map,
        weights=weights,
        lora_alpha=lora_alpha,
        attention_head_dim=attention_head_dim,
        bidirectional=bidirectional,
        causal=causal,
        strict_values=strict_values,
    )
    return _save(model, Path(out), scheduler, max_shard_size)


def load_scheduler(
    path: Path | str, subfolder: str | None = None
) -> FlowMapEulerDiscreteScheduler | None:
    """Load the flow-map scheduler of a checkpoint's pipeline; None where it has another or none.

    Raises:
        CheckpointFormatError: its file is damaged, or a setting is not possible.
    """
    file = find_files(local_checkpoint(path, subfolder), subfolder).scheduler
    if file is None:
        return None
    config = read_json(file)
    if config.get("_class_name") not in _SCHEDULERS:
        return None
    try:
        return FlowMapEulerDiscreteScheduler.from_config(config)
    except ValueError as error:
        raise CheckpointFormatError(f"{file}: {error}") from error


def _diffusers_config(model: AnyFlowTransformer3DModel) -> dict[str, Any]:
    if getattr(model, "peft_config", None):
        raise ValueError("this model has adapters; merge them first (fuse_lora, unload_lora)")
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    is_causal = isinstance(model, AnyFlowFARTransformer3DModel)
    fusion, is_flow_map = config.pop("r_embedder_fusion"), config.pop("r_embedder")
    if is_flow_map:
        if fusion != "gated":
            raise ValueError(
                f"diffusers has no model whose times are fused as {fusion!r}, only 'gated'"
            )
        return {"_class_name": ANYFLOW_FAR if is_causal else ANYFLOW, **config}
    if is_causal:
        raise ValueError(
            "diffusers has no causal model without a flow map; enable_flow_map makes it one"
        )
    del config["gate_value"], config["deltatime_type"]
    if config["image_dim"] is not None:
        raise ValueError(
            "diffusers' plain Wan model with an image branch has attention that this one does not "
            "have"
        )
    # The last is for our own class, whose default is True; diffusers says that it ignores it.
    return {"_class_name": WAN, **config, "qk_norm": "rms_norm_across_heads", "r_embedder": False}
