"""Load the parts of a pipeline, place them on devices, adapt them, and write them as a folder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoencoderKLWan
from torch import nn
from typing_extensions import Self

from anyflow.formats.saving import write_transformer
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.network import execution_device, has_flow_map
from anyflow.pipelines.acceleration import replacement_of
from anyflow.pipelines.folder import write_index, write_scheduler
from anyflow.pipelines.kinds import refuse_graph, require_kind, settings_of_module
from anyflow.pipelines.layout import ModelLayout
from anyflow.pipelines.loading import ModelPaths, load_transformer, resolve_dtype
from anyflow.pipelines.memory import (
    Memory,
    MemoryPlan,
    Sizes,
    Turns,
    check_options,
    choose_plan,
    free_memory,
)
from anyflow.pipelines.plain_wan import (
    flow_map_scheduler,
    is_plain_wan,
    load_scheduler,
    require_flow_map,
    require_one_transformer,
)
from anyflow.pipelines.wan import load_text_encoder, load_tokenizer, load_vae
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.devices import resolve_device
from anyflow.utils.documents import shortened
from anyflow.utils.writing import whole_folder

_THEIRS = (diffusers.AnyFlowTransformer3DModel, diffusers.AnyFlowFARTransformer3DModel)


def _with_weights_at_rest(name: str) -> Callable[..., Any]:
    """Let a method of diffusers' pipeline change the transformer's weights under any plan."""
    method = getattr(diffusers.AnyFlowPipeline, name)

    @functools.wraps(method)
    def call(self: PipelineParts, *args: Any, **kwargs: Any) -> Any:
        self._turns.release(self.transformer)
        return method(self, *args, **kwargs)

    return call


class PipelineParts(diffusers.AnyFlowPipeline):
    """Hold the parts of :class:`anyflow.pipelines.AnyFlowPipeline`."""

    _transformer: Any
    _text_encoder: Any
    _causal = False  # whether the transformer is a causal model

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: nn.Module | Callable[[], nn.Module],
        transformer: AnyFlowTransformer3DModel | Callable[[], AnyFlowTransformer3DModel],
        vae: AutoencoderKLWan,
        scheduler: FlowMapEulerDiscreteScheduler | diffusers.FlowMapEulerDiscreteScheduler,
        *,
        layout: ModelLayout | None = None,
        device: torch.device | str | None = None,
        memory: MemoryPlan = "fast",
        cuda_graph: bool = False,
        euler: bool = False,
    ) -> None:
        """Put parts together; :meth:`AnyFlowPipeline.from_pretrained` does it for a folder.

        Args:
            tokenizer: tokenizer of the text encoder.
            text_encoder, transformer: modules, or functions that load them on the CPU when they are
                needed.
            vae: decodes the latents.
            scheduler: gives the schedule; diffusers' stands for this library's with the same
                settings.
            layout: layout of the model; None reads it off the parts' configurations.
            device: device to run on; None leaves the parts where they are.
            memory: ``"fast"``, ``"low"`` or ``"stream"``.
            cuda_graph, euler: see :meth:`AnyFlowPipeline.from_pretrained`.

        Raises:
            ValueError: the parts do not fit together, or the device cannot do that.
        """
        refuse_graph(cuda_graph, causal=self._causal)
        loaded = transformer if isinstance(transformer, nn.Module) else None
        if loaded is not None and not euler:
            require_flow_map(Path(), loaded)
        super().__init__(tokenizer, text_encoder, transformer, vae, flow_map_scheduler(scheduler))
        if layout is None:
            encoder = self._loaded_text_encoder()
            configs = [self.transformer.config, vae.config, encoder.config.to_dict()]
            layout = ModelLayout.of("the pipeline", *configs)
        if loaded is not None:
            causal = settings_of_module(loaded)
            layout = replace(layout, flow_map=has_flow_map(loaded), causal=causal)
        require_kind(layout.causal, causal=self._causal)
        target = (
            execution_device(vae if loaded is None else loaded)
            if device is None
            else torch.device(device)
        )
        self.memory, self.layout, self.euler = memory, layout, euler
        check_options(memory, target, compile=False, cuda_graph=cuda_graph)
        self._turns = Turns(memory, target, cuda_graph)
        vae.use_slicing = True  # one video fills a GPU, and its numbers do not depend on others
        if memory != "fast":
            vae.enable_tiling()
            vae.to(target)
        elif device is not None:
            # weights that inference mode moves can never be trained again
            with torch.inference_mode(False):
                for module in (self.transformer, self._loaded_text_encoder(), vae):
                    module.to(target)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        memory: Memory = "auto",
        transformer: AnyFlowTransformer3DModel | str | Path | None = None,
        vae: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        tokenizer: Any = None,
        scheduler: Any = None,
        vae_dtype: torch.dtype = torch.float32,
        compile: bool = False,
        cuda_graph: bool = False,
        euler: bool = False,
    ) -> Self:
        """Load a diffusers folder with all parts of a pipeline.

        Args:
            path: the folder, or the name of a model on the Hugging Face Hub.
            dtype: dtype of the transformer and the text encoder, such as ``torch.float16`` or
                ``"float16"``; bf16 if left out. ``torch_dtype`` is diffusers' name for it.
            device: device to run on; None takes a GPU if torch finds one.
            memory: ``"fast"`` keeps everything on the device, ``"low"`` one part at a time,
                ``"stream"`` two blocks of one part (see the class; above 256 pixels the VAE's tiles
                change the decoded video slightly). ``"auto"`` takes the first that fits, and
                ``"low"`` streams if a part alone does not.
            transformer: transformer in place of the folder's: a model, or a folder with
                ``transformer`` and, if it has one, ``scheduler``, as a training run leaves it.
            vae, text_encoder, tokenizer, scheduler: in place of the folder's.
            vae_dtype: dtype of the VAE. bf16 halves its time and memory, and shows.
            compile: compile the transformer's blocks with ``torch.compile``; not while they stream.
            cuda_graph: replay the transformer's evaluations from a graph, not while its blocks
                stream; see :class:`anyflow.models.cuda_graph.CudaGraphTransformer`.
            euler: evaluate r = t, which is plain Euler, where a call does not say otherwise. Needed
                for a plain Wan model, as diffusers' WanPipeline and a teacher of ``anyflow train``
                have it; the shift is that of its own scheduler (see
                :func:`anyflow.pipelines.plain_wan.load_scheduler`).

        Raises:
            ValueError: no such model, parts are missing or do not fit together, or an argument is
                not possible; raised before any weight is loaded.
        """
        refuse_graph(cuda_graph, causal=cls._causal)
        width, target = resolve_dtype(dtype, torch_dtype), resolve_device(device)
        check_options(memory, target, compile=compile, cuda_graph=cuda_graph)
        paths = ModelPaths.find(path, transformer)
        if type(transformer) in _THEIRS:
            transformer = replacement_of(transformer)
        own = transformer if isinstance(transformer, nn.Module) else None
        given = {"transformer": own, "vae": vae, "text_encoder": text_encoder}
        layout = paths.layout(given)
        require_kind(layout.causal, causal=cls._causal, name=shortened(paths.transformer))
        require_one_transformer(paths.model)
        if not euler:
            require_flow_map(paths.transformer / "transformer", own)
        elif own is None:  # of a module it is known without reading
            layout = replace(layout, flow_map=not is_plain_wan(paths.transformer / "transformer"))
        if scheduler is None:
            scheduler = load_scheduler(paths.scheduler, euler=euler)
        tokenizer = load_tokenizer(paths.model) if tokenizer is None else tokenizer
        sizes = Sizes.read(paths, given, width, vae_dtype, layout.causal)
        plan = choose_plan(
            memory, sizes, free_memory(target, own), compile=compile, cuda_graph=cuda_graph
        )

        def load() -> AnyFlowTransformer3DModel:
            network = load_transformer(paths.transformer, width) if own is None else own
            if compile:
                network.compile_repeated_blocks()
            return network

        def load_encoder() -> nn.Module:
            return cast(nn.Module, load_text_encoder(paths.model, width))

        loaded_encoder = load_encoder() if plan == "fast" and text_encoder is None else text_encoder
        return cls(
            tokenizer,
            load_encoder if loaded_encoder is None else loaded_encoder,
            load() if plan == "fast" else load,
            load_vae(paths.model, vae_dtype) if vae is None else cast(Any, vae),
            scheduler,
            layout=layout,
            device=target,
            memory=plan,
            cuda_graph=cuda_graph,
            euler=euler,
        )

    @property
    def transformer(self) -> AnyFlowTransformer3DModel:
        """Return the network, which is loaded by this if it was not yet."""
        if not isinstance(self._transformer, nn.Module):
            self._transformer = self._transformer()
        return cast(AnyFlowTransformer3DModel, self._transformer)

    @transformer.setter
    def transformer(
        self, transformer: AnyFlowTransformer3DModel | Callable[[], AnyFlowTransformer3DModel]
    ) -> None:
        if type(transformer) in _THEIRS:
            transformer = replacement_of(transformer)  # on the same weights
        if isinstance(transformer, nn.Module) and hasattr(self, "layout"):
            causal = settings_of_module(transformer)
            require_kind(causal, causal=self._causal)
            self.layout = replace(self.layout, causal=causal)
        self._transformer = transformer

    @property
    def text_encoder(self) -> nn.Module | None:
        """Return the text encoder; None where it is loaded for each call."""
        return self._text_encoder if isinstance(self._text_encoder, nn.Module) else None

    @text_encoder.setter
    def text_encoder(self, text_encoder: nn.Module | Callable[[], nn.Module] | None) -> None:
        self._text_encoder = text_encoder

    def _loaded_text_encoder(self) -> Any:
        if self._text_encoder is None:
            raise ValueError(
                "this pipeline has no text encoder: give prompt_embeds, or pipe.text_encoder = ..."
            )
        return (
            self._text_encoder
            if isinstance(self._text_encoder, nn.Module)
            else self._text_encoder()
        )

    # Devices --------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Return the device that the pipeline is on, or runs on with ``"low"`` and ``"stream"``."""
        return self._turns.device if self.memory != "fast" else super().device

    @property
    def _execution_device(self) -> torch.device:
        return self._turns.device if self.memory != "fast" else super()._execution_device

    def to(self, *args: Any, **kwargs: Any) -> PipelineParts:
        """Move the pipeline to a device, or its parts to a dtype, as diffusers does.

        With the plans ``"low"`` and ``"stream"`` parts are on the device at their turn only: the
        pipeline then runs on the new device by the same plan.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: the device is not there, or cannot do what the plan needs; or a dtype is
                given by these plans.
        """
        given = [*args, kwargs.get("device"), kwargs.get("dtype")]
        devices = [value for value in given if isinstance(value, (str, int, torch.device))]
        target = resolve_device(cast(Any, devices[0])) if devices else None
        if self.memory == "fast":
            with torch.inference_mode(False):
                self._turns.release(self.transformer)
                super().to(*args, **kwargs)
            self._turns.device = self._execution_device
            return self
        if any(isinstance(value, torch.dtype) for value in given):
            raise ValueError(
                f"memory={self.memory!r} loads parts when it is their turn: give the dtype to "
                "from_pretrained (torch_dtype=...), or load with memory='fast'"
            )
        if target is not None and target != self._turns.device:
            if self.memory == "stream" and target.type != "cuda":
                raise ValueError(
                    f"memory='stream' copies weights to a CUDA device, not to {target}: load with "
                    "memory='fast' or 'low' to move the pipeline there"
                )
            if isinstance(self._transformer, nn.Module):
                self._turns.release(self.transformer)
            self._turns.device = target
            self.vae.to(target)
        return self

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Let diffusers bring each part to the GPU for its turn, in place of the memory plan."""
        self._leave_to_diffusers("enable_model_cpu_offload", device)
        super().enable_model_cpu_offload(gpu_id, cast(Any, device))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Let diffusers bring each layer to the GPU for its turn, in place of the memory plan."""
        self._leave_to_diffusers("enable_sequential_cpu_offload", device)
        super().enable_sequential_cpu_offload(gpu_id, cast(Any, device))

    def enable_group_offload(self, onload_device: torch.device, *args: Any, **kwargs: Any) -> None:
        """Let diffusers bring groups of layers to the GPU in turn, in place of the memory plan."""
        self._leave_to_diffusers("enable_group_offload", onload_device)
        super().enable_group_offload(onload_device, *args, **kwargs)

    def _leave_to_diffusers(self, name: str, device: torch.device | str | None) -> None:
        if device is None and not torch.accelerator.is_available():
            raise ValueError(f"{name}() needs a GPU to bring the parts to, and torch finds none")
        if self._turns.cuda_graph:
            raise ValueError(
                f"{name}() moves weights, and cuda_graph=True needs weights in fixed places"
            )
        if self.memory != "fast":
            self._turns.release(self.transformer)
            self._text_encoder = self._loaded_text_encoder()
            self.memory = "fast"
            self._turns = Turns("fast", torch.device("cpu"), cuda_graph=False)

    # LoRA -----------------------------------------------------------------------------------------

    load_lora_weights = _with_weights_at_rest("load_lora_weights")
    unload_lora_weights = _with_weights_at_rest("unload_lora_weights")
    fuse_lora = _with_weights_at_rest("fuse_lora")
    unfuse_lora = _with_weights_at_rest("unfuse_lora")
    set_adapters = _with_weights_at_rest("set_adapters")
    enable_lora = _with_weights_at_rest("enable_lora")
    disable_lora = _with_weights_at_rest("disable_lora")
    delete_adapters = _with_weights_at_rest("delete_adapters")

    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Merge a LoRA into the transformer; see :func:`anyflow.pipelines.lora.merge_lora`."""
        from anyflow.pipelines.lora import merge_lora

        self._turns.release(self.transformer)
        merge_lora(self.transformer, path, scale)

    # Writing --------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write the pipeline, whole or not at all, as a folder that diffusers loads too.

        A plain Wan model becomes a folder of diffusers' ``WanPipeline``.

        Args:
            save_directory: a new or empty folder.
            max_shard_size: largest size of one file of the transformer, in bytes or as ``"10GB"``.
            safe_serialization: True; files of pickle are not written.

        Raises:
            ValueError: the folder is not empty, diffusers has no such transformer, or it has
                adapters that are not fused.
            OSError: the system refuses to write, such as on a full disk; nothing is left then.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization must be True: weights are written as safetensors only"
            )
        self._turns.release(self.transformer)
        transformer: Any = getattr(self.transformer, "_orig_mod", self.transformer)
        with whole_folder(Path(save_directory)) as folder:
            if isinstance(transformer, AnyFlowTransformer3DModel):
                write_transformer(
                    transformer, folder / "transformer", max_shard_size=max_shard_size
                )
            else:
                transformer.save_pretrained(folder / "transformer", max_shard_size=max_shard_size)
            plain = not has_flow_map(transformer)
            write_scheduler(flow_map_scheduler(self.scheduler), folder, plain=plain)
            self.vae.save_pretrained(folder / "vae")
            self._loaded_text_encoder().save_pretrained(folder / "text_encoder")
            self.tokenizer.save_pretrained(folder / "tokenizer")
            tokenizer = type(self.tokenizer).__name__
            write_index(folder, plain=plain, tokenizer=tokenizer, causal=self._causal)
