"""Declare the options that several commands share, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from anyflow.cli.common import DtypeName
from anyflow.utils.documents import shortened

# Options of `anyflow sample` and `anyflow evaluate`; None takes what the help shows in brackets.
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        help="Text file with a prompt on each line, or .csv or .jsonl with prompt and "
        "negative_prompt.",
        show_default=False,
    ),
]
Steps = Annotated[str, typer.Option(help="Numbers of sampling steps, with commas between them.")]
Chunks = Annotated[
    str | None,
    typer.Option(
        metavar="INTEGERS",
        help="Latent frames of each chunk of a causal model, as 1,3,3,2; the model's if left out.",
    ),
]
Transformer = Annotated[
    str | None,
    typer.Option(
        help="Folder or name with another transformer and its scheduler, as training writes it."
    ),
]
LoRA = Annotated[str | None, typer.Option(help="LoRA file or folder to merge.")]
Height = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.", show_default="480")]
Width = Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.", show_default="832")]
NumFrames = Annotated[
    int | None, typer.Option(help="Frames of each video, 4k + 1.", show_default="81")
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale; 1 is no guidance.", show_default="1")
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        help="Used with guidance, for prompts without a negative prompt of their own.",
        show_default="empty",
    ),
]
Euler = Annotated[
    bool,
    typer.Option("--euler", help="Plain Euler steps (r = t), for a plain Wan model or a teacher."),
]
FPS = Annotated[
    float | None, typer.Option(help="Frames per second of the files.", show_default="16")
]
Memory = Annotated[
    Literal["auto", "fast", "low", "stream"],
    typer.Option(
        help="What is on the device: all (fast), one part at a time (low), or a block at a time "
        "(stream)."
    ),
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(help="Dtype of the transformer and the text encoder.", show_default="bfloat16"),
]
Device = Annotated[str | None, typer.Option(help="Torch device; a GPU if torch finds one.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks.")]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph", help="Replay evaluations from a CUDA graph.")
]

# Options of commands on checkpoints.
Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Checkpoint of any format: a folder, a file, or a name on the Hugging Face Hub.",
        show_default=False,
    ),
]
Subfolder = Annotated[
    str | None,
    typer.Option(help="Folder of the transformer in the checkpoint's, in place of 'transformer'."),
]
Weights = Annotated[
    Literal["ema", "raw"] | None,
    typer.Option(help="Weights to take from a training file; the average where it has one."),
]
HeadDim = Annotated[
    int | None,
    typer.Option(help="Channels of a head, for a checkpoint without config.json; 128 for Wan."),
]
Pixels = Annotated[int, typer.Option(help="Pixels, a multiple of 16.")]


def given(**settings: Any) -> dict[str, Any]:
    """Return the settings that the command line names."""
    return {name: value for name, value in settings.items() if value is not None}


def parse_chunks(text: str | None) -> tuple[int, ...] | None:
    """Parse the latent frames of chunks, such as ``1,3,3,2``; None for None.

    Raises:
        ValueError: the text is something else.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and len(word) < 20 for word in words):
        raise ValueError(
            "--chunks must be latent frames of each chunk with commas between them, as "
            f"1,3,3,2, got {shortened(text)!r}"
        )
    return tuple(int(word) for word in words)
