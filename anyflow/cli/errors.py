"""End every command with one line and exit status 1 when the system refuses something."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from anyflow.utils.documents import shortened
from anyflow.utils.writing import system_error


class Commands(TyperGroup):
    """Group commands, report their system errors in one line, and end with 130 on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\nStopped.", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            line = describe(error)
            if line is None:
                raise
            if not _reader_is_gone(error):
                with suppress(OSError):
                    typer.echo(f"anyflow: {line}", err=True)
            raise typer.Exit(1) from None


def describe(error: BaseException) -> str | None:
    """Describe what the system refused, as ``path: reason``; None for another exception."""
    found = system_error(error)
    if found is None:
        if not isinstance(error, OSError):
            return None
        # libraries raise OSError with a text of their own, such as for a model that cannot be found
        text = " ".join(str(error).split())
        return text if text else type(error).__name__
    assert found.errno is not None
    names = [
        shortened(os.fsdecode(n))
        for n in (found.filename, found.filename2)
        if isinstance(n, str | bytes)
    ]
    if not names:
        names = [_unnamed(error)]
    return ": ".join([" to ".join(names), os.strerror(found.errno)])


def prepare_streams() -> None:
    """Make standard streams safe to write to, whatever the shell has left of them.

    A closed one is opened on ``/dev/null``, lest the next file that is opened become the standard
    output of a library. Characters that the terminal's encoding does not have are written as
    escapes.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def finish_streams(status: int) -> int:
    """Write what is left in the streams and return the exit status, 1 in place of 0 on failure."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        if _fails(stream):
            status = 1 if status == 0 else status
            # the interpreter flushes once more as it ends, and would complain
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return status


def _unnamed(error: BaseException) -> str:
    """Say what a call without a file was about."""
    if _is_of_output(error):
        return "standard output"
    try:
        os.getcwd()
    except OSError:
        return "the current folder"
    return "the system"


def _fails(stream: TextIO | None) -> bool:
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        return True
    return False


def _reader_is_gone(error: BaseException) -> bool:
    """Tell whether the reader of a pipe has left, as ``head`` does: nothing is printed then."""
    return isinstance(error, BrokenPipeError) and _is_of_output(error)


def _is_of_output(error: BaseException) -> bool:
    """Tell whether an error was raised by what prints."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__"))
        trace = trace.tb_next
    return module.partition(".")[0] in ("click", "typer", "rich")
