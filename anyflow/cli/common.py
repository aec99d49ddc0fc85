"""Share how commands fail and stop, the names of dtypes, and the end of their help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NoReturn

import typer

if TYPE_CHECKING:
    import torch

DtypeName = Literal["bfloat16", "float16", "float32"]
_SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_DOCS = "https://github.com/anyflow-video/anyflow/blob/main/docs"


def full_dtype_name(token: str) -> str:
    """Return torch's name of a dtype for a short one, and every other token as it is."""
    return _SHORT_NAMES.get(token, token)


def torch_dtype(name: DtypeName) -> torch.dtype:
    """Return the dtype of a name."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def help_end(page: str, *examples: str) -> str:
    """Write the end of a command's help: examples, and a link to a page of the documentation.

    Args:
        page: page of ``docs/``.
        examples: command lines.
    """
    # rich takes brackets for markup
    lines = [f"$ {example}".replace("[", r"\[") for example in examples]
    return "\n\n".join(["Examples:", *lines, f"More: {_DOCS}/{page}"])


def fail(message: str, status: int = 2) -> NoReturn:
    """End a command with a message, a line of it at a time, and an exit status."""
    for line in message.splitlines():
        typer.echo(f"anyflow: {' '.join(line.split())}", err=True)
    raise typer.Exit(status)


def stopped(advice: str) -> NoReturn:
    """End a command that Ctrl-C has stopped, with what the user can do next."""
    typer.echo(f"\nStopped. {advice}", err=True)
    raise typer.Exit(130) from None
