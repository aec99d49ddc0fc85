"""The command line: ``anyflow …``. A user's mistake is one line and exit status 2, never a traceback."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import anyflow
from anyflow.command_errors import Commands, finish_streams, prepare_streams

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    name="anyflow",
    cls=Commands,
    help="Any-step video diffusion with flow maps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the ``anyflow`` command and exit with its status; a warning is one line."""
    standard = warnings.formatwarning

    def one_line(message: Any, category: type[Warning], *where: Any, **more: Any) -> str:
        ours = category is UserWarning and "\n" not in str(message)
        return f"anyflow: warning: {message}\n" if ours else standard(message, category, *where, **more)

    warnings.formatwarning = one_line
    prepare_streams()
    try:
        app()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise SystemExit(finish_streams(status)) from None


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"anyflow {anyflow.__version__}")
        raise typer.Exit


@app.command()
def demo(
    budget: Annotated[str, typer.Option(help="'full' (some minutes) or 'fast' (about one).")] = "full",
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the run; a killed run in it is resumed.")] = Path("runs/demo"),
    device: Annotated[str, typer.Option(help="Torch device to train on.")] = "cpu",
    open_report: Annotated[bool, typer.Option("--open/--no-open", help="Open the report in a browser.")] = True,
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
        _fail(str(error))
    except FloatingPointError as error:  # a student that diverged
        _fail(str(error), status=1)
    except KeyboardInterrupt:
        typer.echo("\nStopped. The same command goes on after the last finished stage.", err=True)
        raise typer.Exit(130) from None
    if open_report and sys.stdout is not None and sys.stdout.isatty() and _has_browser():
        webbrowser.open((out / REPORT_FILE).resolve().as_uri())


@app.command()
def doctor(
    device: Annotated[
        str | None, typer.Option(help="Torch device to check; CUDA if there is one, else the CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what is installed, built and would run, and check every operator; exit status 1 if not all is well."""
    from anyflow.doctor import run

    try:
        well = run(device, as_json=as_json)
    except ValueError as error:
        _fail(str(error))
    raise typer.Exit(0 if well else 1)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str], typer.Argument(metavar="[KEY=VALUE]...", help="Settings in place of the file's.", show_default=False)
    ] = [],  # noqa: B006 (typer makes a new one)
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the whole recipe and exit.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint of the run.")] = True,
) -> None:
    """Train a model by a recipe, on many GPUs under torchrun; the same command goes on where it was stopped."""
    try:
        from anyflow.training import recipe as recipes

        if print_config:
            typer.echo(recipes.print_config(recipe, overrides), nl=False)
            return
        settings = recipes.load_recipe(recipe, overrides)

        from rich.console import Console

        from anyflow.training.trainer import train

        train(settings, resume=resume, console=Console(highlight=False, soft_wrap=True))
    except (ValueError, ImportError) as error:
        _fail(str(error))
    except FloatingPointError as error:  # the training's own doing, not the user's
        _fail(str(error), status=1)
    except KeyboardInterrupt:
        typer.echo("\nStopped. The same command goes on after the newest checkpoint.", err=True)
        raise typer.Exit(130) from None


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of the run.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="New folder for the model.", show_default=False)],
    weights: Annotated[str, typer.Option(help="'ema' (the average) or 'raw'.")] = "ema",
    lora: Annotated[str, typer.Option(help="Adapters 'merged' into the weights, or 'separate'.")] = "merged",
    format: Annotated[
        str | None, typer.Option(help="Of separate adapters, 'diffusers' or 'comfyui'; diffusers if left out.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest if left out.")] = None,
) -> None:
    """Write the model of a training checkpoint as a folder for diffusers."""
    from anyflow.training.export import export

    try:
        folder = export(run, out, weights=weights, lora=lora, format=format, step=step)  # type: ignore[arg-type]
    except (ValueError, ImportError) as error:
        _fail(str(error))
    typer.echo(f"The model is {folder}")


