"""Run ``anyflow train`` and ``anyflow export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from anyflow.cli.common import fail, stopped
from anyflow.cli.settings import settings_problem


def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="YAML file, or a name that `anyflow recipes` lists.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings in place of the file's.", show_default=False
        ),
    ] = [],  # noqa: B006 (typer makes a new one)
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole recipe and exit.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Continue from the newest checkpoint of the run.")
    ] = True,
) -> None:
    """Train a model by a recipe, on many GPUs under torchrun.

    The same command continues a run that was stopped.
    """
    try:
        if (problem := settings_problem([str(recipe), *overrides])) is not None:
            fail(problem)
        from anyflow.training import recipe as recipes

        if print_config:
            typer.echo(recipes.print_config(recipe, overrides), nl=False)
            return
        settings = recipes.load_recipe(recipe, overrides)

        from rich.console import Console

        from anyflow.training.trainer import train

        train(settings, resume=resume, console=Console(highlight=False, soft_wrap=True))
    except (ValueError, ImportError) as error:
        fail(str(error))
    except FloatingPointError as error:  # the training's own doing, not the user's
        fail(str(error), status=1)
    except KeyboardInterrupt:
        stopped("The same command continues after the newest checkpoint.")


def export(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="New folder for the model.", show_default=False)],
    weights: Annotated[
        Literal["ema", "raw"],
        typer.Option(help="The average of the weights, or the weights themselves."),
    ] = "ema",
    lora: Annotated[
        Literal["merged", "separate"],
        typer.Option(help="Adapters merged into the weights, or in out/lora."),
    ] = "merged",
    format: Annotated[
        Literal["diffusers", "comfyui"] | None,
        typer.Option(
            help="Format of separate adapters; diffusers if left out.", show_default=False
        ),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint; the newest one if left out.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder, or name on the Hugging Face Hub, of the pipeline whose VAE, text encoder "
            "and tokenizer make OUT a whole pipeline.",
            show_default=False,
        ),
    ] = None,
    copy: Annotated[
        bool,
        typer.Option(
            "--copy", help="Copy the parts of --base; else OUT has links, and the base must stay."
        ),
    ] = False,
) -> None:
    """Write the model of a training checkpoint as a folder for diffusers.

    With --base the folder is a whole pipeline:

    anyflow export runs/dmd student --base nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers
    """
    from anyflow.training.export import export

    try:
        folder = export(
            run, out, weights=weights, lora=lora, format=format, step=step, base=base, copy=copy
        )
    except (ValueError, ImportError) as error:
        fail(str(error))
    typer.echo(f"The model is {folder}")
