"""``anyflow sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anyflow.cli.common import fail


def sample(
    model: Annotated[
        str, typer.Option(help="Diffusers folder, or a name on the Hugging Face Hub.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the videos; what it has is skipped.", show_default=False)],
    prompt: Annotated[list[str], typer.Option(help="May be given several times.", show_default=False)] = [],  # noqa: B006 (typer makes a new one)
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt on each line.")] = None,
    steps: Annotated[str, typer.Option(help="Step counts, with commas between them.")] = "1,2,4,8,16,32",
    transformer: Annotated[
        str | None, typer.Option(help="Folder with another transformer and its scheduler, as training leaves it.")
    ] = None,
    lora: Annotated[str | None, typer.Option(help="LoRA file or folder to merge.")] = None,
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 832,
    num_frames: Annotated[int, typer.Option(help="4k + 1.")] = 81,
    seed: Annotated[int, typer.Option(help="Of the noise, the same at each step count.")] = 0,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 1.0,
    negative_prompt: Annotated[str | None, typer.Option(help="Needed for guidance.")] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of the files.")] = 16,
    memory: Annotated[
        str, typer.Option(help="'fast' (all on the device), 'low' (in turns), 'stream' or 'auto'.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="'bf16', 'fp16' or 'fp32'.")] = "bf16",
    device: Annotated[str | None, typer.Option(help="Torch device; a GPU if there is one.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay evaluations from a CUDA graph.")] = False,
) -> None:
    """Make videos of prompts at several step counts from the same noise, and show them side by side."""
    from rich.console import Console

    try:
        from anyflow.pipelines.render import SampleSettings, parse_steps, read_prompts, sample_command

        settings = SampleSettings(
            model, transformer, lora, height, width, num_frames, seed, guidance, negative_prompt, fps, dtype
        )
        report = sample_command(
            settings,
            [*prompt, *(read_prompts(prompts) if prompts is not None else [])],
            parse_steps(steps),
            out,
            memory=memory,  # type: ignore[arg-type]
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
        typer.echo(f"failed: {failure.prompt} ({what}): {failure.reason}", err=True)
    raise typer.Exit(1 if report.failed else 0)
