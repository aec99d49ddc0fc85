"""Hold our network to diffusers' on the weights of a folder: forwards, a training loss, a whole
sampling.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from anyflow.formats import load_transformer
from anyflow.formats.checkpoint import ReadOptions, open_checkpoint
from anyflow.formats.errors import listed
from anyflow.formats.files import read_json
from anyflow.formats.hub import local_checkpoint
from anyflow.formats.problems import problems_of
from anyflow.methods import AnyFlowPretrainMethod, PretrainConfig
from anyflow.models.network import evaluate
from anyflow.sampling import sample
from anyflow.schedulers import MAX_STEPS, FlowMapEulerDiscreteScheduler
from anyflow.utils.documents import shortened
from anyflow.utils.validation import brief, whole_number

AGAINST = ("diffusers",)
SHIFT = 5.0  # Wan's
TEXT_LENGTH = 512
BATCH_SIZE = 4  # of the loss: two samples with r = t, one with r = 0, one between
TIMES = ((1000.0, 750.0), (937.0, 833.0), (750.0, 0.0), (500.0, 500.0), (250.0, 100.0))
_CLASSES = ("AnyFlowTransformer3DModel", "WanTransformer3DModel")


@dataclass(frozen=True)
class Thresholds:
    """Largest relative differences: of forwards and of the sampled latents in the mean, of the
    loss.
    """

    forward: float
    loss: float
    sample: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"Thresholds.{name} must be >= 0, got {value}")

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> Thresholds:
        """What rounding explains: 1e-5 in fp32; in bf16 2.55 % of forwards and samples and 1.33 %
        of the loss.

        Raises:
            ValueError: another dtype, which has no thresholds of its own.
        """
        if dtype == torch.float32:
            return cls(1e-5, 1e-5, 1e-5)
        if dtype == torch.bfloat16:
            return cls(2.55e-2, 1.33e-2, 2.55e-2)
        raise ValueError(
            "dtype must be torch.float32 or torch.bfloat16 unless thresholds are given, got "
            f"{dtype}"
        )


@dataclass(frozen=True)
class Comparison:
    """``mean`` is mean |a - b| / mean |b|, ``max`` is max |a - b| / max |b|, with b the other
    implementation's.
    """

    name: str
    mean: float
    max: float
    threshold: float

    @property
    def passed(self) -> bool:
        """Tell whether the mean is within the threshold; NaN and infinity never are."""
        return math.isfinite(self.mean) and self.mean <= self.threshold


@dataclass(frozen=True)
class VerifyReport:
    """Every comparison of a run; ``str()`` is a table of them."""

    title: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its threshold."""
        return all(comparison.passed for comparison in self.comparisons)

    def __str__(self) -> str:
        lines = [
            self.title,
            f"{'relative difference':28s} {'mean':>9s} {'max':>9s} {'allowed':>9s}",
        ]
        for c in self.comparisons:
            verdict = "ok" if c.passed else "OVER"
            lines.append(f"{c.name:28s} {c.mean:9.2e} {c.max:9.2e} {c.threshold:9.2e}  {verdict}")
        over = sum(not c.passed for c in self.comparisons)
        return "\n".join(
            [*lines, "all within" if self.passed else f"{over} of {len(self.comparisons)} over"]
        )


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
    steps: int = 4,
    seed: int = 0,
    thresholds: Thresholds | None = None,
) -> VerifyReport:
    """Compare our network with diffusers' on the same weights and random inputs; one network is in
    memory at a time.

    The sampling is that of diffusers' own pipeline and scheduler against
    :func:`anyflow.sampling.sample`; the loss is that of
    :class:`~anyflow.methods.AnyFlowPretrainMethod` for both, plain flow matching for a Wan model.

    Args:
        path: a folder of diffusers' AnyFlow or Wan transformer, or of a pipeline with one as
            ``transformer``; or the name of one on the Hugging Face Hub.
        against: ``"diffusers"``.
        dtype: the weights are loaded in.
        device: to run on.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        num_frames: of the video, 4k + 1.
        steps: of the sampling.
        seed: of the inputs.
        thresholds: None takes those of the dtype.

    Raises:
        ValueError: the folder does not hold such a network, or a size does not fit.
    """
    if against not in AGAINST:
        raise ValueError(f"against must be one of {', '.join(AGAINST)}, got {against!r}")
    if min(height, width) < 16 or height % 16 or width % 16:
        raise ValueError(
            f"height and width must be positive multiples of 16, got {height} and {width}"
        )
    if num_frames < 1 or num_frames % 4 != 1:
        raise ValueError(f"num_frames must be 4k + 1, got {num_frames}")
    whole_number("steps", steps, high=MAX_STEPS)
    whole_number("seed", seed, 0, 2**63 - 1)
    thresholds = Thresholds.for_dtype(dtype) if thresholds is None else thresholds
    source = _Source.of(local_checkpoint(path))
    source.require_loadable(dtype)
    source.require_positions(num_frames, height, width)
    case = _Case(
        source,
        dtype,
        torch.device(device),
        ((num_frames - 1) // 4 + 1, height // 8, width // 8),
        steps,
        seed,
    )
    theirs = _Measured.of(case, _Diffusers(source.load_theirs(dtype).to(device)))
    ours = _Measured.of(case, load_transformer(source.folder, dtype=dtype, device=device))
    return VerifyReport(
        f"{source.folder}: anyflow against diffusers {diffusers.__version__}, {dtype}, {device}, "
        f"{num_frames} frames of {height} x {width}",
        tuple(_compared(ours, theirs, case, thresholds)),
    )


@dataclass(frozen=True)
class _Source:
    """A transformer's folder, and whether it is a plain Wan model."""

    folder: Path
    plain: bool
    max_positions: int

    @classmethod
    def of(cls, path: Path) -> _Source:
        folder = (
            path / "transformer" if os.path.isfile(path / "transformer" / "config.json") else path
        )
        if not os.path.isfile(folder / "config.json"):
            raise ValueError(f"no config.json in {shortened(path)} or its folder transformer")
        config = read_json(folder / "config.json")
        name = config.get("_class_name")
        if name not in _CLASSES:
            raise ValueError(
                f"{folder / 'config.json'} is of a {brief(name)}; allowed are {', '.join(_CLASSES)}"
            )
        positions = whole_number(
            f"{folder}: rope_max_seq_len", config.get("rope_max_seq_len", 1024)
        )
        return cls(
            folder, name == "WanTransformer3DModel" or not config.get("r_embedder", True), positions
        )

    def require_positions(self, num_frames: int, height: int, width: int) -> None:
        """Raise a ValueError for a size with more tokens along an axis than the network has
        positions for.
        """
        most, pixels = 4 * (self.max_positions - 1) + 1, 16 * self.max_positions
        if num_frames > most:
            raise ValueError(f"num_frames must be <= {most} for this model, got {num_frames}")
        for name, size in (("height", height), ("width", width)):
            if size > pixels:
                raise ValueError(f"{name} must be <= {pixels} pixels for this model, got {size}")

    def require_loadable(self, dtype: torch.dtype) -> None:
        """ValueError unless our own reader, which looks at every file first, takes the folder."""
        checkpoint = open_checkpoint(self.folder, ReadOptions())
        if lines := problems_of(checkpoint, checkpoint.architecture.build_empty(), dtype=dtype):
            raise ValueError(f"{self.folder} cannot be loaded:{listed(lines)}")

    def load_theirs(self, dtype: torch.dtype) -> Any:
        """diffusers' network for it, with every weight of the folder."""
        cls = diffusers.WanTransformer3DModel if self.plain else diffusers.AnyFlowTransformer3DModel
        try:
            with torch.random.fork_rng(devices=[]):
                network, info = cls.from_pretrained(
                    self.folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
                )
        except (
            Exception
        ) as error:  # diffusers and safetensors raise of every kind for files they did not expect
            raise ValueError(
                f"{self.folder} cannot be loaded by diffusers: {type(error).__name__}: "
                f"{brief(str(error), 300)}"
            ) from error
        wrong = [
            f"{kind.replace('_', ' ')}: {', '.join(map(str, info[kind]))}"
            for kind in info
            if info[kind]
        ]
        if wrong:
            raise ValueError(
                f"{self.folder} does not fit diffusers' {cls.__name__}: {'; '.join(wrong)}"
            )
        return network.eval()


@dataclass(frozen=True)
class _Case:
    """What is run on a network; ``latents`` is (F, H, W)."""

    source: _Source
    dtype: torch.dtype
    device: torch.device
    latents: tuple[int, int, int]
    steps: int
    seed: int

    def inputs(self, config: Any) -> dict[str, Tensor]:
        """The same numbers for every network of these sizes."""
        generator = torch.Generator().manual_seed(self.seed)
        frames, height, width = self.latents
        video = (frames, config.in_channels, height, width)
        text = (TEXT_LENGTH, config.text_dim)
        shapes = {"x": (1, *video), "text": (1, *text), "negative": (1, *text)}
        shapes |= {
            "data": (BATCH_SIZE, *video),
            "noise": (BATCH_SIZE, *video),
            "texts": (BATCH_SIZE, *text),
        }
        return {
            name: torch.randn(shape, generator=generator).to(self.device)
            for name, shape in shapes.items()
        }


class _Diffusers:
    """diffusers' network behind our call: frames first, ``[B]`` times, everything rounded to its
    dtype.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        self.plain = type(network) is diffusers.WanTransformer3DModel
        self.config = SimpleNamespace(**{**network.config, "r_embedder": not self.plain})

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        r_timestep: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        x, text = (
            tensor.to(self.network.dtype) for tensor in (hidden_states, encoder_hidden_states)
        )
        if self.plain:
            out = self.network(x.transpose(1, 2), timestep, text, return_dict=False)[0]
            return (out.transpose(1, 2),)
        assert r_timestep is not None
        times = [time[:, None].expand(-1, x.shape[1]) for time in (timestep, r_timestep)]
        return (self.network(x, *times, text, return_dict=False)[0],)


@dataclass(frozen=True)
class _Measured:
    """Everything that is compared, in fp32 on the CPU."""

    forwards: list[Tensor]
    loss: Tensor
    latents: Tensor

    @classmethod
    def of(cls, case: _Case, network: Any) -> _Measured:
        inputs = case.inputs(network.config)
        forwards = [_forward(case, network, inputs, *times) for times in TIMES]
        results = [*forwards, _loss(case, network, inputs), _sample(case, network, inputs)]
        *forwards, loss, latents = (result.float().cpu() for result in results)
        return cls(forwards, loss, latents)


def _forward(case: _Case, network: Any, inputs: dict[str, Tensor], t: float, r: float) -> Tensor:
    times = [torch.full((1,), time, device=case.device) for time in (t, r)]
    conditions = {"timestep": times[0], "encoder_hidden_states": inputs["text"].to(case.dtype)}
    if not case.source.plain:
        conditions["r_timestep"] = times[1]
    return evaluate(network, inputs["x"].to(case.dtype), **conditions)


def _loss(case: _Case, network: Any, inputs: dict[str, Tensor]) -> Tensor:
    plain = PretrainConfig(diffusion_ratio=1.0, consistency_ratio=0.0, fuse_guidance_scale=1.0)
    config = plain if case.source.plain else PretrainConfig()
    method = AnyFlowPretrainMethod(network, FlowMapEulerDiscreteScheduler(shift=SHIFT), config)
    generator = torch.Generator(case.device).manual_seed(case.seed)  # of the times
    return method.loss(
        inputs["data"],
        inputs["texts"].to(case.dtype),
        inputs["negative"].to(case.dtype),
        noise=inputs["noise"],
        generator=generator,
    ).loss


def _sample(case: _Case, network: Any, inputs: dict[str, Tensor]) -> Tensor:
    """``[1, F, C, H, W]`` by our sampler, or by diffusers' pipeline for its network."""
    noise, text = inputs["x"].to(case.dtype), inputs["text"].to(case.dtype)
    flow_match = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    if not isinstance(network, _Diffusers):
        flow_match.set_timesteps(case.steps)
        try:
            return sample(
                network,
                FlowMapEulerDiscreteScheduler(shift=SHIFT),
                noise,
                text,
                num_inference_steps=case.steps,
                timesteps=flow_match.timesteps.tolist() if case.source.plain else None,
                use_mean_velocity=not case.source.plain,
            )
        except FloatingPointError:
            return torch.full_like(noise, math.nan)  # differs from anything
    pipeline = diffusers.WanPipeline if case.source.plain else diffusers.AnyFlowPipeline
    scheduler = (
        flow_match if case.source.plain else diffusers.FlowMapEulerDiscreteScheduler(shift=SHIFT)
    )
    pipe = pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=network.network,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = case.latents
    latents = pipe(
        prompt_embeds=text,
        latents=noise.transpose(1, 2),
        height=8 * height,
        width=8 * width,
        num_frames=4 * (frames - 1) + 1,
        num_inference_steps=case.steps,
        guidance_scale=1.0,
        output_type="latent",
    ).frames
    return latents.transpose(1, 2)


def _compared(
    ours: _Measured, theirs: _Measured, case: _Case, thresholds: Thresholds
) -> Iterator[Comparison]:
    for (t, r), a, b in zip(TIMES, ours.forwards, theirs.forwards, strict=True):
        name = f"forward, t {t:g}" + ("" if case.source.plain else f", r {r:g}")
        yield _comparison(name, a, b, thresholds.forward)
    yield _comparison("training loss", ours.loss, theirs.loss, thresholds.loss)
    steps = f"{case.steps} {'step' if case.steps == 1 else 'steps'}"
    yield _comparison(f"latents after {steps}", ours.latents, theirs.latents, thresholds.sample)


def _comparison(name: str, ours: Tensor, theirs: Tensor, threshold: float) -> Comparison:
    difference = (ours.double() - theirs.double()).abs()
    scale = theirs.double().abs()
    return Comparison(
        name,
        (difference.mean() / scale.mean()).item(),
        (difference.max() / scale.max()).item(),
        threshold,
    )
