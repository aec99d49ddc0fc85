"""Encode videos and captions into a latent dataset: `anyflow preprocess`."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from anyflow.data.caption_sources import Captions, find_captions
from anyflow.data.captions import MAX_CAPTION, Broken, Caption, Columns, EmptyDatasetError
from anyflow.data.encoders import LatentEncoder, TextEncoder, model_identity
from anyflow.data.latent_dataset import LatentWriter
from anyflow.data.latent_format import (
    INFO_FILE,
    DatasetInfo,
    DatasetRecord,
    check_same,
    read_record,
    remove_empty,
    written_samples,
)
from anyflow.data.video import VideoError, color_conversion, read_video
from anyflow.formats.hub import ENCODERS, local_folder
from anyflow.pipelines.wan import clean_prompt
from anyflow.utils.documents import require_regular_file, shortened, text_problem
from anyflow.utils.locking import locks_folder
from anyflow.utils.versions import differences, installed_versions
from anyflow.utils.writing import write_text

if TYPE_CHECKING:
    from rich.console import Console

BROKEN_FILE = "broken.jsonl"
# What Wan's own code and examples use.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_RECORDED = {"bfloat16": "bf16", "float32": "fp32"}  # as datasets name them


@dataclass(frozen=True)
class PreprocessReport:
    """Report what a run did.

    Args:
        done: number of samples that the run wrote.
        skipped: number of samples that an earlier run had written.
        broken: lines that could not be used; ``broken.jsonl`` has them too.
        captions: the lines that were read.
    """

    done: int
    skipped: int
    broken: tuple[Broken, ...]
    captions: Captions | None = field(default=None, compare=False, repr=False)


class NothingEncodedError(EmptyDatasetError):
    """Report that none of the captioned videos can be used.

    Attributes:
        report: says why, line by line.
    """

    def __init__(self, message: str, report: PreprocessReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class _Settings:
    """Hold what decides the numbers of a dataset beside the videos and the model."""

    num_frames: int
    height: int
    width: int
    fps: float
    negative_prompt: str
    text_length: int
    dtype: Literal["bf16", "fp32"]

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "fps", "text_length"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        problem = text_problem(self.negative_prompt, max_characters=MAX_CAPTION)
        if problem is not None:
            raise ValueError(f"negative_prompt {problem}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_RECORDED)}, got {self.dtype!r}")


@locks_folder("out")
def preprocess(
    videos: Path,
    captions: Path | None,
    model: Path | str,
    out: Path,
    *,
    columns: Columns | None = None,
    num_frames: int = 81,
    height: int = 480,
    width: int = 832,
    fps: float = 16,
    negative_prompt: str = WAN_NEGATIVE_PROMPT,
    text_length: int = 512,
    dtype: Literal["bfloat16", "float32", "bf16", "fp32"] = "bfloat16",
    device: torch.device | str = "cpu",
    num_workers: int = 2,
    samples_per_shard: int = 32,
    allow_outside: bool = False,
    console: Console | None = None,
) -> PreprocessReport:
    """Encode every captioned video into the dataset ``out``, a sample per line, in its order.

    A killed run that is started again continues after the last shard written, and ends with the
    same dataset. Lines that cannot be used are listed in ``broken.jsonl`` and tried again by the
    next run. Where no line can be used, that list is all that is written, and a run with other
    captions, videos or settings can take the same folder. Videos and prompts are encoded one at a
    time: a video fills a GPU, and the numbers do not depend on what is encoded beside it. The
    dataset records the versions of the packages that made it; a run that adds samples with other
    versions warns.

    Args:
        videos: folder of the video files.
        captions: a table or a folder, or None for captions in the folder of videos, see
            :func:`anyflow.data.caption_sources.find_captions`; a file may stand on several lines.
        model: diffusers folder with ``vae``, ``text_encoder`` and ``tokenizer``, or a name on the
            Hugging Face Hub.
        out: folder of the dataset.
        columns: names of the columns of the videos and of the captions, where they are not common
            ones.
        num_frames: 4k + 1 frames from the start of each video.
        height, width: in pixels, multiples of 16 (twice the VAE's spatial factor).
        fps: frames per second that videos are sampled at.
        negative_prompt: what stands for no prompt.
        text_length: tokens after which prompts are cut off, and padded to in training.
        dtype: dtype of the text encoder, ``"bfloat16"`` or ``"float32"``; the VAE runs in fp32.
        device: device of both encoders.
        num_workers: threads that decode ahead.
        samples_per_shard: samples that a kill can cost.
        allow_outside: take files that lie outside ``videos``, by their name or through a symbolic
            link.
        console: gets a progress bar.

    Raises:
        ValueError: unusable arguments, model or table of captions as a whole, or ``out`` is in use,
            was made with other settings or is damaged.
        EmptyDatasetError: no videos or no captions were found.
        NothingEncodedError: none of the captioned videos can be used; samples of earlier runs stay.
        OSError: the system refuses to write, such as on a full disk; the shards that were finished
            are there.
    """
    recorded = _RECORDED.get(dtype, dtype)
    settings = _Settings(num_frames, height, width, fps, negative_prompt, text_length, recorded)  # type: ignore[arg-type]
    if not videos.is_dir():
        raise ValueError(f"videos must be a folder, got {videos}")
    model = local_folder(model, ENCODERS)
    if num_workers < 1:
        raise ValueError(f"num_workers must be >= 1, got {num_workers}")
    found = find_captions(captions, videos, Columns() if columns is None else columns)
    broken = [line for line in found.lines if isinstance(line, Broken)]
    lines = [line for line in found.lines if isinstance(line, Caption)]
    source = {**asdict(settings), "model": model_identity(model)}
    packages = {**installed_versions(), **color_conversion()}
    earlier, written = _earlier_run(out, source)
    broken += _unusable(lines, videos, allow_outside)
    faulty = {entry.line for entry in broken}
    todo = [
        line
        for line in lines
        if line.line not in faulty and (line.file, line.caption) not in written
    ]
    skipped = len(found.lines) - len(broken) - len(todo)
    unfinished = bool(written) and earlier is not None and earlier.num_samples is None
    if todo or unfinished:
        if todo and written and earlier is not None:
            _warn_of_versions(out, earlier.packages, packages)
        video_encoder = LatentEncoder(model, torch.device(device))
        text_encoder = TextEncoder(
            model, torch.device(device), dtype=_DTYPES[recorded], text_length=text_length
        )
        info = _info(settings, source, video_encoder, text_encoder)
        decode = partial(read_video, num_frames=num_frames, height=height, width=width, fps=fps)
        with (
            LatentWriter(
                out,
                info,
                text_encoder(negative_prompt),
                samples_per_shard=samples_per_shard,
                packages=packages,
            ) as writer,
            ThreadPoolExecutor(num_workers) as pool,
        ):
            decoded = _decoded_ahead(pool, todo, videos, decode, num_workers)
            for line, video in _with_progress(decoded, todo, console):
                try:
                    _encode(writer, line, video, video_encoder, text_encoder)
                except VideoError as error:
                    broken.append(Broken(line.line, line.file, str(error)))
            writer.finish()
    return _report(out, found, broken, skipped)


def _encode(
    writer: LatentWriter,
    line: Caption,
    video: Future[Tensor],
    video_encoder: LatentEncoder,
    text_encoder: TextEncoder,
) -> None:
    """Add one video and its caption to the dataset, or raise a VideoError."""
    if not clean_prompt(line.caption):
        raise VideoError("the caption is empty once it is cleaned")
    latents = _finite(video_encoder(video.result()), "latents")
    tokens = _finite(text_encoder(line.caption), "prompt")
    writer.add(line.file, line.caption, latents, tokens)


def _report(out: Path, found: Captions, broken: list[Broken], skipped: int) -> PreprocessReport:
    """Write ``broken.jsonl`` and return what the run did, or raise a NothingEncodedError."""
    broken.sort(key=lambda entry: entry.line)
    lines = [json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in broken]
    write_text(out / BROKEN_FILE, "".join(lines))
    done = len(found.lines) - len(broken) - skipped
    report = PreprocessReport(done, skipped, tuple(broken), found)
    if done + skipped == 0:
        remove_empty(out)
        first = broken[0]
        raise NothingEncodedError(
            f"none of the {len(broken)} captioned videos of {shortened(found.source)} can be used, "
            f"the first because: {found.place(first)}: {first.reason}; "
            f"{shortened(out / BROKEN_FILE)} lists all",
            report,
        )
    return report


def _earlier_run(
    out: Path, source: dict[str, Any]
) -> tuple[DatasetRecord | None, set[tuple[str, str]]]:
    """Return what ``out`` says of itself, and the samples that it holds already."""
    if not os.path.lexists(out / INFO_FILE) or remove_empty(out):
        return None, set()
    record = read_record(out)
    check_same(out, record.info.source, source)
    return record, set(written_samples(out))


def _warn_of_versions(
    out: Path, before: Mapping[str, list[str | None]] | None, packages: dict[str, str | None]
) -> None:
    if before is None:
        what = "does not say which versions made its samples, nor whether ftfy cleaned its prompts"
    else:
        changed = [
            line
            for name in before
            if name in packages
            for line in _changes(name, before[name], packages[name])
        ]
        if not changed:
            return
        what = f"was begun with other versions ({'; '.join(changed)})"
    warnings.warn(
        f"{out} {what}: new samples may differ from those that are there; choose another folder to "
        "keep them alike",
        stacklevel=3,
    )


def _changes(name: str, before: list[str | None], now: str | None) -> list[str]:
    return [line for version in before for line in differences({name: version}, {name: now})]


def _unusable(lines: Sequence[Caption], videos: Path, allow_outside: bool) -> list[Broken]:
    """Return the lines that can be seen to be of no use without opening a video."""
    broken = []
    first: dict[tuple[str, str], int] = {}
    root = os.path.realpath(videos)
    for line in lines:
        earlier = first.setdefault((line.file, line.caption), line.line)
        if earlier != line.line:
            broken.append(
                Broken(line.line, line.file, f"the same file and caption as line {earlier}")
            )
        elif (reason := _misplaced(videos, root, line.file, allow_outside)) is not None:
            broken.append(Broken(line.line, line.file, reason))
    return broken


def _misplaced(videos: Path, root: str, file: str, allow_outside: bool) -> str | None:
    """Say why a file is not one of the folder's, or return None where it is."""
    path = videos / file
    if not allow_outside and os.path.commonpath([root, os.path.realpath(path)]) != root:
        return f"it lies outside the folder {videos} (--allow-outside takes such files)"
    try:
        require_regular_file(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{shortened(path)} ")
        return f"it is not in {videos}" if reason == "does not exist" else reason
    return None


def _info(
    settings: _Settings,
    source: dict[str, Any],
    video_encoder: LatentEncoder,
    text_encoder: TextEncoder,
) -> DatasetInfo:
    time, space = video_encoder.temporal_factor, video_encoder.spatial_factor
    if settings.num_frames % time != 1:
        raise ValueError(f"num_frames must be {time}k + 1, got {settings.num_frames}")
    for name, size in (("height", settings.height), ("width", settings.width)):
        if size % (2 * space):  # the transformer's patches are 2 x 2
            raise ValueError(f"{name} must be a multiple of {2 * space}, got {size}")
    shape = (
        settings.num_frames // time + 1,
        video_encoder.channels,
        settings.height // space,
        settings.width // space,
    )
    normalization = {
        "latents_mean": video_encoder.latents_mean,
        "latents_std": video_encoder.latents_std,
    }
    return DatasetInfo(
        shape, settings.text_length, text_encoder.text_dim, {**source, **normalization}
    )


def _decoded_ahead(
    pool: ThreadPoolExecutor,
    lines: Sequence[Caption],
    videos: Path,
    decode: Callable[[Path], Tensor],
    ahead: int,
) -> Iterator[tuple[Caption, Future[Tensor]]]:
    """Yield every line with its video, while the next ``ahead`` videos are decoded."""
    rest = iter(lines)
    pending: deque[tuple[Caption, Future[Tensor]]] = deque()
    while True:
        pending.extend(
            (line, pool.submit(decode, videos / line.file))
            for line in islice(rest, 1 + ahead - len(pending))
        )
        if not pending:
            return
        yield pending.popleft()


def _finite(values: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise VideoError(f"its {name} come out as NaN or infinity")
    return values


def _with_progress(
    items: Iterator[tuple[Caption, Future[Tensor]]],
    todo: Sequence[Caption],
    console: Console | None,
) -> Iterator[tuple[Caption, Future[Tensor]]]:
    """Yield the items, and show how many of them are done."""
    if console is None:
        yield from items
        return
    from anyflow.utils.progress import LoggedProgress

    with LoggedProgress(*LoggedProgress.get_default_columns(), console=console) as bars:
        task = bars.add_task("encoding", total=len(todo))
        for item in items:
            yield item
            bars.update(task, advance=1)
