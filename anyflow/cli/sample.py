"""``anyflow sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from anyflow.cli.common import DtypeName, fail


def sample(
    model: Annotated[
        str,
        typer.Option(
            help="Diffusers folder, or a name on the Hugging Face Hub.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for the videos; what it has is skipped.", show_default=False),
    ],
    prompt: Annotated[
        list[str], typer.Option(help="May be given several times.", show_default=False)
    ] = [],  # noqa: B006 (typer makes a new one)
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with a prompt on each line, or .csv or .jsonl with prompt and "
            "negative_prompt.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        str, typer.Option(help="Step counts, with commas between them.")
    ] = "1,2,4,8,16,32",
    seed: Annotated[
        list[str],
        typer.Option(
            metavar="INTEGERS",
            help="Of the noise, the same at each step count; several with commas, or repeated.",
        ),
    ] = ["0"],  # noqa: B006
    transformer: Annotated[
        str | None,
        typer.Option(
            help="Folder or name with another transformer and its scheduler, as training leaves it."
        ),
    ] = None,
    lora: Annotated[str | None, typer.Option(help="LoRA file or folder to merge.")] = None,
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 832,
    num_frames: Annotated[int, typer.Option(help="4k + 1.")] = 81,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture that the videos begin with (models trained with i2v_prob)."),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(
            help="Video file whose first frames the videos begin with, to go on from them."
        ),
    ] = None,
    video_frames: Annotated[
        int | None,
        typer.Option(
            help="Frames of --video to keep, 4k + 1; if left out all, at most half of --num-frames."
        ),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 1.0,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="With guidance, of prompts without one of their own; empty if left out."),
    ] = None,
    euler: Annotated[
        bool,
        typer.Option(
            "--euler", help="Plain Euler steps (r = t), for a plain Wan model or a teacher."
        ),
    ] = False,
    fps: Annotated[float, typer.Option(help="Frames per second of the files.")] = 16,
    memory: Annotated[
        Literal["auto", "fast", "low", "stream"],
        typer.Option(
            help="On the device: all (fast), one part at a time (low), or a block at a time "
            "(stream)."
        ),
    ] = "auto",
    dtype: Annotated[
        DtypeName, typer.Option(help="Of the transformer and the text encoder.")
    ] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="Torch device; a GPU if there is one.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer's blocks.")
    ] = False,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Replay evaluations from a CUDA graph.")
    ] = False,
) -> None:
    """Make videos of prompts at several step counts from the same noise, and show them side by
    side.
    """
    from dataclasses import replace

    from rich.console import Console

    try:
        from anyflow.data.context import read_first_frames, read_image
        from anyflow.pipelines.prompts import Prompt, read_prompts
        from anyflow.pipelines.render import parse_numbers, sample_command
        from anyflow.pipelines.sample_settings import SampleSettings

        if video_frames is not None and video is None:
            raise ValueError("--video-frames is the number of frames of --video, which is missing")
        settings = SampleSettings(
            model=model,
            transformer=transformer,
            lora=lora,
            height=height,
            width=width,
            num_frames=num_frames,
            guidance_scale=guidance,
            negative_prompt=negative_prompt,
            fps=fps,
            dtype=dtype,
            euler=euler,
            image=None if image is None else str(image),
            video=None if video is None else str(video),
        )
        settings.check()  # before a file is read at a size that cannot be
        context = None if image is None else [read_image(image, height, width)]
        if video is not None:
            context = read_first_frames(
                video, video_frames, num_frames=num_frames, height=height, width=width, fps=fps
            )
            settings = replace(settings, video_frames=len(context))
        report = sample_command(
            settings,
            [*map(Prompt, prompt), *(read_prompts(prompts) if prompts is not None else [])],
            parse_numbers("steps", steps),
            out,
            seeds=parse_numbers("seed", ",".join(seed), low=0),
            context=context,
            memory=memory,
            device=device,
            compile=compile,
            cuda_graph=cuda_graph,
            console=Console(highlight=False, soft_wrap=True),
        )
    except (ValueError, ImportError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        typer.echo("\nStopped. The same command goes on where it was.", err=True)
        raise typer.Exit(130) from None
    made = "1 video" if report.done == 1 else f"{report.done} videos"
    typer.echo(f"{out}: {made} made, {report.skipped} there already")
    for failure in report.failed:
        what = "comparison" if failure.steps is None else f"{failure.steps} steps"
        typer.echo(
            f"failed: {failure.prompt} ({what}, seed {failure.seed}): {failure.reason}", err=True
        )
    raise typer.Exit(1 if report.failed else 0)
