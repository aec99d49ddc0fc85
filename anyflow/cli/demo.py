"""Run ``anyflow demo``."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from anyflow.cli.common import fail, stopped

if TYPE_CHECKING:
    from rich.console import Console


def demo(
    budget: Annotated[
        Literal["full", "fast"],
        typer.Option(help="Minutes of training with a clear result (full), or about one (fast)."),
    ] = "full",
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; a killed run in it is resumed.",
            show_default="runs/demo; with --causal runs/demo-causal",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device to train on.")] = "cpu",
    causal: Annotated[
        bool,
        typer.Option(
            "--causal",
            help="Train a causal model on the clips, and make clips six times as long with it, "
            "chunk by chunk. Flow matching that --out has of the other demo is used.",
        ),
    ] = False,
    open_report: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the report in a browser.")
    ] = True,
) -> None:
    """Train a small video model and see it sample at any number of steps."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if out is None:
        out = Path("runs/demo-causal" if causal else "runs/demo")
    try:
        if seed < 0:
            raise ValueError(f"--seed must be >= 0, got {seed}")
        report = (_causal_demo if causal else _demo)(budget, seed, device, out, console)
    except ValueError as error:
        fail(str(error))
    except FloatingPointError as error:  # a student that diverged
        fail(str(error), status=1)
    except KeyboardInterrupt:
        stopped("The same command continues from here.")
    if open_report and sys.stdout is not None and sys.stdout.isatty() and _has_browser():
        webbrowser.open(report.resolve().as_uri())


def _demo(budget: str, seed: int, device: str, out: Path, console: Console) -> Path:
    """Make the run unless it is there, and return its report."""
    from anyflow.demo import REPORT_FILE, DemoConfig, DemoProgress, finished_report, run_demo
    from anyflow.evaluation import takeaway

    config = DemoConfig.for_budget(budget, seed, device)
    if (finished := finished_report(config, out)) is not None:
        return _already_there(finished, out, console)
    console.print(f"Training a small video model from scratch; everything goes to {out}")
    with DemoProgress(console) as progress:
        results = run_demo(config, out, progress)
    console.print(f"\n{takeaway(results)}\nReport: {(out / REPORT_FILE).resolve()}")
    return out / REPORT_FILE


def _causal_demo(budget: str, seed: int, device: str, out: Path, console: Console) -> Path:
    """Make the causal run unless it is there, and return its report."""
    from anyflow.demo import (
        CAUSAL_REPORT_FILE,
        CausalDemoConfig,
        DemoProgress,
        causal_takeaway,
        finished_causal_report,
        run_causal_demo,
    )

    config = CausalDemoConfig.for_budget(budget, seed, device)
    if (finished := finished_causal_report(config, out)) is not None:
        return _already_there(finished, out, console)
    console.print(f"Training a small causal model from scratch; everything goes to {out}")
    with DemoProgress(console) as progress:
        results = run_causal_demo(config, out, progress)
    console.print(f"\n{causal_takeaway(results)}\nReport: {(out / CAUSAL_REPORT_FILE).resolve()}")
    return out / CAUSAL_REPORT_FILE


def _already_there(report: Path, out: Path, console: Console) -> Path:
    console.print(f"{out} already holds a finished run; its report is {report.resolve()}")
    console.print("To run again, name another --out or delete the folder.")
    return report


def _has_browser() -> bool:
    """Tell whether a graphical browser can be shown; a text browser would fill the terminal."""
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
