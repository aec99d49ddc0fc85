"""Assemble the command line ``anyflow …``; a user's mistake is one line and exit status 2.

Each command has a module of its own or shares one; modules that load torch are imported when a
command runs.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer

import anyflow
from anyflow.cli import (
    checkpoints,
    demo,
    doctor,
    evaluate,
    preprocess,
    recipes,
    report,
    sample,
    train,
)
from anyflow.cli.common import full_dtype_name
from anyflow.cli.errors import Commands, finish_streams, prepare_streams
from anyflow.cli.examples import EPILOGS, MAIN
from anyflow.utils.threads import configure_openmp

app = typer.Typer(
    name="anyflow",
    cls=Commands,
    help="Any-step video diffusion with flow maps.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    epilog=MAIN,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": full_dtype_name,
    },
)


def main() -> None:
    """Run the ``anyflow`` command and exit with its status; a warning is one line."""
    configure_openmp()
    standard = warnings.formatwarning

    def one_line(message: Any, category: type[Warning], *where: Any, **more: Any) -> str:
        ours = category is UserWarning and "\n" not in str(message)
        return (
            f"anyflow: warning: {message}\n"
            if ours
            else standard(message, category, *where, **more)
        )

    warnings.formatwarning = one_line
    prepare_streams()
    try:
        app(prog_name="anyflow")  # for `python -m anyflow` too: a shell completes commands by name
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise SystemExit(finish_streams(status)) from None


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"anyflow {anyflow.__version__}")
        raise typer.Exit


for _command in (
    demo.demo,
    report.report,
    sample.sample,
    evaluate.evaluate,
    train.train,
    recipes.recipes,
    train.export,
    preprocess.preprocess,
    checkpoints.inspect,
    checkpoints.convert,
    checkpoints.verify,
    doctor.doctor,
):
    # An option that `train` does not have is a setting in another form, which the command corrects.
    app.command(
        epilog=EPILOGS[_command.__name__],
        context_settings={"ignore_unknown_options": _command is train.train},
    )(_command)
