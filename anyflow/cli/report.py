"""Run ``anyflow report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anyflow.cli.common import fail


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of finished runs of `anyflow demo`.", metavar="RUN..."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("runs/report"),
) -> None:
    """Make one report of demo runs with different seeds, with error bars.

    Each seed needs a run, as by `anyflow demo --seed 1 --out runs/demo-1`, all of one budget.
    """
    from anyflow.demo.results import REPORT_FILE, merge_runs
    from anyflow.evaluation import takeaway

    try:
        results = merge_runs(runs, out)
    except ValueError as error:
        fail(str(error))
    typer.echo(f"{takeaway(results)}\nReport: {(out / REPORT_FILE).resolve()}")
