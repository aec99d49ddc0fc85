"""Run ``anyflow preprocess``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from anyflow.cli import options
from anyflow.cli.common import fail, stopped

if TYPE_CHECKING:
    from anyflow.data.preprocess import PreprocessReport

_LISTED = 20  # videos left out that are printed; broken.jsonl has all


def preprocess(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the dataset; a killed run in it is continued.", show_default=False
        ),
    ],
    videos: Annotated[
        Path | None, typer.Option(help="Folder of the video files.", show_default=False)
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            help="Table (.csv, .tsv, .jsonl, .json) of files and captions, or a folder; the folder "
            "of videos if left out. A folder has metadata.csv or its like, videos.txt and "
            "prompts.txt, or a .txt for each video.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Diffusers folder with vae, text_encoder and tokenizer, or a name on the Hub.",
            show_default=False,
        ),
    ] = None,
    file_column: Annotated[
        str | None,
        typer.Option(help="Column of the files; file, file_name, video and their like are found."),
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Column of the captions; caption, text and prompt are found.")
    ] = None,
    num_frames: Annotated[int, typer.Option(help="Frames of each video, 4k + 1.")] = 81,
    height: options.Pixels = 480,
    width: options.Pixels = 832,
    fps: Annotated[float, typer.Option(help="Frames per second that videos are sampled at.")] = 16,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="Prompt that stands for no prompt; Wan's own if left out."),
    ] = None,
    text_length: Annotated[
        int, typer.Option(help="Number of tokens that prompts are cut off or padded to.")
    ] = 512,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Dtype of the text encoder.")
    ] = "bfloat16",
    device: Annotated[
        str | None,
        typer.Option(help="Torch device to encode on; a GPU if torch finds one."),
    ] = None,
    num_workers: Annotated[int, typer.Option(help="Number of threads that decode ahead.")] = 2,
    allow_outside: Annotated[
        bool,
        typer.Option(
            "--allow-outside", help="Take files outside the folder of videos, also through links."
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Only compare --out with its digests; exit status 1 if a sample differs.",
        ),
    ] = False,
) -> None:
    """Encode videos and captions into a dataset of latents for training, or verify one."""
    from rich.console import Console

    if verify:
        _verify_dataset(out)
        return
    for name, value in (("videos", videos), ("model", model)):
        if value is None:
            fail(f"--{name} is missing; only --verify does without it")
    assert videos is not None and model is not None
    try:
        from anyflow.data.captions import Columns, EmptyDatasetError
        from anyflow.data.preprocess import WAN_NEGATIVE_PROMPT, NothingEncodedError, preprocess
        from anyflow.utils.devices import resolve_device
    except ImportError as error:
        fail(str(error))
    try:
        console = Console(highlight=False, soft_wrap=True)
        report = preprocess(
            videos,
            captions,
            model,
            out,
            columns=Columns(file_column, caption_column),
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            negative_prompt=WAN_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt,
            text_length=text_length,
            dtype=dtype,
            device=str(resolve_device(device)),
            num_workers=num_workers,
            allow_outside=allow_outside,
            console=console,
        )
    except EmptyDatasetError as error:
        if isinstance(error, NothingEncodedError):
            _list_broken(error.report, out)
        fail(str(error), status=1)
    except (ValueError, ImportError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        stopped("The same command continues after the last finished shard.")
    console.print(f"{out}: {report.done} videos encoded, {report.skipped} were there already")
    _list_broken(report, out)
    typer.echo(
        f"Train on them: anyflow train anyflow_pretrain_t2v {shlex.quote(f'data.path={out}')}"
    )


def _list_broken(report: PreprocessReport, out: Path) -> None:
    """Print a line for each video that was left out, up to ``_LISTED`` of them."""
    assert report.captions is not None
    for entry in report.broken[:_LISTED]:
        typer.echo(f"left out: {report.captions.place(entry)}: {entry.reason}")
    if len(report.broken) > _LISTED:
        typer.echo(
            f"left out: {len(report.broken) - _LISTED} more, which {out / 'broken.jsonl'} lists"
        )


def _verify_dataset(folder: Path) -> NoReturn:
    try:
        from anyflow.data.latent_dataset import damages

        found = damages(folder)
    except (ValueError, ImportError) as error:
        fail(str(error), status=1 if (folder / "dataset.json").is_file() else 2)
    for damage in found:
        typer.echo(f"damaged: {damage}", err=True)
    if not found:
        typer.echo(f"{folder}: every sample is what was written")
    raise typer.Exit(1 if found else 0)
