"""Put anyflow's transformer in the place of diffusers' in a pipeline, on the same weights.

In this module ``theirs`` is diffusers' transformer and ``ours`` is anyflow's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.diffusers_causal import DiffusersFARTransformer3DModel
from anyflow.models.wan import WanTransformer3DModel
from anyflow.pipelines.block_parts import (
    checked_parts,
    replace_parts,
    replaced_parts,
    restore_parts,
)

T = TypeVar("T")

_SUPPORTED = (
    "supported are diffusers' AnyFlowTransformer3DModel, AnyFlowFARTransformer3DModel and "
    "WanTransformer3DModel, and pipelines with one"
)
# Where PEFT and diffusers note which adapters are loaded.
_ADAPTER_STATE = ("peft_config", "_hf_peft_config_loaded")


@dataclass(frozen=True)
class _Original:
    """Hold what our transformer stands for; a dataclass, so that it is no child module of ours.

    Args:
        transformer: diffusers'.
        layers: names of the linear layers, which both have as one module.
        owners: the other modules with parameters, bare of adapters; ours are of other classes.
    """

    transformer: ModelMixin
    layers: tuple[str, ...]
    owners: Mapping[str, nn.Module]


def accelerate(pipe_or_transformer: T, only: str | Collection[str] | None = None) -> T:
    """Run a diffusers pipeline or transformer on anyflow's transformer, or on its operators.

    The pipelines are those around diffusers' ``AnyFlowTransformer3DModel``,
    ``AnyFlowFARTransformer3DModel`` (causal) or ``WanTransformer3DModel``, Wan 2.2's
    ``transformer_2`` included. anyflow's transformer gets the very parameters and linear layers of
    diffusers': nothing is copied, dtypes and devices stay, adapters (LoRA) stay loaded, and CPU
    offloading that is on stays on. A second call changes nothing; :func:`restore` undoes the first.

    Results are the same within rounding (``tests/pipelines/test_acceleration.py``), but for the
    causal model where diffusers' are not those of the model: its cached steps attend to zeros
    beside the keys unless the tokens of every chunk are a multiple of 128. The accelerated model
    attends to keys only, refuses heights and widths that its compressed patches would cut off, and
    encodes a compressed chunk once (``tests/pipelines/test_acceleration_causal.py``).

    With ``only``, diffusers' transformer stays, with its names, attention backends, fused
    projections and image attention, and just these parts of its blocks are replaced
    (``tests/pipelines/test_block_parts.py``):

    - ``"norms"``: LayerNorm, modulation, gates and residuals, three operators a block;
    - ``"rope"``: RMS norm and rotation of the queries and keys of self-attention;
    - ``"gelu"``: the activation of the feed-forward;
    - ``"linear"``: the linear layers, as :class:`anyflow.ops.Linear`.

    The causal model has ``"gelu"`` and ``"linear"`` only. Without ``only`` it is replaced in its
    pipeline, not alone: its ``kv_cache`` no longer holds the tensors of diffusers.

    Args:
        pipe_or_transformer: a pipeline is changed in place; a transformer is left as it is, except
            with ``only``.
        only: name of a part, or several. A further call replaces exactly the parts that it names.

    Returns:
        The pipeline itself, or anyflow's transformer (with ``only``, the transformer itself). Both
        load in diffusers once they are saved.

    Raises:
        TypeError: neither such a pipeline nor such a transformer.
        ValueError: a part is unknown, or not one of this transformer; or the transformer cannot be
            replaced without loss: it has hooks that would be lost, other attention processors, a
            device map, ``torch.compile``, or, without ``only``, image attention, fused projections
            or quantized weights.
    """
    parts = None if only is None else checked_parts(only)
    if not isinstance(pipe_or_transformer, DiffusionPipeline):
        if parts is None:
            _refuse_bare_causal(pipe_or_transformer)
        ours: Any = replacement_of(pipe_or_transformer, parts)
        return ours
    pipe = pipe_or_transformer
    transformers = _transformers(pipe)
    if not transformers:
        raise TypeError(f"accelerate: {type(pipe).__name__} has no transformer; {_SUPPORTED}")
    theirs = {n: t for n, t in transformers.items() if not (_is_ours(t) and parts is None)}
    for transformer in theirs.values():
        _our_class(transformer)
    if theirs:
        with _without_offloading(pipe):
            replaced = {
                name: _accelerated(transformer, parts) for name, transformer in theirs.items()
            }
            for name, transformer in replaced.items():
                if transformer is not theirs[name]:
                    setattr(pipe, name, transformer)
    return pipe


def replacement_of(transformer: Any, parts: tuple[str, ...] | None = None) -> Any:
    """Return anyflow's transformer on the weights of diffusers', or the latter with parts replaced.

    A transformer of anyflow is returned as it is. Errors are those of :func:`accelerate`.
    """
    if _is_ours(transformer) and parts is None:
        return transformer
    return _accelerated(transformer, parts)


def _refuse_bare_causal(transformer: object) -> None:
    """Raise a ValueError for diffusers' causal transformer, whose caller may read its caches."""
    if type(transformer) is diffusers.AnyFlowFARTransformer3DModel:
        raise ValueError(
            "accelerate: a causal transformer alone keeps its place, since what calls it may read "
            "the tensors of kv_cache, which anyflow's does not fill; accelerate its "
            "AnyFlowFARPipeline, or load it by anyflow.formats.load_transformer"
        )


