"""Describe models that can be evaluated: pipelines, and those of moving shapes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from anyflow.data import SyntheticVideos
from anyflow.evaluation.runs.layout import check_model_name
from anyflow.models.network import is_causal
from anyflow.pipelines.loading import ModelPaths, load_transformer
from anyflow.pipelines.memory import Memory, check_options
from anyflow.pipelines.plain_wan import load_scheduler, require_flow_map
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.pipelines.renderer import Renderer
from anyflow.pipelines.sample_settings import SampleSettings
from anyflow.sampling import Callback, sample, sample_causal
from anyflow.utils.devices import resolve_device
from anyflow.utils.documents import read_json, shortened
from anyflow.utils.threads import torch_threads

# a few blocks tell two files of weights apart without reading all of them
_BLOCKS, _BLOCK = 16, 2**16
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".json")


class VideoMaker(Protocol):
    """Make videos of a model that is loaded."""

    def frames(
        self, prompt: VideoPrompt, num_inference_steps: int, seed: int, callback: Callback
    ) -> Any:
        """Make the frames of one video, as :func:`anyflow.pipelines.write_video` takes them."""
        ...

    def reason(self, error: Exception) -> str:
        """Say in one line why a video could not be made."""
        ...


class VideoModel(Protocol):
    """Describe a model whose weights are not loaded yet."""

    @property
    def path(self) -> str:
        """Return the name or the folder that the user gave."""
        ...

    @property
    def device(self) -> str | None:
        """Return the torch device; None stands for a GPU if torch finds one."""
        ...

    @property
    def video(self) -> VideoFormat:
        """Return the size and the rate of the videos."""
        ...

    def check(self, prompts: Sequence[VideoPrompt]) -> None:
        """Raise a ValueError for what cannot work, before a weight is loaded."""
        ...

    def sampler(self) -> dict[str, Any]:
        """Return what decides the videos beside prompt, steps and noise, for the record."""
        ...

    def load(self, prompts: Sequence[VideoPrompt]) -> VideoMaker:
        """Load the weights, and encode the prompts."""
        ...

    def place(self, device: str) -> VideoModel:
        """Return the model on another device."""
        ...


@dataclass(frozen=True)
class VideoFormat:
    """Describe the videos of a model.

    Args:
        height, width: in pixels.
        num_frames: frames of a video.
        fps: frames per second.
    """

    height: int
    width: int
    num_frames: int
    fps: float


@dataclass(frozen=True)
class PipelineModel:
    """Describe a text-to-video pipeline, sampled as ``anyflow sample`` does.

    Args:
        settings: settings of the model's videos.
        memory, device, compile, cuda_graph: see :meth:`AnyFlowPipeline.from_pretrained`.
    """

    settings: SampleSettings
    memory: Memory = "auto"
    device: str | None = None
    compile: bool = False
    cuda_graph: bool = False

    @property
    def path(self) -> str:
        """Return the folder, or the name on the Hub."""
        return self.settings.model

    @property
    def video(self) -> VideoFormat:
        """Return the size and the rate of the videos."""
        s = self.settings
        return VideoFormat(s.height, s.width, s.num_frames, s.fps)

    def check(self, prompts: Sequence[VideoPrompt]) -> None:
        """Raise a ValueError for what cannot work."""
        self.settings.check(cuda_graph=self.cuda_graph)
        check_options(
            self.memory,
            resolve_device(self.device),
            compile=self.compile,
            cuda_graph=self.cuda_graph,
        )

    def sampler(self) -> dict[str, Any]:
        """Return the settings, and a fingerprint of the weights."""
        settings = self.settings
        paths = ModelPaths.find(settings.model, settings.transformer)
        parts = [paths.transformer / "transformer", paths.scheduler / "scheduler"]
        lora = [] if settings.lora is None else [Path(settings.lora)]
        skipped = ("model", "image", "video", "video_frames")
        values = {n: value for n, value in settings.as_dict().items() if n not in skipped}
        return {
            **values,
            "weights": fingerprint(
                [*parts, paths.model / "vae", paths.model / "text_encoder", *lora]
            ),
        }

    def load(self, prompts: Sequence[VideoPrompt]) -> VideoMaker:
        """Load the weights, and encode the prompts."""
        options = {"memory": self.memory, "compile": self.compile, "cuda_graph": self.cuda_graph}
        return _PipelineMaker(Renderer(self.settings, prompts, device=self.device, **options))  # type: ignore[arg-type]

    def place(self, device: str) -> PipelineModel:
        """Return the model on another device."""
        return replace(self, device=device)


@dataclass(frozen=True)
class _PipelineMaker:
    renderer: Renderer

    def frames(
        self, prompt: VideoPrompt, num_inference_steps: int, seed: int, callback: Callback
    ) -> Any:
        """Make the frames of one video; a causal model's steps are counted in its last chunk."""
        first = self.renderer.num_evaluations(num_inference_steps) - num_inference_steps

        def after_step(index: int, timestep: float, latents: torch.Tensor) -> Any:
            return callback(index - first, timestep, latents) if index >= first else None

        return self.renderer.frames(prompt, num_inference_steps, seed, after_step)[0]

    def reason(self, error: Exception) -> str:
        """Say in one line why a video could not be made."""
        return self.renderer.reason(error)


