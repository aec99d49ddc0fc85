"""What the commands share: how they fail, and names of dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str) -> torch.dtype:
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def fail(message: str, status: int = 2) -> NoReturn:
    for line in message.splitlines():
        typer.echo(f"anyflow: {' '.join(line.split())}", err=True)
    raise typer.Exit(status)
