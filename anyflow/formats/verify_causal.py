"""Run anyflow's causal network, or diffusers', on random inputs for a comparison."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from anyflow.formats.deviations import SHIFT, TEXT_LENGTH
from anyflow.models.causal import CAUSAL_PARAMETERS, AnyFlowFARTransformer3DModel
from anyflow.models.chunks import ChunkPartition
from anyflow.models.configuration import CausalSettings
from anyflow.sampling import sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

TIMES = ((937.0, 833.0), (500.0, 500.0), (250.0, 0.0))
_BLOCK = 128  # diffusers fills keys with zeros to a multiple of it


@dataclass(frozen=True)
class CausalInputs:
    """Hold what both networks run on; videos are ``[1, F, C, H, W]``, the text ``[1, S, D]``.

    Args:
        partition: the chunks of the videos.
        full_chunk_limit: L of the network.
        num_inference_steps: sampling steps of a chunk.
        x, clean: noise, and clean latents.
        text: prompt embeddings.
        unsampled: why no sampling is compared, or None.
    """

    partition: ChunkPartition
    full_chunk_limit: int
    num_inference_steps: int
    x: Tensor
    clean: Tensor
    text: Tensor
    unsampled: str | None

    @classmethod
    def drawn(
        cls,
        config: Any,
        size: tuple[int, int, int],
        num_inference_steps: int,
        seed: int,
        partition: ChunkPartition,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> CausalInputs:
        """Draw the inputs of networks with a config.

        Args:
            config: of diffusers' network.
            size: (F, H, W) of the latents.
            num_inference_steps: sampling steps of a chunk.
            seed: of the draws.
            partition: the chunks.
            dtype, device: of what the networks get.
        """
        generator = torch.Generator().manual_seed(seed)
        frames, height, width = size
        video = (1, frames, config.in_channels, height, width)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        tokens = math.prod((height, width)) // math.prod(config.patch_size[1:])
        return cls(
            partition,
            config.full_chunk_limit,
            num_inference_steps,
            x=draw(*video),
            clean=draw(*video),
            text=draw(1, TEXT_LENGTH, config.text_dim),
            unsampled=_unsampled(partition, config.full_chunk_limit, tokens),
        )


def partition_for(settings: CausalSettings, num_frames: int) -> ChunkPartition:
    """Return the network's own partition where it fits, or one with a compressed chunk."""
    if sum(settings.chunk_partition) == num_frames:
        return ChunkPartition(settings.chunk_partition)
    chunks = min(num_frames, settings.full_chunk_limit + 1)
    least, more = divmod(num_frames, chunks)
    return ChunkPartition(tuple(least + (chunk < more) for chunk in range(chunks)))


def check_pixels(
    settings: CausalSettings, partition: ChunkPartition, height: int, width: int
) -> None:
    """Raise a ValueError for pixels that compressed patches do not cover."""
    if partition.num_compressed(settings.full_chunk_limit) == 0:
        return
    rows, columns = (8 * size for size in settings.compressed_patch_size[1:])
    if height % rows or width % columns:
        raise ValueError(
            f"height and width must be positive multiples of {rows} and {columns}, since a chunk "
            f"of {partition.sizes} is compressed, got {height} and {width}"
        )


