"""Run ``anyflow doctor``."""

from __future__ import annotations

from typing import Annotated

import typer

from anyflow.cli.common import fail


def doctor(
    device: Annotated[
        str | None, typer.Option(help="Torch device to check; a GPU if torch finds one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what is installed, built and would run, and check every operator.

    The exit status is 1 if a check fails.
    """
    try:
        from anyflow.doctor import run
    except ImportError as error:  # without torch nothing can be examined
        fail(
            "anyflow doctor cannot begin: "
            f"{error}{f': pip install {error.name}' if error.name else ''}",
            status=1,
        )
    try:
        well = run(device, as_json=as_json)
    except ValueError as error:
        fail(str(error))
    raise typer.Exit(0 if well else 1)
