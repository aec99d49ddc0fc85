"""Run ``anyflow sample``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli import options
from anyflow.cli.common import fail, stopped

if TYPE_CHECKING:
    from anyflow.pipelines.render import SampleReport
    from anyflow.pipelines.sample_settings import SampleSettings


def sample(
    model: Annotated[
        str,
        typer.Option(
            help="Diffusers folder, or a name on the Hugging Face Hub.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the videos; a video that it has is not made again.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str],
        typer.Option(help="VideoPrompt of a video; may be repeated.", show_default=False),
    ] = [],  # noqa: B006 (typer makes a new one)
    prompts: options.PromptsFile = None,
    steps: options.Steps = "1,2,4,8,16,32",
    seed: Annotated[
        list[str],
        typer.Option(
            metavar="INTEGERS",
            help="Seed of the noise, the same for each number of steps; several with commas, or "
            "repeated.",
        ),
    ] = ["0"],  # noqa: B006
    transformer: options.Transformer = None,
    lora: options.LoRA = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture that the videos begin with (models trained with i2v_prob)."),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(help="Video file whose first frames the videos begin with and continue."),
    ] = None,
    video_frames: Annotated[
        int | None,
        typer.Option(
            help="Frames of --video to keep, 4k + 1; all if left out, at most half of --num-frames."
        ),
    ] = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    euler: options.Euler = False,
    fps: options.FPS = None,
    memory: options.Memory = "auto",
    dtype: options.Dtype = None,
    device: options.Device = None,
    compile: options.Compile = False,
    cuda_graph: options.CudaGraph = False,
) -> None:
    """Make videos of prompts at several numbers of steps from the same noise, side by side."""
    from rich.console import Console

    settings = options.given(
        transformer=transformer,
        lora=lora,
        height=height,
        width=width,
        num_frames=num_frames,
        guidance_scale=guidance,
        negative_prompt=negative_prompt,
        fps=fps,
        dtype=dtype,
    )
    try:
        from anyflow.pipelines.prompts import VideoPrompt, read_prompts
        from anyflow.pipelines.render import parse_numbers, sample_command
        from anyflow.pipelines.sample_settings import SampleSettings

        checked, first_frames = _with_first_frames(
            SampleSettings(model, euler=euler, **settings), image, video, video_frames
        )
        report = sample_command(
            checked,
            [*map(VideoPrompt, prompt), *([] if prompts is None else read_prompts(prompts))],
            parse_numbers("steps", steps),
            out,
            seeds=parse_numbers("seed", ",".join(seed), low=0),
            first_frames=first_frames,
            memory=memory,
            device=device,
            compile=compile,
            cuda_graph=cuda_graph,
            console=Console(highlight=False, soft_wrap=True),
        )
    except (ValueError, ImportError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        stopped("The same command continues from here.")
    _print(report, out)
    raise typer.Exit(1 if report.failed else 0)


def _with_first_frames(
    settings: SampleSettings, image: Path | None, video: Path | None, video_frames: int | None
) -> tuple[SampleSettings, Any]:
    """Check the settings, and return them with the first frames that they name."""
    from anyflow.data.first_frames import read_first_frames, read_image

    if video_frames is not None and video is None:
        raise ValueError("--video-frames is the number of frames of --video, which is missing")
    settings = replace(
        settings,
        image=None if image is None else str(image),
        video=None if video is None else str(video),
    )
    settings.check()  # before a file is read at a size that is not possible
    size = {"height": settings.height, "width": settings.width}
    if video is not None:
        frames = read_first_frames(
            video, video_frames, num_frames=settings.num_frames, fps=settings.fps, **size
        )
        return replace(settings, video_frames=len(frames)), frames
    return settings, None if image is None else [read_image(image, **size)]


def _print(report: SampleReport, out: Path) -> None:
    from anyflow.utils.progress import counted

    typer.echo(f"{out}: {counted(report.done, 'video')} made, {report.skipped} there already")
    for failure in report.failed:
        what = (
            "comparison"
            if failure.num_inference_steps is None
            else f"{failure.num_inference_steps} steps"
        )
        typer.echo(
            f"failed: {failure.prompt} ({what}, seed {failure.seed}): {failure.reason}", err=True
        )
