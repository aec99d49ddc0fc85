"""Run ``anyflow evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anyflow.cli import options
from anyflow.cli.common import fail, stopped

if TYPE_CHECKING:
    from anyflow.evaluation.runs.models import VideoModel
    from anyflow.evaluation.runs.vbench import VBench


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
    prompts: options.PromptsFile = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for everything; a video that it has is not made again.", show_default=False
        ),
    ] = None,
    steps: options.Steps = "1,2,4,8,16,32",
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="Videos of each prompt; 5 if left out, 32 for a model of `anyflow demo`."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the noise, the same for each number of steps.")
    ] = 0,
    reference_steps: Annotated[
        int,
        typer.Option(
            help="Steps of the video that each video is compared with; 0 compares with none."
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
        typer.Option(
            help="Dimensions of VBench, with commas between them; those of any videos if left out."
        ),
    ] = None,
    report_only: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT", help="Write the report of such a folder again, and nothing else."
        ),
    ] = None,
    transformer: options.Transformer = None,
    lora: options.LoRA = None,
    height: options.Height = None,
    width: options.Width = None,
    num_frames: options.NumFrames = None,
    chunks: options.Chunks = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    euler: options.Euler = False,
    fps: options.FPS = None,
    memory: options.Memory = "auto",
    dtype: options.Dtype = None,
    device: options.Device = None,
    compile: options.Compile = False,
    cuda_graph: options.CudaGraph = False,
) -> None:
    """Sample models at several numbers of steps, measure the videos, and write a report.

    Under torchrun the videos are made on many GPUs. Models of `anyflow demo` bring their prompts.
    """
    settings = options.given(
        transformer=transformer,
        lora=lora,
        height=height,
        width=width,
        num_frames=num_frames,
        guidance_scale=guidance,
        negative_prompt=negative_prompt,
        fps=fps,
        dtype=dtype,
    )
    loading = {"device": device, "memory": memory, "compile": compile, "cuda_graph": cuda_graph}
    try:
        settings |= options.given(chunks=options.parse_chunks(chunks))
        if report_only is not None:
            _report_only(report_only, given=bool(model or prompts or out))
            return
        if not model or out is None:
            raise ValueError(
                "--model and --out must be given (or --report-only OUT, with the folder of an "
                "evaluation)"
            )
        _run(
            _models(model, settings, loading, euler=euler),
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
            vbench=_vbench(vbench_python, vbench_dimensions),
        )
    except (ValueError, ImportError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        stopped("The same command continues from here.")


def _vbench(python: Path | None, dimensions: str | None) -> VBench | None:
    """Return the VBench that the command names, or None."""
    from anyflow.evaluation.runs.vbench import DEFAULT_DIMENSIONS, VBench

    if python is None:
        if dimensions is not None:
            raise ValueError("--vbench-dimensions are those of --vbench-python, which is missing")
        return None
    named = DEFAULT_DIMENSIONS if dimensions is None else dimensions.split(",")
    return VBench(python, list(dict.fromkeys(name.strip() for name in named)))


def _run(
    models: dict[str, VideoModel],
    prompts: Path | None,
    out: Path,
    numbers: dict[str, Any],
    **more: Any,
) -> None:
    """Plan and run the evaluation, and print where the report is."""
    from rich.console import Console

    from anyflow.evaluation.runs.models import ShapesModel, shapes_prompts
    from anyflow.evaluation.runs.plan import EvaluationPlan
    from anyflow.evaluation.runs.ranks import Rank
    from anyflow.evaluation.runs.run import run_evaluation
    from anyflow.pipelines.prompts import VideoPrompt, read_prompts
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
        texts = [VideoPrompt(text) for text in shapes_prompts()]
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
    texts: list[str], settings: dict[str, Any], loading: dict[str, Any], *, euler: bool
) -> dict[str, VideoModel]:
    """Return the models that the command names, each by its own name or that of its folder."""
    from anyflow.evaluation.runs.models import PipelineModel, find_shapes_model, split_model_name
    from anyflow.pipelines.sample_settings import SampleSettings

    if len(texts) > 1 and {"transformer", "lora"} & settings.keys():
        raise ValueError(
            "--transformer and --lora go with one --model; evaluate the others by another command, "
            "with the same --out"
        )
    models: dict[str, VideoModel] = {}
    for text in texts:
        name, path = split_model_name(text)
        if name in models:
            raise ValueError(
                f"two models have the name {name!r}; give another one, as --model NAME=PATH"
            )
        shapes = None
        if "transformer" not in settings:
            shapes = find_shapes_model(path, euler=euler, device=loading["device"])
        if shapes is None:
            models[name] = PipelineModel(SampleSettings(path, euler=euler, **settings), **loading)
            continue
        if settings:
            option = next(iter(settings)).replace("guidance_scale", "guidance").replace("_", "-")
            raise ValueError(f"--{option} cannot be chosen for {path}, a model of moving shapes")
        models[name] = shapes
    return models
