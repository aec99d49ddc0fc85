"""Run ``anyflow inspect``, ``anyflow convert`` and ``anyflow verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from anyflow.cli import options
from anyflow.cli.common import DtypeName, fail, torch_dtype

if TYPE_CHECKING:
    from anyflow.formats import CausalSettings


def inspect(
    path: options.Checkpoint,
    subfolder: options.Subfolder = None,
    weights: options.Weights = None,
    head_dim: options.HeadDim = None,
    strict_values: Annotated[
        bool,
        typer.Option(
            "--strict-values", help="Read every tensor, and count NaN and infinity as a problem."
        ),
    ] = False,
) -> None:
    """Describe a checkpoint: its format, size, types, and the sizes of the model.

    The exit status is 1 if the checkpoint cannot be loaded.
    """
    from anyflow.formats import inspect

    try:
        info = inspect(
            path,
            subfolder=subfolder,
            weights=weights,
            attention_head_dim=head_dim,
            strict_values=strict_values,
        )
    except ValueError as error:
        fail(str(error))
    typer.echo(info)
    raise typer.Exit(1 if info.problems else 0)


def convert(
    source: options.Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", show_default=False)],
    to: Annotated[Literal["diffusers"], typer.Option(help="Format to write.")] = "diffusers",
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Dtype of the weights; the stored one if left out.")
    ] = None,
    subfolder: options.Subfolder = None,
    weights: options.Weights = None,
    head_dim: options.HeadDim = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Alpha of adapters to merge, where no file says it.")
    ] = None,
    flow_map: Annotated[
        bool, typer.Option("--flow-map", help="Make a plain Wan model a flow map.")
    ] = False,
    gate: Annotated[float, typer.Option(help="Gate of the flow map, with --flow-map.")] = 0.25,
    bidirectional: Annotated[
        bool,
        typer.Option("--bidirectional", help="Load a causal model without its causal tensors."),
    ] = False,
    causal: Annotated[
        bool, typer.Option("--causal", help="Make a bidirectional model a causal one.")
    ] = False,
    chunks: Annotated[
        str | None,
        typer.Option(
            help="Latent frames of each chunk, with --causal.", show_default="1,3,3,3,3,3,3,2"
        ),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(help="Shift of the scheduler to write; the checkpoint's if left out."),
    ] = None,
    strict_values: Annotated[
        bool,
        typer.Option(
            "--strict-values", help="Refuse weights with NaN or infinity; else a warning tells."
        ),
    ] = False,
) -> None:
    """Write a checkpoint of any known format as a folder for diffusers."""
    from anyflow.formats import FlowMap, convert

    try:
        settings = _causal_settings(causal, chunks)
        folder = convert(
            source,
            out,
            to=to,
            dtype=None if dtype is None else torch_dtype(dtype),
            subfolder=subfolder,
            weights=weights,
            attention_head_dim=head_dim,
            lora_alpha=lora_alpha,
            flow_map=FlowMap(gate_value=gate) if flow_map else None,
            bidirectional=bidirectional,
            causal=settings,
            shift=shift,
            strict_values=strict_values,
        )
    except ValueError as error:
        fail(str(error))
    typer.echo(f"Written to {folder}")


def _causal_settings(causal: bool, chunks: str | None) -> CausalSettings | None:
    """Return the settings of ``--causal`` and ``--chunks``, or raise a ValueError."""
    from anyflow.formats import CausalSettings

    if not causal:
        if chunks is not None:
            raise ValueError("--chunks is for --causal")
        return None
    sizes = options.parse_chunks(chunks)
    return CausalSettings() if sizes is None else CausalSettings(chunk_partition=sizes)


def verify(
    model: Annotated[
        str,
        typer.Option(
            help="Diffusers folder of a transformer or a pipeline, or a name on the Hub.",
            show_default=False,
        ),
    ],
    against: Annotated[
        Literal["diffusers"], typer.Option(help="The other implementation.")
    ] = "diffusers",
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Dtype of the weights.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Torch device to run on.")] = "cpu",
    height: options.Pixels = 256,
    width: options.Pixels = 256,
    num_frames: Annotated[int, typer.Option(help="Frames of the video, 4k + 1.")] = 17,
    steps: Annotated[int, typer.Option(help="Number of sampling steps.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    max_forward: Annotated[
        float | None,
        typer.Option(help="Allowed mean relative difference of forwards; by dtype if left out."),
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Allowed relative difference of the training loss.")
    ] = None,
    max_sample: Annotated[
        float | None, typer.Option(help="Allowed mean relative difference of the sampled latents.")
    ] = None,
) -> None:
    """Compare the network with diffusers' on the same weights, within what rounding explains.

    The exit status is 1 where a difference is larger.
    """
    from anyflow.formats.verify import verify
    from anyflow.utils.devices import resolve_device

    limits = {"forward": max_forward, "loss": max_loss, "sample": max_sample}
    try:
        report = verify(
            model,
            against=against,
            dtype=torch_dtype(dtype),
            device=resolve_device(device),
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=steps,
            seed=seed,
            limits={name: limit for name, limit in limits.items() if limit is not None},
        )
    except ValueError as error:
        fail(str(error))
    typer.echo(report)
    raise typer.Exit(0 if report.passed else 1)