@dataclass(frozen=True)
class ShapesModel:
    """Describe a model of :class:`anyflow.data.MovingShapes`.

    ``anyflow demo`` and the recipes ``smoke_*`` train such models.

    The model's prompts are the classes, and its decoder is the pixel shuffle; a file has each pixel
    enlarged to :data:`SHAPES_UPSCALE` x :data:`SHAPES_UPSCALE`.

    Args:
        path: the path that the user gave: the folder of a run of ``anyflow demo``, or that of a
            checkpoint.
        folder: holds ``transformer`` and ``scheduler``.
        euler: evaluate r = t, which is plain Euler.
        device: torch device, the CPU if left out.
        seed: seed of the run, which decides the held-out videos.
    """

    path: str
    folder: Path
    euler: bool = False
    device: str | None = None
    seed: int = 0
    video: VideoFormat = field(default=VideoFormat(96, 96, 8, 8.0))

    def check(self, prompts: Sequence[VideoPrompt]) -> None:
        """Raise a ValueError for what cannot work."""
        resolve_device(self.device)
        if not self.euler:
            require_flow_map(self.folder / "transformer")
        load_scheduler(self.folder, euler=self.euler)
        names = shapes_prompts()
        for prompt in prompts:
            if prompt.text not in names:
                raise ValueError(
                    f"{shortened(self.path)} is a model of moving shapes, which knows the prompts "
                    f"{', '.join(names)}; "
                    f"got {shortened(prompt.text)!r}. Leave out --prompts to take them all"
                )

    def sampler(self) -> dict[str, Any]:
        """Return the settings, and a fingerprint of the weights."""
        weights = fingerprint([self.folder / "transformer", self.folder / "scheduler"])
        return {
            "data": "moving shapes",
            **asdict(self.video),
            "euler": self.euler,
            "weights": weights,
        }

    def load(self, prompts: Sequence[VideoPrompt]) -> VideoMaker:
        """Load the weights."""
        return _ShapesMaker(self)

    def place(self, device: str) -> ShapesModel:
        """Return the model on another device."""
        return replace(self, device=device)


SHAPES_UPSCALE = 8


class _ShapesMaker:
    def __init__(self, model: ShapesModel) -> None:
        from anyflow.demo import DemoConfig, World

        device = resolve_device("cpu" if model.device is None else model.device)
        self.model, self.world = model, World(DemoConfig(seed=model.seed, device=str(device)))
        self.transformer = load_transformer(model.folder, torch.float32).to(device)
        self.scheduler = load_scheduler(model.folder, euler=model.euler)

    def frames(
        self, prompt: VideoPrompt, num_inference_steps: int, seed: int, callback: Callback
    ) -> Any:
        """Make the frames of one video, ``[8, 96, 96, 3]`` uint8."""
        world = self.world
        label = torch.tensor([shapes_prompts().index(prompt.text)], device=world.device)
        noise = world.noise(1, torch.Generator().manual_seed(seed))
        sample_video = sample_causal if is_causal(self.transformer) else sample
        with torch_threads(world.config.num_threads), torch.inference_mode():
            latents = sample_video(
                self.transformer,
                self.scheduler,
                noise,
                world.prompts(label),
                num_inference_steps=num_inference_steps,
                use_mean_velocity=not self.model.euler,
                callback=callback,
            )
        (gray,) = world.shapes.to_uint8(world.decode(latents)).numpy()
        enlarged = gray.repeat(SHAPES_UPSCALE, 1).repeat(SHAPES_UPSCALE, 2)
        return np.repeat(enlarged[..., None], 3, axis=3)

    def reason(self, error: Exception) -> str:
        """Say in one line why a video could not be made."""
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def shapes_prompts() -> tuple[str, ...]:
    """Return the prompts that a model of moving shapes knows, ``disc right`` and three more."""
    return _shapes().class_names


