"""Show a few videos of an evaluation inside of a page, as small animations."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from anyflow.evaluation.rendering import data_uri
from anyflow.evaluation.runs.record import EvaluationRecord
from anyflow.pipelines.video import import_av
from anyflow.utils.documents import require_regular_file

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 9 * 2**20  # size of all animations of a page; base64 adds a third
MAX_PROMPTS = 6
# the first prompt is shown whole even if its videos are more
MAX_CLIPS = 120
_MAX_SIDE = 192  # pixels
_MAX_FRAMES = 24
_UNKNOWN_RATE = 8.0  # frames per second of a file that names none
_TINY = 48  # pixels: sides below are shown pixel by pixel, without loss

Clips = Mapping[str, Mapping[int, Sequence[Path]]]


@dataclass(frozen=True)
class PageClip:
    """Hold a video for a page as addresses of an animation and a still picture, or a problem.

    ``tiny`` videos are to be enlarged pixel by pixel.
    """

    moving: str = ""
    still: str = ""
    problem: str = ""
    tiny: bool = False


@dataclass
class ClipGrid:
    """Hold the videos that a page shows.

    Attributes:
        cells: ``[model][prompt][steps]``, prompts by their index.
        prompts: indices of those that are shown.
        left_out: number of videos of these prompts that had no room.
    """

    cells: dict[str, dict[int, dict[int, PageClip]]] = field(default_factory=dict)
    prompts: list[int] = field(default_factory=list)
    left_out: int = 0


def clip_grid(record: EvaluationRecord, clips: Clips, max_bytes: int = MAX_BYTES) -> ClipGrid:
    """Take the first sample of prompts in turn until ``max_bytes`` are full.

    Every model shows each prompt at every step count.

    Args:
        record: record of the evaluation.
        clips: ``[model][steps]``, files prompt by prompt.
        max_bytes: size of all animations together. A further prompt is begun only where as many
            bytes as those of the last one fit.
    """
    grid, used, last = ClipGrid(), 0, 0
    places = [(m, n) for m in record.models for n in record.step_counts if n in clips.get(m, {})]
    if not places:
        return grid
    for prompt in range(min(MAX_PROMPTS, len(record.prompts), max(1, MAX_CLIPS // len(places)))):
        if used + last > max_bytes:
            break
        grid.prompts.append(prompt)
        begin = used
        for model, steps in places:
            files = clips[model][steps]
            index = prompt * record.num_samples
            if index >= len(files):
                continue
            clip, size = _clip(files[index])
            if used + size > max_bytes:
                grid.left_out += 1
                continue
            used += size
            grid.cells.setdefault(model, {}).setdefault(prompt, {})[steps] = clip
        last = used - begin
    return grid


def _clip(path: Path) -> tuple[PageClip, int]:
    """Return a file's animation and its bytes.

    A file that cannot be shown is named and takes no room.
    """
    try:
        frames, milliseconds = _read(path)
    except Exception as error:  # a damaged file can make any part of the decoder fail
        return PageClip(problem=f"{path.name}: {' '.join(str(error).split())[:160]}"), 0
    lossless = max(frames[0].size) <= _TINY
    options = {"lossless": True} if lossless else {"quality": 55}
    moving, still = io.BytesIO(), io.BytesIO()
    frames[0].save(
        moving,
        format="webp",
        save_all=True,
        append_images=frames[1:],
        duration=milliseconds,
        loop=0,
        method=3,
        **options,
    )
    frames[len(frames) // 2].save(still, format="webp", method=3, **options)
    clip = PageClip(data_uri(moving.getvalue()), data_uri(still.getvalue()), tiny=lossless)
    return clip, len(moving.getvalue()) + len(still.getvalue())


def _read(path: Path) -> tuple[list[Image], int]:
    """Return small frames of a file, evenly over its time, and how long each is shown.

    The times are in milliseconds.
    """
    require_regular_file(path)
    with import_av().open(str(path.absolute()), options={"pattern_type": "none"}) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate) if stream.average_rate else _UNKNOWN_RATE
        count, every = stream.frames, 1
        while count > every * _MAX_FRAMES:
            every += 1
        frames = [_small(image) for image in _images(container, every)]
    if not frames:
        raise ValueError("it has no frames")
    return frames[:_MAX_FRAMES], round(1000 * every / rate)


def _images(container: object, every: int) -> Iterator[Image]:
    for index, frame in enumerate(container.decode(video=0)):  # type: ignore[attr-defined]
        if index % every == 0:
            if index // every == _MAX_FRAMES:
                return
            yield frame.to_image()


def _small(image: Image) -> Image:
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return image
