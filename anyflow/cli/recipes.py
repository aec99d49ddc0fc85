"""Run ``anyflow recipes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anyflow.cli.common import fail


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe to print or copy.", show_default=False)
    ] = None,
    dest: Annotated[
        Path | None,
        typer.Argument(help="With --copy: folder, or new .yaml file.", show_default="this folder"),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the recipe, to change it; nothing is replaced.")
    ] = False,
) -> None:
    """List the recipes that come with anyflow, print one, or copy one to change it."""
    from anyflow import recipes as shipped

    try:
        if name is None:
            if copy:
                raise ValueError("--copy needs the name of a recipe; `anyflow recipes` lists them")
            width = max(map(len, shipped.names()))
            for each in shipped.names():
                typer.echo(f"{each:{width}}  {shipped.summary(each)}")
            typer.echo(
                "\nPrint one: anyflow recipes NAME. Copy it, to change it: anyflow recipes --copy "
                "NAME."
            )
            typer.echo("Train by it: anyflow train NAME.")
            return
        file = shipped.require(name)
        if not copy:
            if dest is not None:
                raise ValueError(f"{str(dest)!r} is where to copy a recipe to: add --copy")
            typer.echo(file.read_text(encoding="utf-8"), nl=False)
            return
        target = shipped.copy(file.stem, Path() if dest is None else dest)
    except ValueError as error:
        fail(str(error))
    typer.echo(f"Copied to {target}. Change it, then: anyflow train {target}")