def restore(pipe_or_transformer: T) -> T:
    """Undo :func:`accelerate`, with the weights and adapters as they are by then.

    Returns:
        The pipeline itself, or diffusers' transformer.

    Raises:
        ValueError: nothing here was accelerated, or anyflow's transformer has hooks that would be
            lost.
    """
    if not isinstance(pipe_or_transformer, DiffusionPipeline):
        theirs: Any = _restored(pipe_or_transformer)
        return theirs
    pipe = pipe_or_transformer
    ours = {
        name: transformer
        for name, transformer in _transformers(pipe).items()
        if hasattr(transformer, "_accelerated_from") or replaced_parts(_uncompiled(transformer))
    }
    if not ours:
        raise ValueError(f"restore: this {type(pipe).__name__} was not accelerated")
    with _without_offloading(pipe):
        restored = {name: _restored(transformer) for name, transformer in ours.items()}
        for name, transformer in restored.items():
            if transformer is not ours[name]:
                setattr(pipe, name, transformer)
    return pipe


def _accelerated(theirs: Any, parts: tuple[str, ...] | None) -> ModelMixin:
    """Return our transformer on the weights of theirs, or theirs with some parts replaced."""
    if parts is None:
        ours = _our_class(theirs)
        if replaced_parts(theirs):
            restore_parts(theirs)
        return _transplanted(theirs, ours)
    _our_class(theirs)
    replace_parts(theirs, parts, _problem_of_part)
    return theirs


@torch.inference_mode(False)  # the gate, made there, could never be trained with
def _transplanted(
    theirs: ModelMixin, cls: type[AnyFlowTransformer3DModel]
) -> AnyFlowTransformer3DModel:
    settings = inspect.signature(type(theirs).__init__).parameters
    with torch.device("meta"):
        ours = cls(**{name: value for name, value in theirs.config.items() if name in settings})
    layers = tuple(name for name, module in ours.named_modules() if type(module) is nn.Linear)
    owners = {n: m for n, m in ours.named_modules() if m._parameters and n not in layers}
    _check(theirs, layers, owners)
    original = _Original(
        theirs, layers, {name: _bare(theirs.get_submodule(name)) for name in owners}
    )

    _hand_over(theirs, ours, layers, owners)
    embedder = ours.condition_embedder
    if embedder.delta_embedder is not None:
        embedder.delta_emb_gate = embedder.delta_emb_gate.to(
            embedder.delta_embedder.linear_1.weight.device
        )
    if theirs.is_gradient_checkpointing:
        ours.enable_gradient_checkpointing(theirs._gradient_checkpointing_func)
    ours.train(theirs.training)
    ours._accelerated_from = original
    # diffusers writes an instance's module into model_index.json: saved pipelines load without
    # anyflow.
    ours.__dict__["__module__"] = type(theirs).__module__
    return ours


def _restored(ours: Any) -> ModelMixin:
    ours = _uncompiled(ours)
    if replaced_parts(ours):
        restore_parts(ours)
        return ours
    original: _Original | None = getattr(ours, "_accelerated_from", None)
    if original is None:
        raise ValueError(f"restore: this {type(ours).__name__} was not made by accelerate")
    _check_hooks("restore", ours, original.layers)
    _hand_over(ours, original.transformer, original.layers, original.owners)
    return original.transformer


def _hand_over(
    source: nn.Module, target: nn.Module, layers: Iterable[str], owners: Mapping[str, nn.Module]
) -> None:
    """Give ``target`` the linear layers of ``source``, and ``owners`` its other parameters.

    Adapters on both go with them.
    """
    for name in layers:
        target.set_submodule(name, source.get_submodule(name))
    for name, owner in owners.items():
        module = source.get_submodule(name)
        owner._parameters.update(_bare(module)._parameters)
        if module is not _bare(module):
            module.base_layer = owner
            target.set_submodule(name, module)
        elif target.get_submodule(name) is not owner:  # its adapter has been unloaded
            target.set_submodule(name, owner)
    for name in _ADAPTER_STATE:
        target.__dict__.pop(name, None)
        if name in source.__dict__:
            target.__dict__[name] = source.__dict__[name]


def _bare(module: nn.Module) -> nn.Module:
    """Return the module without the adapter around it, which PEFT calls its base layer."""
    return getattr(module, "base_layer", module)


def _is_ours(transformer: object) -> bool:
    """Tell whether a transformer is ours, compiled by ``torch.compile`` or not."""
    return isinstance(_uncompiled(transformer), AnyFlowTransformer3DModel)


def _uncompiled(module: Any) -> Any:
    """Return the module inside of what ``torch.compile`` returns, or the module itself."""
    return getattr(module, "_orig_mod", module)


