"""Compare anyflow's network with diffusers' on the weights of a folder.

The results are forwards at several pairs of timesteps, a training loss and a whole sampling; of a
causal network forwards of its layouts and of the bidirectional path, and a sampling. Both networks
get the same random inputs, and one network is in memory at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from anyflow.formats import load_transformer
from anyflow.formats.checkpoint import ReadOptions, open_checkpoint
from anyflow.formats.deviations import (
    LIMITS,
    SHIFT,
    TEXT_LENGTH,
    Deviation,
    VerifyReport,
    deviation_of,
    limits_of,
)
from anyflow.formats.errors import listed
from anyflow.formats.files import read_json
from anyflow.formats.hub import local_checkpoint
from anyflow.formats.problems import problems_of
from anyflow.formats.verify_causal import (
    CausalInputs,
    causal_results,
    check_pixels,
    partition_for,
)
from anyflow.methods import AnyFlowPretrainMethod, PretrainConfig
from anyflow.models.configuration import CausalSettings
from anyflow.models.network import evaluate
from anyflow.sampling import sample
from anyflow.schedulers import MAX_STEPS, FlowMapEulerDiscreteScheduler
from anyflow.utils.documents import shortened
from anyflow.utils.validation import brief, whole_number

__all__ = ["AGAINST", "LIMITS", "Deviation", "VerifyReport", "verify"]

AGAINST = ("diffusers",)
BATCH_SIZE = 4  # of the loss: two samples with r = t, one with r = 0, one between
TIMES = ((1000.0, 750.0), (937.0, 833.0), (750.0, 0.0), (500.0, 500.0), (250.0, 100.0))
_WAN = "WanTransformer3DModel"
_CLASSES = ("AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel", _WAN)


@torch.no_grad()
def verify(
    path: Path | str,
    *,
    against: str = "diffusers",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    height: int = 256,
    width: int = 256,
    num_frames: int = 17,
    num_inference_steps: int = 4,
    seed: int = 0,
    limits: dict[str, float] | None = None,
) -> VerifyReport:
    """Compare anyflow's network with diffusers' on the same weights and random inputs.

    The sampling is that of diffusers' own pipeline and scheduler against
    :func:`anyflow.sampling.sample`; the loss is that of
    :class:`~anyflow.methods.AnyFlowPretrainMethod` for both, plain flow matching for a Wan model.

    A causal network has no loss here. Its chunks are those of the config where their frames are
    ``num_frames``, or else ``full_chunk_limit + 1`` equal ones. Its sampling is compared where
    diffusers' is that of the network, which attends to padding unless the tokens of every chunk are
    a multiple of 128; a note says where it is not. On a CPU diffusers' causal attention takes the
    memory of all pairs of tokens.

    Args:
        path: a folder of diffusers' AnyFlow (causal or not) or Wan transformer, or of a pipeline
            with one as ``transformer``; or the name of one on the Hugging Face Hub.
        against: ``"diffusers"``.
        dtype: dtype of the weights, float32 or bfloat16.
        device: device to run on.
        height: pixels, a multiple of 16; of 32 where a chunk is compressed.
        width: pixels, likewise.
        num_frames: frames of the video, 4k + 1.
        num_inference_steps: sampling steps.
        seed: seed of the inputs.
        limits: largest relative differences in place of those of :data:`LIMITS`, by the same keys.

    Raises:
        ValueError: the folder does not hold such a network, or an argument is not possible.
    """
    if against not in AGAINST:
        raise ValueError(f"against must be one of {', '.join(AGAINST)}, got {against!r}")
    whole_number("num_inference_steps", num_inference_steps, high=MAX_STEPS)
    whole_number("seed", seed, 0, 2**63 - 1)
    limits = limits_of(dtype, {} if limits is None else limits)
    size = ((num_frames - 1) // 4 + 1, height // 8, width // 8)
    folder, cls, causal = _open(path, dtype, num_frames, height, width)
    partition = None
    if causal is not None:
        partition = partition_for(causal, size[0])
        check_pixels(causal, partition, height, width)

    network = _load_diffusers(folder, cls, dtype).to(device)
    notes: tuple[str, ...] = ()
    if partition is not None:
        chunks = CausalInputs.drawn(
            network.config, size, num_inference_steps, seed, partition, dtype, device
        )
        notes = () if chunks.unsampled is None else (chunks.unsampled,)
        results = partial(causal_results, inputs=chunks)
        theirs = list(results(network))
    else:
        inputs = _NetworkInputs.drawn(
            network.config, size, num_inference_steps, seed, cls, dtype, device
        )
        results = partial(_results, inputs=inputs)
        theirs = list(results(_Diffusers(network)))
    del network  # before the other one is loaded
    ours = results(load_transformer(folder, dtype=dtype, device=device))
    comparisons = [
        deviation_of(name, a, b, limits[kind])
        for (kind, name, a), (_, _, b) in zip(ours, theirs, strict=True)
    ]
    chunked = "" if partition is None else f" in chunks of {partition.sizes} latent frames"
    return VerifyReport(
        f"{folder}: anyflow against diffusers {diffusers.__version__}, {dtype}, {device}, "
        f"{num_frames} frames of {height} x {width}{chunked}",
        tuple(comparisons),
        notes,
    )


def _open(
    path: Path | str, dtype: torch.dtype, num_frames: int, height: int, width: int
) -> tuple[Path, Any, CausalSettings | None]:
    """Return the folder of the transformer, diffusers' class for it, and its causal settings.

    Raises:
        ValueError: no transformer that can be loaded is there, or a size is not possible or has
            more tokens along an axis than the transformer has positions.
    """
    if min(height, width) < 16 or height % 16 or width % 16:
        raise ValueError(
            f"height and width must be positive multiples of 16, got {height} and {width}"
        )
    if num_frames < 1 or num_frames % 4 != 1:
        raise ValueError(f"num_frames must be 4k + 1, got {num_frames}")
    folder = local_checkpoint(path)
    if os.path.isfile(folder / "transformer" / "config.json"):
        folder = folder / "transformer"
    if not os.path.isfile(folder / "config.json"):
        raise ValueError(f"no config.json in {shortened(folder)} or its folder transformer")
    config = read_json(folder / "config.json")
    name = config.get("_class_name")
    if name not in _CLASSES:
        raise ValueError(
            f"{folder / 'config.json'} is of a {brief(name)}; allowed are {', '.join(_CLASSES)}"
        )
    # The reader of anyflow looks at every file before diffusers maps one into memory.
    checkpoint = open_checkpoint(folder, ReadOptions())
    if lines := problems_of(checkpoint, checkpoint.architecture.build_empty(), dtype=dtype):
        raise ValueError(f"{folder} cannot be loaded:{listed(lines)}")
    positions = whole_number(f"{folder}: rope_max_seq_len", config.get("rope_max_seq_len", 1024))
    if num_frames > (most := 4 * (positions - 1) + 1):
        raise ValueError(f"num_frames must be <= {most} for this model, got {num_frames}")
    for side, pixels in (("height", height), ("width", width)):
        if pixels > 16 * positions:
            raise ValueError(
                f"{side} must be <= {16 * positions} pixels for this model, got {pixels}"
            )
    causal = checkpoint.architecture.causal
    if causal is None and not config.get("r_embedder", True):
        name = _WAN
    return folder, getattr(diffusers, name), causal


def _load_diffusers(folder: Path, cls: Any, dtype: torch.dtype) -> Any:
    """Load diffusers' network with every weight of the folder, or raise a ValueError."""
    try:
        with torch.random.fork_rng(devices=[]):
            network, info = cls.from_pretrained(
                folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # diffusers and safetensors raise errors of every kind
        raise ValueError(
            f"{folder} cannot be loaded by diffusers: {type(error).__name__}: "
            f"{brief(str(error), 300)}"
        ) from error
    wrong = [
        f"{kind.replace('_', ' ')}: {', '.join(map(str, names))}"
        for kind, names in info.items()
        if names
    ]
    if wrong:
        raise ValueError(f"{folder} does not fit diffusers' {cls.__name__}: {'; '.join(wrong)}")
    return network.eval()


@dataclass(frozen=True)
class _NetworkInputs:
    """Hold what both networks run on; videos are ``[B, F, C, H, W]``, texts ``[B, S, D]``."""

    is_wan: bool
    num_inference_steps: int
    seed: int
    x: Tensor
    text: Tensor
    negative: Tensor
    data: Tensor
    noise: Tensor
    texts: Tensor

    @classmethod
    def drawn(
        cls,
        config: Any,
        size: tuple[int, int, int],
        num_inference_steps: int,
        seed: int,
        network: type,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> _NetworkInputs:
        """Draw the inputs of networks with a config.

        Args:
            config: of diffusers' network.
            size: (F, H, W) of the latents.
            num_inference_steps: sampling steps.
            seed: of the draws.
            network: diffusers' class of the network.
            dtype, device: of what the networks get.
        """
        generator = torch.Generator().manual_seed(seed)
        frames, height, width = size
        video = (frames, config.in_channels, height, width)
        text = (TEXT_LENGTH, config.text_dim)

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        return cls(
            network is diffusers.WanTransformer3DModel,
            num_inference_steps,
            seed,
            x=draw(1, *video),
            text=draw(1, *text),
            negative=draw(1, *text),
            data=draw(BATCH_SIZE, *video, dtype=torch.float32),
            noise=draw(BATCH_SIZE, *video, dtype=torch.float32),
            texts=draw(BATCH_SIZE, *text),
        )


class _Diffusers:
    """Give diffusers' network the call of anyflow's: frames first, ``[B]`` times, one dtype."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.is_wan = type(network) is diffusers.WanTransformer3DModel
        self.config = SimpleNamespace(**{**network.config, "r_embedder": not self.is_wan})

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        r_timestep: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        x, text = hidden_states.to(self.network.dtype), encoder_hidden_states.to(self.network.dtype)
        if self.is_wan:
            out = self.network(x.transpose(1, 2), timestep, text, return_dict=False)[0]
            return (out.transpose(1, 2),)
        assert r_timestep is not None
        times = [time[:, None].expand(-1, x.shape[1]) for time in (timestep, r_timestep)]
        return (self.network(x, *times, text, return_dict=False)[0],)


def _results(network: Any, inputs: _NetworkInputs) -> Iterator[tuple[str, str, Tensor]]:
    """Yield the kind, the name and the value (fp32, on the CPU) of every result of a network."""
    for t, r in TIMES:
        times = {"timestep": t} if inputs.is_wan else {"timestep": t, "r_timestep": r}
        conditions = {
            name: torch.full((1,), v, device=inputs.x.device) for name, v in times.items()
        }
        out = evaluate(network, inputs.x, encoder_hidden_states=inputs.text, **conditions)
        name = f"forward, t {t:g}" + ("" if inputs.is_wan else f", r {r:g}")
        yield "forward", name, out.float().cpu()
    yield "loss", "training loss", _loss(network, inputs).float().cpu()
    run = _sample_diffusers if isinstance(network, _Diffusers) else _sample
    steps = f"{inputs.num_inference_steps} {'step' if inputs.num_inference_steps == 1 else 'steps'}"
    yield "sample", f"latents after {steps}", run(network, inputs).float().cpu()


def _loss(network: Any, inputs: _NetworkInputs) -> Tensor:
    """Compute the pretrain loss; that of a Wan model is plain flow matching."""
    plain = PretrainConfig(diffusion_ratio=1.0, consistency_ratio=0.0, fuse_guidance_scale=1.0)
    config = plain if inputs.is_wan else PretrainConfig()
    method = AnyFlowPretrainMethod(network, FlowMapEulerDiscreteScheduler(shift=SHIFT), config)
    generator = torch.Generator(inputs.x.device).manual_seed(inputs.seed)  # of the times
    return method.loss(
        inputs.data, inputs.texts, inputs.negative, noise=inputs.noise, generator=generator
    ).loss


def _sample(network: Any, inputs: _NetworkInputs) -> Tensor:
    """Sample with anyflow's sampler, a Wan model on the timesteps of its usual scheduler."""
    steps = inputs.num_inference_steps
    timesteps = None
    if inputs.is_wan:
        usual = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        usual.set_timesteps(steps)
        timesteps = usual.timesteps.tolist()
    try:
        return sample(
            network,
            FlowMapEulerDiscreteScheduler(shift=SHIFT),
            inputs.x,
            inputs.text,
            num_inference_steps=steps,
            timesteps=timesteps,
            use_mean_velocity=not inputs.is_wan,
        )
    except FloatingPointError:
        return torch.full_like(inputs.x, math.nan)  # differs from anything


def _sample_diffusers(network: _Diffusers, inputs: _NetworkInputs) -> Tensor:
    """Sample with diffusers' pipeline and scheduler; returns ``[1, F, C, H, W]``."""
    if inputs.is_wan:
        cls, scheduler_cls = diffusers.WanPipeline, diffusers.FlowMatchEulerDiscreteScheduler
    else:
        cls, scheduler_cls = diffusers.AnyFlowPipeline, diffusers.FlowMapEulerDiscreteScheduler
    scheduler = scheduler_cls(shift=SHIFT)
    models = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": network.network}
    pipe = cls(scheduler=scheduler, **models)
    pipe.set_progress_bar_config(disable=True)
    _, frames, _, height, width = inputs.x.shape
    latents = pipe(
        prompt_embeds=inputs.text,
        latents=inputs.x.transpose(1, 2),
        height=8 * height,
        width=8 * width,
        num_frames=4 * (frames - 1) + 1,
        num_inference_steps=inputs.num_inference_steps,
        guidance_scale=1.0,
        output_type="latent",
    ).frames
    return latents.transpose(1, 2)
