"""Run ``anyflow sample``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli import options
from anyflow.cli.common import fail, stopped
from anyflow.utils.documents import shortened

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
        typer.Option(help="Prompt of a video; may be repeated.", show_default=False),
    ] = [],  # noqa: B006 (typer makes a new one)
    prompts: options.PromptsFile = None,
    steps: Annotated[
        str,
        typer.Option(
            help="Numbers of sampling steps, with commas between them; for a causal model also "
            "8+2, which is 8 steps for the first chunk and 2 for each later one."
        ),
    ] = "1,2,4,8,16,32",
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
        typer.Option(
            help="Picture that the videos begin with (causal models, and others trained with "
            "i2v_prob)."
        ),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(help="Video file whose first frames the videos begin with and continue."),
    ] = None,
    video_frames: Annotated[
        int | None,
        typer.Option(
            help="Frames of --video to keep, 4k + 1; all if left out, at most half of "
            "--num-frames. They end with a chunk of a causal model."
        ),
    ] = None,
    chunks: options.Chunks = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Write the video of a causal model while it is made: the file can be played after "
            "each chunk.",
        ),
    ] = False,
    switch: Annotated[
        list[str],
        typer.Option(
            metavar="CHUNK:TEXT",
            help="Prompt from a chunk of a causal model on, as 3:'a blue cross' (chunks count "
            "from 0); may be repeated.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    cache_window: Annotated[
        int | None,
        typer.Option(
            help="Most earlier chunks that a causal model keeps compressed, the first and the "
            "latest; all if left out."
        ),
    ] = None,
    cache_device: Annotated[
        str | None,
        typer.Option(
            help="Device that a causal model's keys and values of earlier chunks wait on, as cpu."
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
        cache_window=cache_window,
    )
    try:
        from anyflow.pipelines.prompts import VideoPrompt, read_prompts
        from anyflow.pipelines.render import parse_numbers, sample_command
        from anyflow.pipelines.sample_settings import SampleSettings
        from anyflow.pipelines.step_budgets import parse_steps

        settings |= options.given(
            chunks=options.parse_chunks(chunks), prompt_switches=_parse_switches(switch)
        )
        budgets = parse_steps(steps)
        checked, first_frames = _with_first_frames(
            SampleSettings(model, euler=euler, **settings),
            image,
            video,
            video_frames,
            stream=stream,
            cache_device=cache_device,
        )
        report = sample_command(
            checked,
            [*map(VideoPrompt, prompt), *([] if prompts is None else read_prompts(prompts))],
            budgets,
            out,
            seeds=parse_numbers("seed", ",".join(seed), low=0),
            first_frames=first_frames,
            memory=memory,
            device=device,
            compile=compile,
            cuda_graph=cuda_graph,
            stream=stream,
            cache_device=cache_device,
            console=Console(highlight=False, soft_wrap=True),
        )
    except (ValueError, ImportError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        stopped("The same command continues from here.")
    _print(report, out)
    raise typer.Exit(1 if report.failed else 0)


def _parse_switches(texts: list[str]) -> tuple[tuple[int, str], ...] | None:
    """Parse texts such as ``3:a blue cross``, in the order of their chunks; None without any."""
    switches = []
    for text in texts:
        chunk, colon, prompt = text.partition(":")
        if not (colon and chunk.isascii() and chunk.isdecimal() and len(chunk) < 20):
            raise ValueError(
                "--switch must be the number of a chunk, a colon and a prompt, as "
                f"3:'a blue cross', got {shortened(text)!r}"
            )
        switches.append((int(chunk), prompt.strip()))
    return tuple(sorted(switches)) if switches else None


def _with_first_frames(
    settings: SampleSettings,
    image: Path | None,
    video: Path | None,
    video_frames: int | None,
    **options: Any,
) -> tuple[SampleSettings, Any]:
    """Check the settings, and return them with the first frames that they name."""
    from anyflow.data.first_frames import read_first_frames, read_image

    if video_frames is not None and video is None:
        raise ValueError("--video-frames is the number of frames of --video, which is missing")
    settings = replace(
        settings,
        image=None if image is None else str(image),
        video=None if video is None else str(video),
        video_frames=video_frames,
    )
    settings.check(**options)  # before a file is read at a size that is not possible
    size = {"height": settings.height, "width": settings.width}
    if video is not None:
        frames = read_first_frames(
            video, video_frames, num_frames=settings.num_frames, fps=settings.fps, **size
        )
        if video_frames is None and (plan := settings.chunk_plan()) is not None:
            frames = frames[: plan.most_first_frames(len(frames))]
        return replace(settings, video_frames=len(frames)), frames
    return settings, None if image is None else [read_image(image, **size)]


def _print(report: SampleReport, out: Path) -> None:
    from anyflow.pipelines.step_budgets import budget_text
    from anyflow.utils.progress import counted

    typer.echo(f"{out}: {counted(report.done, 'video')} made, {report.skipped} there already")
    for failure in report.failed:
        steps = failure.num_inference_steps
        what = "comparison" if steps is None else f"{budget_text(steps)} steps"
        typer.echo(
            f"failed: {failure.prompt} ({what}, seed {failure.seed}): {failure.reason}", err=True
        )
