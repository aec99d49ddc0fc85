"""Export a run's student and scheduler as a diffusers folder, adapters merged in or separate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from anyflow.formats.names import ORIGINAL
from anyflow.formats.saving import write_transformer
from anyflow.pipelines.folder import Base, write_scheduler
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.training.checkpoint import Checkpointer, CheckpointError, complete_checkpoints
from anyflow.utils.locking import locks_folder
from anyflow.utils.writing import require_empty, whole_folder

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from anyflow.models import AnyFlowTransformer3DModel

Weights = Literal["ema", "raw"]
LoRA = Literal["merged", "separate"]
LoRAFormat = Literal["diffusers", "comfyui"]

_ADAPTER = "default"
_COMFYUI_FILE = "comfyui_lora.safetensors"
_PREFIXES = {"ema": "ema/", "raw": "student/"}


@locks_folder("out", beside=True)
def export(
    run: Path,
    out: Path,
    *,
    weights: Weights = "ema",
    lora: LoRA = "merged",
    format: LoRAFormat | None = None,
    step: int | None = None,
    base: str | Path | None = None,
    copy: bool = False,
) -> Path:
    """Write the student of a run's checkpoint as a diffusers folder, in one process.

    The folder has ``out/transformer`` and ``out/scheduler``.

    With ``base``, ``out`` is a whole pipeline, which :meth:`AnyFlowPipeline.from_pretrained
    <anyflow.pipelines.AnyFlowPipeline.from_pretrained>` and diffusers load.

    Args:
        run: folder of the run, with ``recipe.yaml`` and ``checkpoints``.
        out: as for :func:`write_model`.
        weights: the average, or the parameters themselves.
        lora, format: as for :func:`write_model`.
        step: step of the checkpoint; None takes the newest.
        base: a diffusers folder, or the name of a model on the Hugging Face Hub, that gives
            ``vae``, ``text_encoder`` and ``tokenizer``; None writes neither.
        copy: copy these; else they are links to the base's folders, which must stay where they are.

    Returns:
        ``out``.

    Raises:
        ValueError: an option or the recipe is wrong, ``out`` is in use, there is no such
            checkpoint, or it is damaged; the base lacks a part, or its parts do not fit the
            student; or as :func:`write_model`.
        OSError: as :func:`write_model`.
    """
    from anyflow.training.networks import build_student
    from anyflow.training.recipe import load_recipe

    run, out = Path(run), Path(out)
    if weights not in _PREFIXES:
        raise ValueError(f"weights must be {' or '.join(_PREFIXES)}, got {weights!r}")
    _check_lora(lora, format)
    require_empty(out)  # before anything large is read
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is not the folder of a run: it has no recipe.yaml")
    checkpoint = _choose_checkpoint(run / "checkpoints", step)
    recipe = load_recipe(run / "recipe.yaml")
    if copy and base is None:
        raise ValueError("copy is of the parts that base gives: give base, too")
    parts = None if base is None else Base.open(base)
    student = build_student(recipe)
    if parts is not None:
        parts.require_fit(student.config)

    prefix = _PREFIXES[weights]
    tensors = {f"{prefix}{name}": torch.empty_like(p) for name, p in _trained(student).items()}
    Checkpointer(checkpoint.parent, keep=1).load(checkpoint, tensors, prefix=prefix)
    scheduler = FlowMapEulerDiscreteScheduler.from_config(recipe.scheduler)
    trained = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return write_model(
        student, trained, scheduler, out, lora=lora, format=format, base=parts, copy=copy
    )


def write_model(
    student: AnyFlowTransformer3DModel,
    tensors: Mapping[str, Tensor],
    scheduler: FlowMapEulerDiscreteScheduler,
    out: Path,
    lora: LoRA = "merged",
    format: LoRAFormat | None = None,
    base: Base | None = None,
    copy: bool = False,
) -> Path:
    """Write a model as a diffusers folder, completely or not at all.

    ``out/transformer`` loads as our transformer or diffusers' own (the teacher stage's as its Wan
    model; not with ``fusion="additive"``, which diffusers does not know), and ``out/scheduler``
    beside it. With ``lora="separate"``, ``out/lora`` has the adapters, and ``out/transformer`` the
    base weights with the modules trained in full: the adapters alone are not the model.

    Args:
        student: whole, on the CPU, as ``build_student`` makes it; **used up**: it is filled, and
            loses its adapters.
        tensors: full tensors for the parameters that are trained, by their names in the student.
        scheduler: the scheduler whose settings are written.
        out: a new or empty folder.
        lora: what becomes of adapters: ``"merged"`` into the weights, or ``"separate"``.
        format: format of separate adapters. ``"diffusers"``, which None means, is for a pipeline's
            ``load_lora_weights`` or ``load_lora_adapter(folder, use_safetensors=True)``;
            ``"comfyui"`` is one file in the original Wan's names, with an alpha for each layer.
            :func:`anyflow.pipelines.lora.merge_lora` reads both.
        base, copy: what makes ``out`` a whole pipeline, and whether its parts are copied; None
            leaves them out.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` is not empty, lora or format is unknown, lora is ``"separate"`` for a
            student without adapters, a layer with an adapter has no name in the format, or a name
            or shape of the tensors is not that of a trained parameter.
        OSError: the system refuses to write, such as on a full disk; ``out`` is as before.
    """
    out = Path(out)
    _check_lora(lora, format)
    adapters = _ADAPTER in getattr(student, "peft_config", {})
    if lora == "separate" and not adapters:
        raise ValueError(
            "lora='separate' needs a student with adapters; this one was trained in full"
        )
    gated = student.config.r_embedder_fusion == "gated"
    if base is not None and not gated:
        raise ValueError(
            "diffusers has no model whose times are fused as "
            f"{student.config.r_embedder_fusion!r}: leave out base"
        )
    _fill(student, tensors)

    with whole_folder(out) as partial:
        if adapters:
            if lora == "separate":
                save_adapters = _save_for_comfyui if format == "comfyui" else _save_for_diffusers
                save_adapters(student, partial / "lora")
            else:
                student.fuse_lora(adapter_names=[_ADAPTER])
            student.unload_lora()
        if gated:
            write_transformer(student, partial / "transformer")
        else:  # diffusers has no such model
            student.save_pretrained(partial / "transformer")
        plain = base is not None and not student.config.r_embedder
        write_scheduler(scheduler, partial, plain=plain)
        if base is not None:
            base.add_to(partial, plain=plain, copy=copy)
    return out


def _check_lora(lora: str, format: str | None) -> None:
    if lora not in ("merged", "separate"):
        raise ValueError(f"lora must be merged or separate, got {lora!r}")
    if format not in (None, "diffusers", "comfyui"):
        raise ValueError(f"format must be diffusers or comfyui, got {format!r}")
    if format is not None and lora != "separate":
        raise ValueError(
            f"format={format!r} is of adapters in a file of their own: it needs lora='separate'"
        )


def _choose_checkpoint(folder: Path, step: int | None) -> Path:
    complete = complete_checkpoints(folder)
    if not complete:
        raise CheckpointError(f"{folder} has no complete checkpoint")
    if step is None:
        return complete[max(complete)]
    if step not in complete:
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, complete))}"
        )
    return complete[step]


def _trained(student: AnyFlowTransformer3DModel) -> dict[str, Tensor]:
    return {name: p for name, p in student.named_parameters() if p.requires_grad}


@torch.no_grad()
def _fill(student: AnyFlowTransformer3DModel, tensors: Mapping[str, Tensor]) -> None:
    trained = _trained(student)
    lines = [f"missing: {name}" for name in trained if name not in tensors]
    lines += [f"not a trained parameter: {name}" for name in tensors if name not in trained]
    lines += [
        f"{name}: got {tuple(tensors[name].shape)}, the parameter is {tuple(p.shape)}"
        for name, p in trained.items()
        if name in tensors and tensors[name].shape != p.shape
    ]
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(f"the tensors are not the student's trained parameters:\n  {listed}")
    for name, p in trained.items():
        p.copy_(tensors[name])


def _save_for_diffusers(student: AnyFlowTransformer3DModel, folder: Path) -> None:
    """Write names that pipelines expect (``transformer.blocks…``), with rank and alpha.

    Rank and alpha are in the file's metadata.
    """
    from diffusers.loaders import WanLoraLoaderMixin
    from peft import get_peft_model_state_dict

    WanLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(student, adapter_name=_ADAPTER),
        transformer_lora_adapter_metadata=student.peft_config[_ADAPTER].to_dict(),
    )


def _save_for_comfyui(student: AnyFlowTransformer3DModel, folder: Path) -> None:
    """Write the adapters under the original Wan's names, with an alpha for each layer.

    Names are ``diffusion_model.<layer>.lora_A.weight``, ``.lora_B.weight`` and ``.alpha``.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {}
    for name, tensor in get_peft_model_state_dict(student, adapter_name=_ADAPTER).items():
        ours, _, factor = name.rpartition(".lora_")
        layer = ORIGINAL.theirs(ours)
        if layer is None or factor not in ("A.weight", "B.weight"):
            raise ValueError(
                f"format='comfyui': {name} has no name in the original Wan; use lora='merged'"
            )
        state[f"diffusion_model.{layer}.lora_{factor}"] = tensor.contiguous()
        if factor == "A.weight":
            alpha = (
                cast("LoraLayer", student.get_submodule(ours)).scaling[_ADAPTER] * tensor.shape[0]
            )
            state[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(alpha))
    folder.mkdir()
    save_file(state, folder / _COMFYUI_FILE, metadata={"format": "pt"})