def _our_class(theirs: object) -> type[AnyFlowTransformer3DModel]:
    if _uncompiled(theirs) is not theirs:
        raise ValueError(
            "accelerate: the transformer is compiled by torch.compile; accelerate first, then "
            "compile"
        )
    if isinstance(theirs, AnyFlowTransformer3DModel):
        raise ValueError(
            "accelerate: only= chooses parts of diffusers' transformer, and this one is anyflow's "
            "already"
        )
    if type(theirs) is diffusers.AnyFlowTransformer3DModel:
        return AnyFlowTransformer3DModel
    if type(theirs) is diffusers.AnyFlowFARTransformer3DModel:
        return DiffusersFARTransformer3DModel
    if type(theirs) is diffusers.WanTransformer3DModel:
        return WanTransformer3DModel
    raise TypeError(f"accelerate: {type(theirs).__name__} cannot be replaced; {_SUPPORTED}")


def _check(theirs: ModelMixin, layers: Iterable[str], owners: Mapping[str, nn.Module]) -> None:
    """Raise a ValueError for what of theirs would be lost in ours."""
    _check_hooks("accelerate", theirs, layers)
    reached = {id(p) for name in layers for p in theirs.get_submodule(name).parameters()}
    for name, owner in owners.items():
        module = theirs.get_submodule(name)
        bare = _bare(module)
        for key in owner._parameters:
            parameter = bare._parameters[key]
            if type(parameter) is not nn.Parameter:
                raise ValueError(
                    f"accelerate: {name}.{key} is a {type(parameter).__name__} (quantized or "
                    "sharded)"
                )
            reached.add(id(parameter))
        if module is not bare:
            reached.update(
                id(p) for p in module.parameters() if not any(p is q for q in bare.parameters())
            )
    unexpected = [name for name, p in theirs.named_parameters() if id(p) not in reached]
    if unexpected:
        raise ValueError(
            f"accelerate: {type(theirs).__name__} has parameters of no use here: "
            f"{', '.join(unexpected)}"
        )


def _check_hooks(action: str, network: nn.Module, layers: Iterable[str]) -> None:
    """Raise a ValueError for what of a network's modules, but for ``layers``, would be lost."""
    shared = {id(m) for name in layers for m in network.get_submodule(name).modules()}
    for name, module in network.named_modules():
        problem = _hook_of_accelerate(module)
        if problem is None and id(module) not in shared:
            problem = _problem(module)
        if problem is not None:
            raise ValueError(f"{action}: {name if name else 'the transformer'} has {problem}")


def _problem(module: Any) -> str | None:
    """Return what a module has that ours would not have, or None."""
    if (problem := _hook_of_diffusers(module)) is not None:
        return problem
    if module._forward_hooks or module._forward_pre_hooks:
        return "a forward hook; remove it first"
    if getattr(module, "fused_projections", False):
        return "fused projections; call unfuse_qkv_projections() first"
    processor = getattr(module, "processor", None)
    if processor is not None and type(processor) not in type(module)._available_processors:
        return (
            f"the attention processor {type(processor).__name__}; only diffusers' own can be "
            "replaced"
        )
    return None


def _problem_of_part(module: Any) -> str | None:
    """Return what keeps another class of a module from being run, or None."""
    problem = _hook_of_accelerate(module)
    if problem is None:
        problem = _hook_of_diffusers(module)
    if problem is None and "forward" in module.__dict__:  # hooks set a forward, too
        problem = "a forward of its own, which another package has set"
    return problem


def _hook_of_accelerate(module: Any) -> str | None:
    """Name a hook of the package accelerate on a module, or return None."""
    if hasattr(module, "_hf_hook"):
        return "a hook of the package accelerate (offloading, a device map); remove it first"
    return None


def _hook_of_diffusers(module: Any) -> str | None:
    """Name a hook of diffusers on a module, or return None."""
    if getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
        return "a hook of diffusers (a cache, group offloading, layerwise casting); remove it first"
    return None


def _transformers(pipe: DiffusionPipeline) -> dict[str, ModelMixin]:
    found = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    return {name: transformer for name, transformer in found.items() if transformer is not None}


@contextmanager
def _without_offloading(pipe: DiffusionPipeline) -> Iterator[None]:
    """Take the pipeline's offloading off, and put it on the pipeline's parts again at the end."""
    if pipe._is_pipeline_device_mapped():
        raise ValueError("accelerate: the pipeline has a device map; call reset_device_map() first")
    enable = _offloading(pipe)
    if enable is None:
        yield
        return
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        enable(device=pipe._offload_device)


def _offloading(pipe: DiffusionPipeline) -> Callable[..., None] | None:
    """Return the method that has put the pipeline's offloading on, if it is on."""
    from accelerate.hooks import AlignDevicesHook

    if getattr(pipe, "_all_hooks", None):
        return pipe.enable_model_cpu_offload
    hooks = [t._hf_hook for t in _transformers(pipe).values() if hasattr(t, "_hf_hook")]
    # several are one SequentialHook
    hooks = [inner for hook in hooks for inner in getattr(hook, "hooks", (hook,))]
    return (
        pipe.enable_sequential_cpu_offload
        if any(isinstance(hook, AlignDevicesHook) for hook in hooks)
        else None
    )
