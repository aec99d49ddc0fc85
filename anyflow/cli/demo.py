"""Run ``anyflow demo``."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Literal

import typer

from anyflow.cli.common import fail, stopped


def demo(
    budget: Annotated[
        Literal["full", "fast"],
        typer.Option(help="Minutes of training with a clear result (full), or about one (fast)."),
    ] = "full",
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of the run; a killed run in it is resumed.")
    ] = Path("runs/demo"),
    device: Annotated[str, typer.Option(help="Torch device to train on.")] = "cpu",
    open_report: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the report in a browser.")
    ] = True,
) -> None:
    """Train a small video model and see it sample at any number of steps."""
    from rich.console import Console

    from anyflow.demo import REPORT_FILE, DemoConfig, DemoProgress, finished_report, run_demo
    from anyflow.evaluation import takeaway

    console = Console(highlight=False, soft_wrap=True)
    try:
        if seed < 0:
            raise ValueError(f"--seed must be >= 0, got {seed}")
        config = DemoConfig.for_budget(budget, seed, device)
        if (finished := finished_report(config, out)) is not None:
            console.print(f"{out} already holds a finished run; its report is {finished.resolve()}")
            console.print("To run again, name another --out or delete the folder.")
        else:
            console.print(f"Training a small video model from scratch; everything goes to {out}")
            with DemoProgress(console) as progress:
                results = run_demo(config, out, progress)
            console.print(f"\n{takeaway(results)}\nReport: {(out / REPORT_FILE).resolve()}")
    except ValueError as error:
        fail(str(error))
    except FloatingPointError as error:  # a student that diverged
        fail(str(error), status=1)
    except KeyboardInterrupt:
        stopped("The same command continues from here.")
    if open_report and sys.stdout is not None and sys.stdout.isatty() and _has_browser():
        webbrowser.open((out / REPORT_FILE).resolve().as_uri())


def _has_browser() -> bool:
    """Tell whether a graphical browser can be shown; a text browser would fill the terminal."""
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
