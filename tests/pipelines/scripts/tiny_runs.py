"""Run `anyflow sample` at the size of the tiny model."""

from pathlib import Path
from typing import Any

import av

from anyflow.pipelines.render import SampleReport, sample_command
from anyflow.pipelines.sample_settings import SampleSettings

PROMPTS = ["a red disc moves slowly", "a blue cross: stops!"]
STEPS = (1, 2, 4)


def run(
    settings: SampleSettings, out: Path, prompts=PROMPTS, steps=STEPS, seeds=(3,), **options: Any
) -> SampleReport:
    return sample_command(settings, prompts, steps, out, seeds=seeds, device="cpu", **options)


def folder_of(out: Path, start: str) -> Path:
    (folder,) = out.glob(f"{start}-*")
    return folder


def probe(path: Path) -> tuple[int, int, int, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return len(frames), stream.height, stream.width, float(stream.average_rate)
