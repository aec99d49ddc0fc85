"""Decide which parts of a model are on the device when: all, one at a time, or streaming in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from anyflow.models.causal_cache import cache_bytes
from anyflow.models.chunks import ChunkPartition, FrameTokens
from anyflow.models.configuration import CausalSettings
from anyflow.models.network import has_hooks
from anyflow.pipelines.loading import ModelPaths
from anyflow.pipelines.pinning import pin_weights
from anyflow.utils.documents import read_json

if TYPE_CHECKING:
    from anyflow.models import AnyFlowTransformer3DModel

Memory = Literal["auto", "fast", "low", "stream"]
MemoryPlan = Literal["fast", "low", "stream"]
MEMORY: tuple[Memory, ...] = ("auto", "fast", "low", "stream")
# Bytes of a call beside the weights at 480 x 832 x 81, rounded up from
# tests/pipelines/test_memory_budget.py: the VAE in fp32 or 33 000 tokens through a block of 14B,
# and a prompt through UMT5-XXL.
WORKSPACE, TEXT_WORKSPACE = 12 * 2**30, 2**30
_TOKENS = 30, 52  # rows and columns of such a frame


def check_options(memory: str, device: torch.device, *, compile: bool, cuda_graph: bool) -> None:
    """Raise a ValueError for a memory plan and options that exclude each other on a device."""
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
    if memory == "stream" and device.type != "cuda":
        raise ValueError(
            f"memory='stream' copies weights to a CUDA device, but the device is {device}; use "
            "'low'"
        )
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, but the device is {device}")
    if memory == "stream":
        _check_fixed_weights(compile, cuda_graph, "memory='stream' was asked for")


@dataclass(frozen=True)
class Sizes:
    """Count the bytes of the weights of each part on the device.

    ``cache`` are those of a causal model's keys and values at 480 x 832, 0 of a bidirectional one.
    """

    transformer: int
    text_encoder: int
    vae: int
    cache: int = 0

    @classmethod
    def read(
        cls,
        paths: ModelPaths,
        given: Mapping[str, nn.Module | None],
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        causal: CausalSettings | None = None,
    ) -> Sizes:
        """Count the weights by the headers of their files.

        Args:
            paths: folders of the model.
            given: modules in the place of folders.
            dtype, vae_dtype: of the weights on the device.
            causal: settings of a causal transformer, None for a bidirectional one.
        """

        def size(part: str, folder: Path, width: int) -> int:
            module = given.get(part)
            return (
                _num_parameters(folder / part) * width
                if module is None
                else sum(p.nbytes for p in module.parameters())
            )

        return cls(
            transformer=size("transformer", paths.transformer, dtype.itemsize),
            text_encoder=size("text_encoder", paths.model, dtype.itemsize),
            vae=size("vae", paths.model, vae_dtype.itemsize),
            cache=0
            if causal is None
            else _cache_bytes(paths, given.get("transformer"), causal, dtype.itemsize),
        )


def choose_plan(
    memory: Memory,
    sizes: Sizes,
    free: int | None,
    *,
    compile: bool = False,
    cuda_graph: bool = False,
) -> MemoryPlan:
    """Choose the plan for ``memory``.

    Args:
        memory: ``"auto"`` takes the first of fast, low and stream that fits; ``"low"`` streams if
            it does not fit.
        sizes: sizes of the model.
        free: bytes that the device has for it, or None where everything fits.
        compile, cuda_graph: need weights that do not stream.

    Raises:
        ValueError: ``compile`` or ``cuda_graph`` is given, and the weights must stream.
    """
    if memory in ("fast", "stream"):
        return cast(MemoryPlan, memory)
    if free is None:
        return "low" if memory == "low" else "fast"
    room = free - sizes.vae
    workspace = sizes.cache + WORKSPACE * (2 if cuda_graph else 1)  # a graph keeps its own
    if memory == "auto" and room >= sizes.transformer + sizes.text_encoder + workspace:
        return "fast"
    if room >= max(sizes.transformer + workspace, sizes.text_encoder + TEXT_WORKSPACE):
        return "low"
    _check_fixed_weights(compile, cuda_graph, f"{free / 1e9:.0f} GB are free on the device")
    return "stream"


def free_memory(device: torch.device, transformer: nn.Module | None = None) -> int | None:
    """Return the bytes that a CUDA device has for a model; None for other devices.

    Memory that the process keeps for later counts as free.

    Args:
        device: asked.
        transformer: transformer of the model; where it is on the device already, its memory counts
            as free.
    """
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    there = (
        0
        if transformer is None
        else sum(p.nbytes for p in transformer.parameters() if p.device == device)
    )
    return torch.cuda.mem_get_info(device)[0] + kept + there


class Turns:
    """Bring the transformer and the text encoder to the device when it is their turn, by a plan.

    Args:
        plan: ``"fast"`` leaves both there, or to diffusers' offloading; ``"low"`` takes the
            transformer away for the others, and from its second turn on copies it from pinned
            memory; ``"stream"`` lets its weights stream in, and those of a text encoder that does
            not fit.
        device: device to run on.
        cuda_graph: evaluate the transformer by a CUDA graph.
    """

    def __init__(self, plan: MemoryPlan, device: torch.device, cuda_graph: bool) -> None:
        self.plan, self.device, self.cuda_graph = plan, device, cuda_graph
        self._graph: Any = None
        self._homes: list[tuple[nn.Parameter, Tensor]] = []
        self._returns = False  # the transformer has had a turn

    def text_encoder(self, module: nn.Module) -> nn.Module:
        """Return the text encoder ready to run, streaming only where it does not fit."""
        if self.plan == "fast":
            return module
        size = sum(p.nbytes for p in module.parameters()) + TEXT_WORKSPACE
        free = free_memory(self.device) if self.plan == "stream" else None
        return (
            module.to(self.device) if free is None or free >= size else stream(module, self.device)
        )

    def transformer(self, module: AnyFlowTransformer3DModel) -> Any:
        """Return what to sample with: the module, ready to run, or its graph."""
        # weights that inference mode moves can never be trained again
        with torch.inference_mode(False):
            if self.plan == "stream":
                return stream(module, self.device)
            if self.plan == "low" and not self._homes:
                # pinning takes longer than one copy without it
                if self._returns and self.device.type == "cuda":
                    pin_weights(module)
                self._homes = [(p, p.data) for p in module.parameters()]
            if not has_hooks(module):  # diffusers' offloading brings it
                module.to(self.device, non_blocking=True)
        if not self.cuda_graph:
            return module
        if self._graph is None or self._graph.transformer is not module:
            from anyflow.models.cuda_graph import CudaGraphTransformer

            self._graph = CudaGraphTransformer(module)
        return self._graph

    def rest(self, module: nn.Module) -> None:
        """Leave the device to the other parts, with the plan ``"low"``.

        Weights are not copied back: their memory on the host has stayed.
        """
        if self.plan == "low":
            self._graph, self._returns = None, True
            with torch.inference_mode(False):
                for parameter, home in self._homes:
                    parameter.data = home
                self._homes = []
                module.to(torch.device("cpu"))  # the buffers

    def release(self, module: nn.Module) -> None:
        """Forget where a module's weights are, before they are changed."""
        self._graph = None
        self.rest(module)
        if self.plan == "stream":
            stop_streaming(module)