@app.command()
def preprocess(
    out: Annotated[Path, typer.Option(help="Folder of the dataset; a killed run in it goes on.", show_default=False)],
    videos: Annotated[Path | None, typer.Option(help="Folder of the video files.", show_default=False)] = None,
    captions: Annotated[
        Path | None, typer.Option(help="CSV or JSONL with file and caption.", show_default=False)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Diffusers folder with vae, text_encoder and tokenizer.", show_default=False)
    ] = None,
    num_frames: Annotated[int, typer.Option(help="Frames of each video, 4k + 1.")] = 81,
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 832,
    fps: Annotated[float, typer.Option(help="Frames per second that videos are sampled at.")] = 16,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What stands for no prompt; Wan's own if left out.")
    ] = None,
    text_length: Annotated[int, typer.Option(help="Tokens that prompts are cut off or padded to.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of the text encoder, 'bf16' or 'fp32'.")] = "bf16",
    device: Annotated[
        str | None, typer.Option(help="Torch device to encode on; CUDA if there is one, else the CPU.")
    ] = None,
    num_workers: Annotated[int, typer.Option(help="Threads that decode ahead.")] = 2,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Take files outside the folder of videos, also through links.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Only compare every row of --out with its digest; exit status 1 if one differs."),
    ] = False,
) -> None:
    """Encode videos and captions into a dataset of latents for training, or verify one."""
    from rich.console import Console

    if verify:
        _verify_dataset(out)
        return
    for name, value in (("videos", videos), ("captions", captions), ("model", model)):
        if value is None:
            _fail(f"--{name} is missing; only --verify does without it")
    assert videos is not None and captions is not None and model is not None
    try:
        from anyflow.data.preprocess import WAN_NEGATIVE_PROMPT, preprocess
        from anyflow.documents import shortened
        from anyflow.pipelines.loading import resolve_device

        console = Console(highlight=False, soft_wrap=True)
        report = preprocess(
            videos,
            captions,
            model,
            out,
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            negative_prompt=WAN_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt,
            text_length=text_length,
            dtype=dtype,  # type: ignore[arg-type]
            device=str(resolve_device(device)),
            num_workers=num_workers,
            allow_outside=allow_outside,
            console=console,
        )
    except (ValueError, ImportError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        typer.echo("\nStopped. The same command goes on after the last finished shard.", err=True)
        raise typer.Exit(130) from None
    console.print(f"{out}: {report.done} videos encoded, {report.skipped} were there")
    for line in report.broken:
        name = f" ({shortened(line.file)})" if line.file else ""
        console.print(f"line {line.line} of {captions}{name} was left out: {line.reason}", markup=False)


@app.command()
def sample(
    model: Annotated[
        str, typer.Option(help="Diffusers folder, or a name on the Hugging Face Hub.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the videos; what it has is skipped.", show_default=False)],
    prompt: Annotated[list[str], typer.Option(help="May be given several times.", show_default=False)] = [],  # noqa: B006 (typer makes a new one)
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt on each line.")] = None,
    steps: Annotated[str, typer.Option(help="Step counts, with commas between them.")] = "1,2,4,8,16,32",
    transformer: Annotated[
        str | None, typer.Option(help="Folder with another transformer and its scheduler, as training leaves it.")
    ] = None,
    lora: Annotated[str | None, typer.Option(help="LoRA file or folder to merge.")] = None,
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 832,
    num_frames: Annotated[int, typer.Option(help="4k + 1.")] = 81,
    seed: Annotated[int, typer.Option(help="Of the noise, the same at each step count.")] = 0,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is none.")] = 1.0,
    negative_prompt: Annotated[str | None, typer.Option(help="Needed for guidance.")] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of the files.")] = 16,
    memory: Annotated[
        str, typer.Option(help="'fast' (all on the device), 'low' (in turns), 'stream' or 'auto'.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="'bf16', 'fp16' or 'fp32'.")] = "bf16",
    device: Annotated[str | None, typer.Option(help="Torch device; a GPU if there is one.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the transformer's blocks.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay evaluations from a CUDA graph.")] = False,
) -> None:
    """Make videos of prompts at several step counts from the same noise, and show them side by side."""
    from rich.console import Console

    try:
        from anyflow.pipelines.render import SampleSettings, parse_steps, read_prompts, sample_command

        settings = SampleSettings(
            model, transformer, lora, height, width, num_frames, seed, guidance, negative_prompt, fps, dtype
        )
        report = sample_command(
            settings,
            [*prompt, *(read_prompts(prompts) if prompts is not None else [])],
            parse_steps(steps),
            out,
            memory=memory,  # type: ignore[arg-type]
            device=device,
            compile=compile,
            cuda_graph=cuda_graph,
            console=Console(highlight=False, soft_wrap=True),
        )
    except (ValueError, ImportError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        typer.echo("\nStopped. The same command goes on where it was.", err=True)
        raise typer.Exit(130) from None
    made = "1 video" if report.done == 1 else f"{report.done} videos"
    typer.echo(f"{out}: {made} made, {report.skipped} there already")
    for failure in report.failed:
        what = "comparison" if failure.steps is None else f"{failure.steps} steps"
        typer.echo(f"failed: {failure.prompt} ({what}): {failure.reason}", err=True)
    raise typer.Exit(1 if report.failed else 0)


@app.command()
def verify(
    model: Annotated[
        Path, typer.Option(help="Diffusers folder of a transformer, or of a pipeline.", show_default=False)
    ],
    against: Annotated[str, typer.Option(help="The other implementation; 'diffusers' is the only one.")] = "diffusers",
    dtype: Annotated[str, typer.Option(help="Of the weights, 'fp32' or 'bf16'.")] = "fp32",
    device: Annotated[str, typer.Option(help="Torch device to run on.")] = "cpu",
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 256,
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 256,
    num_frames: Annotated[int, typer.Option(help="Frames of the video, 4k + 1.")] = 17,
    steps: Annotated[int, typer.Option(help="Steps of the sampling.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    max_forward: Annotated[
        float | None, typer.Option(help="Allowed mean relative difference of forwards; by dtype if left out.")
    ] = None,
    max_loss: Annotated[float | None, typer.Option(help="Allowed relative difference of the training loss.")] = None,
    max_sample: Annotated[
        float | None, typer.Option(help="Allowed mean relative difference of the sampled latents.")
    ] = None,
) -> None:
    """Compare the network with diffusers' on the same weights; exit status 1 if they differ by more than rounding."""
    from anyflow.pipelines.loading import resolve_device
    from anyflow.verify import Thresholds, verify

    given = {"forward": max_forward, "loss": max_loss, "sample": max_sample}
    try:
        torch_dtype = _torch_dtype(dtype)
        thresholds = Thresholds.for_dtype(torch_dtype)
        thresholds = dataclasses.replace(thresholds, **{k: v for k, v in given.items() if v is not None})
        report = verify(
            model,
            against=against,
            dtype=torch_dtype,
            device=resolve_device(device),
            height=height,
            width=width,
            num_frames=num_frames,
            steps=steps,
            seed=seed,
            thresholds=thresholds,
        )
    except ValueError as error:
        _fail(str(error))
    typer.echo(report)
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint of any format: a folder or a file.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", show_default=False)],
    to: Annotated[str, typer.Option(help="Format to write; 'diffusers' is the only one.")] = "diffusers",
    dtype: Annotated[str | None, typer.Option(help="'fp32', 'bf16' or 'fp16'; the stored one if left out.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Of the folder, in place of 'transformer'.")] = None,
    weights: Annotated[str | None, typer.Option(help="'ema' or 'raw' of a training file.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels of a head, without a config.json; Wan's 128.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Alpha of adapters to merge, where no file says it.")] = None,
    flow_map: Annotated[bool, typer.Option("--flow-map", help="Make a plain Wan model a flow map.")] = False,
    gate: Annotated[float, typer.Option(help="Gate of the flow map, with --flow-map.")] = 0.25,
    bidirectional: Annotated[
        bool, typer.Option("--bidirectional", help="Take a causal model without its causal tensors.")
    ] = False,
    shift: Annotated[float | None, typer.Option(help="Of a scheduler to write; the checkpoint's if left out.")] = None,
    strict_values: Annotated[
        bool, typer.Option("--strict-values", help="Refuse weights with NaN or infinity, of which a warning tells.")
    ] = False,
) -> None:
    """Write a checkpoint of any known format as a folder for diffusers."""
    from anyflow.checkpoints import FlowMap, convert

    try:
        folder = convert(
            source,
            out,
            to=to,  # type: ignore[arg-type]
            dtype=None if dtype is None else _torch_dtype(dtype),
            subfolder=subfolder,
            weights=weights,
            attention_head_dim=head_dim,
            lora_alpha=lora_alpha,
            flow_map=FlowMap(gate_value=gate) if flow_map else None,
            bidirectional=bidirectional,
            shift=shift,
            strict_values=strict_values,
        )
    except ValueError as error:
        _fail(str(error))
    typer.echo(f"Written to {folder}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint of any format: a folder or a file.", show_default=False)],
    subfolder: Annotated[str | None, typer.Option(help="Of the folder, in place of 'transformer'.")] = None,
    weights: Annotated[str | None, typer.Option(help="'ema' or 'raw' of a training file.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Channels of a head, without a config.json; Wan's 128.")] = None,
    strict_values: Annotated[
        bool, typer.Option("--strict-values", help="Read every tensor, and count NaN and infinity as a problem.")
    ] = False,
) -> None:
    """Say what a checkpoint is: format, size, types, sizes of the model; exit status 1 if it cannot be loaded."""
    from anyflow.checkpoints import inspect

    try:
        info = inspect(
            path, subfolder=subfolder, weights=weights, attention_head_dim=head_dim, strict_values=strict_values
        )
    except ValueError as error:
        _fail(str(error))
    typer.echo(info)
    raise typer.Exit(1 if info.problems else 0)


def _verify_dataset(folder: Path) -> NoReturn:
    try:
        from anyflow.data.latent_dataset import damages

        found = damages(folder)
    except (ValueError, ImportError) as error:
        _fail(str(error), status=1 if (folder / "dataset.json").is_file() else 2)
    for damage in found:
        typer.echo(f"damaged: {damage}", err=True)
    if not found:
        typer.echo(f"{folder}: every row is what was written")
    raise typer.Exit(1 if found else 0)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"--dtype must be one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


def _fail(message: str, status: int = 2) -> NoReturn:
    for line in message.splitlines():
        typer.echo(f"anyflow: {' '.join(line.split())}", err=True)
    raise typer.Exit(status)


def _has_browser() -> bool:
    """Whether a graphical browser can be shown; a text browser would take over the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