def causal_results(network: Any, inputs: CausalInputs) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the kind, the name and the value (fp32, on the CPU) of every result of a network."""
    partition = inputs.partition
    compressed = partition.ends[partition.num_compressed(inputs.full_chunk_limit)]
    latents = torch.cat([inputs.clean[:, :compressed], inputs.x[:, compressed:]], dim=1)
    clean = {
        "clean_hidden_states": inputs.clean[:, compressed:],
        "clean_timestep": torch.zeros(1, latents.shape[1] - compressed, device=latents.device),
    }
    for layout, options in (("training", clean), ("plain", {})):
        for t, r in TIMES:
            times = {"timestep": _times(latents, t), "r_timestep": _times(latents, r)}
            for time in times.values():
                time[:, :compressed] = 0
            out = network(
                hidden_states=latents,
                **times,
                encoder_hidden_states=inputs.text,
                chunk_partition=list(partition.sizes),
                **options,
                return_dict=False,
            )[0]
            yield "forward", f"{layout}, t {t:g}, r {r:g}", out.float().cpu()
    ours = isinstance(network, AnyFlowFARTransformer3DModel)
    bidirectional = network if ours else _bidirectional(network)
    for t, r in TIMES:
        out = bidirectional(
            hidden_states=inputs.x,
            timestep=_times(inputs.x, t),
            r_timestep=_times(inputs.x, r),
            encoder_hidden_states=inputs.text,
            **({"is_causal": False} if ours else {}),
            return_dict=False,
        )[0]
        yield "forward", f"bidirectional, t {t:g}, r {r:g}", out.float().cpu()
    if inputs.unsampled is None:
        steps = inputs.num_inference_steps
        name = f"latents, {steps} {'step' if steps == 1 else 'steps'} a chunk"
        run = _sample if ours else _sample_diffusers
        yield "sample", name, run(network, inputs).float().cpu()


def _unsampled(partition: ChunkPartition, full_chunk_limit: int, tokens: int) -> str | None:
    """Return why diffusers' sampling is not that of the network, or None where it is."""
    if full_chunk_limit == 1:
        return "sampling is not compared: diffusers has none with full_chunk_limit 1"
    if any(size * tokens % _BLOCK for size in partition.sizes):
        return (
            "sampling is not compared: diffusers attends to padding unless the tokens of every "
            f"chunk are a multiple of {_BLOCK}; a frame has {tokens}, and chunks are "
            f"{partition.sizes} frames"
        )
    return None


def _times(latents: Tensor, time: float) -> Tensor:
    return torch.full(latents.shape[:2], time, device=latents.device)


def _bidirectional(network: Any) -> Any:
    """Return diffusers' bidirectional network on the weights of its causal one."""
    names = inspect.signature(diffusers.AnyFlowTransformer3DModel.__init__).parameters
    settings = {name: value for name, value in network.config.items() if name in names}
    with torch.device("meta"):
        bidirectional = diffusers.AnyFlowTransformer3DModel(**settings)
    state = {k: v for k, v in network.state_dict().items() if k not in CAUSAL_PARAMETERS}
    bidirectional.load_state_dict(state, assign=True)
    gate = network.condition_embedder.delta_emb_gate
    bidirectional.condition_embedder.delta_emb_gate = gate
    return bidirectional.eval()


def _sample(network: AnyFlowFARTransformer3DModel, inputs: CausalInputs) -> Tensor:
    try:
        return sample_causal(
            network,
            FlowMapEulerDiscreteScheduler(shift=SHIFT),
            inputs.x,
            inputs.text,
            chunk_partition=inputs.partition.sizes,
            num_inference_steps=inputs.num_inference_steps,
        )
    except FloatingPointError:
        return torch.full_like(inputs.x, math.nan)  # differs from anything


def _sample_diffusers(network: Any, inputs: CausalInputs) -> Tensor:
    """Sample with diffusers' pipeline and scheduler; returns ``[1, F, C, H, W]``."""
    pipe = diffusers.AnyFlowFARPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=network,
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=SHIFT),
    )
    pipe.set_progress_bar_config(disable=True)
    _, frames, _, height, width = inputs.x.shape
    latents: Tensor = pipe(
        prompt_embeds=inputs.text,
        latents=inputs.x.transpose(1, 2),
        height=8 * height,
        width=8 * width,
        num_frames=4 * (frames - 1) + 1,
        num_inference_steps=inputs.num_inference_steps,
        chunk_partition=list(inputs.partition.sizes),
        guidance_scale=1.0,
        output_type="latent",
    ).frames
    return latents.transpose(1, 2)
