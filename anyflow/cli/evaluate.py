"""``anyflow evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anyflow.cli.common import DtypeName, fail

if TYPE_CHECKING:
    from anyflow.evaluation.runs.models import VideoModel


def evaluate(
    model: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]PATH",
            help="Diffusers folder, name on the Hugging Face Hub, or run of `anyflow demo`; may be "
            "repeated.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 (typer makes a new one)
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file with a prompt on each line, or .csv or .jsonl with prompt and "
            "negative_prompt; models of "
            "`anyflow demo` bring their own.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for everything; what it has is not made again.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        str, typer.Option(help="Step counts, with commas between them.")
    ] = "1,2,4,8,16,32",
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="Videos of each prompt; 5 if left out, 32 for a model of `anyflow demo`."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the noise, which is the same at each step count.")
    ] = 0,
    reference_steps: Annotated[
        int,
        typer.Option(
            help="Steps of the video that each video is compared with; 0 makes and compares with "
            "none."
        ),
    ] = 50,
    references: Annotated[
        Path | None,
        typer.Option(
            help="Folder with real videos, for their motion and the Fréchet video distance."
        ),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the weights that metrics need; ~/.cache/anyflow/evaluation if left "
            "out."
        ),
    ] = None,
    vbench_python: Annotated[
        Path | None,
        typer.Option(help="Python of an environment with VBench, which scores the videos as well."),
    ] = None,
    vbench_dimensions: Annotated[
        str | None,
        typer.Option(help="Of VBench, with commas between them; those of any videos if left out."),
    ] = None,
    report_only: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT", help="Write the report of such a folder again, and nothing else."
        ),
    ] = None,
    transformer: Annotated[
        str | None,
        typer.Option(
            help="Folder or name with another transformer and its scheduler, as training leaves it."
        ),
    ] = None,
    lora: Annotated[str | None, typer.Option(help="LoRA file or folder to merge.")] = None,
    height: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 16; 480 if left out.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Pixels, a multiple of 16; 832 if left out.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="4k + 1; 81 if left out.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1, which is none, if left out.")
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="With guidance, of prompts without one of their own; empty if left out."),
    ] = None,
    euler: Annotated[
        bool,
        typer.Option(
            "--euler", help="Plain Euler steps (r = t), for a plain Wan model or a teacher."
        ),
    ] = False,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of the files; 16 if left out.")
    ] = None,
    memory: Annotated[
        Literal["auto", "fast", "low", "stream"],
        typer.Option(
            help="On the device: all (fast), one part at a time (low), or a block at a time "
            "(stream)."
        ),
    ] = "auto",
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Of the transformer and the text encoder; bfloat16 if left out."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; a GPU if there is one.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the transformer's blocks.")
    ] = False,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Replay evaluations from a CUDA graph.")
    ] = False,
) -> None:
    """Sample models at several step counts, measure the videos, and write a report; on many GPUs
    under torchrun.
    """
    settings = {
        "transformer": transformer,
        "lora": lora,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "guidance_scale": guidance,
        "negative_prompt": negative_prompt,
        "fps": fps,
        "dtype": dtype,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    options = {"memory": memory, "compile": compile, "cuda_graph": cuda_graph}
    try:
        if report_only is not None:
            _report_only(report_only, given=bool(model or prompts or out))
            return
        if not model or out is None:
            raise ValueError(
                "--model and --out must be given (or --report-only OUT, with the folder of an "
                "evaluation)"
            )
        from anyflow.evaluation.runs.vbench import DEFAULT_DIMENSIONS, VBench

        vbench = None
        if vbench_python is not None:
            names = (
                DEFAULT_DIMENSIONS
                if vbench_dimensions is None
                else [n.strip() for n in vbench_dimensions.split(",")]
            )
            vbench = VBench(vbench_python, list(dict.fromkeys(names)))
        elif vbench_dimensions is not None:
            raise ValueError("--vbench-dimensions are those of --vbench-python, which is missing")
        chosen = _models(model, given, options, euler=euler, device=device)
        _run(
            chosen,
            prompts,
            out,
            {
                "steps": steps,
                "num_samples": num_samples,
                "seed": seed,
                "reference_steps": reference_steps,
            },
            metric_models=models,
            references=references,
            vbench=vbench,
        )
    except (ValueError, ImportError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        typer.echo("\nStopped. The same command goes on where it was.", err=True)
        raise typer.Exit(130) from None


def _run(
    models: dict[str, VideoModel],
    prompts: Path | None,
    out: Path,
    numbers: dict[str, Any],
    **more: Any,
) -> None:
    """Plan and run; say at the end where the report is."""
    from rich.console import Console

    from anyflow.evaluation.runs.models import ShapesModel, shapes_prompts
    from anyflow.evaluation.runs.plan import EvaluationPlan
    from anyflow.evaluation.runs.ranks import Rank
    from anyflow.evaluation.runs.run import run_evaluation
    from anyflow.pipelines.prompts import Prompt, read_prompts
    from anyflow.pipelines.render import parse_numbers
    from anyflow.utils.progress import counted

    of_shapes = {name for name, model in models.items() if isinstance(model, ShapesModel)}
    if of_shapes and len(of_shapes) < len(models):
        raise ValueError(
            f"{sorted(of_shapes)} are models of moving shapes and the others are not; evaluate "
            "them apart"
        )
    if prompts is not None:
        texts = read_prompts(prompts)
    elif of_shapes:
        texts = [Prompt(text) for text in shapes_prompts()]
    else:
        raise ValueError("--prompts must be given: a text file with a prompt on each line")
    if numbers["num_samples"] is None:
        numbers["num_samples"] = 32 if of_shapes else 5
    step_counts = parse_numbers("steps", numbers.pop("steps"))
    plan = EvaluationPlan(models, texts, step_counts, **numbers)
    main = Rank.of_environment().is_main
    console = Console(highlight=False, soft_wrap=True) if main else None
    report = run_evaluation(plan, out, **more, console=console)
    for failed in report.failed:
        job = failed.job
        typer.echo(
            f"failed: {job.prompt.text} ({job.model}, {job.num_inference_steps} steps, "
            f"{job.sample}): {failed.reason}",
            err=True,
        )
    for problem in report.problems:
        typer.echo(f"anyflow: {problem}", err=True)
    if main:
        typer.echo(f"{out}: {counted(report.made, 'video')} made, {report.skipped} there already")
    if report.report is not None:
        typer.echo(f"Report: {report.report.resolve()}")
    raise typer.Exit(1 if report.failed or report.problems else 0)


def _report_only(out: Path, *, given: bool) -> None:
    if given:
        raise ValueError(
            "--report-only takes the folder of an evaluation and goes with no --model, --prompts "
            "and --out"
        )
    from anyflow.evaluation.runs.run import rewrite_report

    typer.echo(f"Report: {rewrite_report(out).resolve()}")


def _models(
    texts: list[str],
    given: dict[str, Any],
    options: dict[str, Any],
    *,
    euler: bool,
    device: str | None,
) -> dict[str, VideoModel]:
    """Return the models that the command names, each by its own name or that of its folder."""
    from anyflow.evaluation.runs.models import PipelineModel, find_shapes_model, split_model_name
    from anyflow.pipelines.sample_settings import SampleSettings

    if len(texts) > 1 and {"transformer", "lora"} & given.keys():
        raise ValueError("--transformer and --lora go with one --model; evaluate the others by "
                         "another command, with "
                         "the same --out")  # fmt: skip
    models: dict[str, VideoModel] = {}
    for text in texts:
        name, path = split_model_name(text)
        if name in models:
            raise ValueError(
                f"two models have the name {name!r}; give another one, as --model NAME=PATH"
            )
        shapes = (
            None if "transformer" in given else find_shapes_model(path, euler=euler, device=device)
        )
        if shapes is None:
            models[name] = PipelineModel(
                SampleSettings(path, euler=euler, **given), device=device, **options
            )
            continue
        if given:
            option = next(iter(given)).replace("guidance_scale", "guidance").replace("_", "-")
            raise ValueError(f"--{option} cannot be chosen for {path}, a model of moving shapes")
        models[name] = shapes
    return models