def stream(module: nn.Module, device: torch.device) -> nn.Module:
    """Let a module's weights wait in pinned main memory, and come to the device when needed.

    Copies run while the weights before them are at work.

    diffusers' group offloading moves a transformer's blocks one by one, so that two are on the
    device at a time, and other modules layer by layer. The module must then be run by its own call.
    A module that streams already stays as it is.

    Raises:
        ValueError: the device has no streams.
    """
    from diffusers.hooks import apply_group_offloading

    if not has_hooks(module):
        blocks = isinstance(getattr(module, "blocks", None), nn.ModuleList)
        apply_group_offloading(
            module,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level" if blocks else "leaf_level",
            num_blocks_per_group=1 if blocks else None,
            use_stream=True,
            # Waiting for a block before its weights are freed bounds the memory: copies are faster
            # than blocks.
            record_stream=False,
        )
    return module


def stop_streaming(module: nn.Module) -> None:
    """Undo :func:`stream`; the weights are in main memory then, and may be changed."""
    from diffusers.hooks import HookRegistry

    if has_hooks(module):
        registry = HookRegistry.check_if_exists_or_initialize(module)
        for name in (
            "group_offloading",
            "layer_execution_tracker",
            "lazy_prefetch_group_offloading",
        ):
            registry.remove_hook(name, recurse=True)


def _check_fixed_weights(compile: bool, cuda_graph: bool, why: str) -> None:
    if compile or cuda_graph:
        option = "compile" if compile else "cuda_graph"
        raise ValueError(
            f"{option} needs weights that stay where they are, but they must stream: {why}"
        )


def _num_parameters(folder: Path) -> int:
    """Count the numbers in a folder's safetensors files by their headers."""
    from anyflow.formats.readers import read_header

    files = sorted(folder.glob("*.safetensors"))
    return sum(math.prod(info.shape) for file in files for info in read_header(file).values())


def _cache_bytes(
    paths: ModelPaths, transformer: nn.Module | None, causal: CausalSettings, itemsize: int
) -> int:
    """Count the cache of the model's own chunks, by its configuration."""
    if transformer is None:
        config = read_json(paths.transformer / "transformer" / "config.json")
    else:
        config = cast(Any, transformer).config
    ratio = [
        large // small
        for large, small in zip(
            causal.compressed_patch_size[1:], config.get("patch_size", (1, 2, 2))[1:], strict=True
        )
    ]
    return cache_bytes(
        ChunkPartition(causal.chunk_partition),
        causal.full_chunk_limit,
        FrameTokens(*_TOKENS, (ratio[0], ratio[1])),
        layers=config.get("num_layers", 40),
        width=config.get("num_attention_heads", 40) * config.get("attention_head_dim", 128),
        itemsize=itemsize,
    )