def find_shapes_model(
    path: str, *, euler: bool = False, device: str | None = None
) -> ShapesModel | None:
    """Return the model of moving shapes that a path names, or None where it is something else.

    Args:
        path: the folder of a run of ``anyflow demo``, whose stage 2 is taken; or of a checkpoint of
            such a model, which has ``transformer`` and ``scheduler`` and no VAE.
        euler: evaluate r = t.
        device: torch device.

    Raises:
        ValueError: the run has not come to the end of stage 2.
    """
    folder = Path(path)
    if (folder / "state.json").is_file() and (folder / "checkpoints").is_dir():
        chosen = folder / "checkpoints" / "on_policy"
        if not chosen.is_dir():
            raise ValueError(
                f"{shortened(path)} is a run of `anyflow demo` without a model of stage 2: let it "
                "finish, or name one "
                f"of {shortened(folder / 'checkpoints')}"
            )
        folder = chosen
    if not (folder / "transformer" / "config.json").is_file() or os.path.lexists(folder / "vae"):
        return None
    config = read_json(folder / "transformer" / "config.json")
    if not isinstance(config, dict) or not _takes_shapes(config):
        return None
    return ShapesModel(path, folder, euler, device, _seed_of_run(folder))


def fingerprint(parts: Iterable[Path]) -> str:
    """Hash the names, sizes and some blocks of weights and configuration below folders.

    Training changes every weight, so that blocks spread over a file tell two checkpoints apart in
    the time that a folder of any size can be read.

    Args:
        parts: folders or files; one that is not there adds nothing.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        files = (
            sorted(p for p in part.rglob("*") if p.suffix in _WEIGHTS) if part.is_dir() else [part]
        )
        for file in (file for file in files if file.is_file()):
            size = file.stat().st_size
            name = file.name if part.is_file() else file.relative_to(part)
            digest.update(f"{part.name}/{name}:{size}\0".encode())
            with file.open("rb") as stream:
                for block in range(_BLOCKS):
                    stream.seek(max(0, size - _BLOCK) * block // (_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK))
                    if size <= _BLOCK:
                        break
    return digest.hexdigest()


def _takes_shapes(config: dict[str, Any]) -> bool:
    data = _shapes()
    return (
        config.get("in_channels") == data.latent_shape[1]
        and config.get("text_dim") == data.text_shape[1]
    )


@lru_cache(maxsize=1)
def _shapes() -> SyntheticVideos:
    return SyntheticVideos()


def _seed_of_run(folder: Path) -> int:
    """Read the seed of the run of ``anyflow demo`` that a checkpoint lies in; 0 without a run."""
    state = folder.resolve().parent.parent / "state.json"
    if not state.is_file():
        return 0
    content = read_json(state)
    config = content.get("config") if isinstance(content, dict) else None
    seed = config.get("seed") if isinstance(config, dict) else None
    return seed if type(seed) is int and seed >= 0 else 0


def split_model_name(text: str) -> tuple[str, str]:
    """Split ``NAME=PATH``.

    A bare path is named after its folder, and a name on the Hub after its last part.

    Raises:
        ValueError: a folder could not have the name.
    """
    name, equals, path = text.partition("=")
    if not equals or "/" in name or os.path.exists(text):
        name, path = "", text
    if not path.strip():
        raise ValueError(
            f"--model must name a folder, or a model on the Hugging Face Hub, got {text!r}"
        )
    if not name.strip():
        name = (Path(path).resolve() if os.path.isdir(path) else Path(path.partition("@")[0])).name
    return check_model_name(name.strip()), path
