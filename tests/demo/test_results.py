"""Write and merge the results of tiny runs, whose untrained networks are drawn and measured."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.demo import DemoConfig
from anyflow.demo.evaluate import build_evaluator, evaluate_method, real_floor, samplers
from anyflow.demo.results import MERGED_FILES, merge_runs, write_results
from anyflow.demo.world import World
from anyflow.evaluation import EvaluationResults

Image = pytest.importorskip("PIL.Image")
METHODS = ("flow_matching", "on_policy")


def make_run(out: Path, seed: int) -> EvaluationResults:
    config = DemoConfig(
        seed=seed, num_layers=1, num_heads=2, samples=32, heldout=64, step_counts=(1, 2)
    )
    world = World(config)
    evaluator, all_samplers, model = build_evaluator(world), samplers(world), world.model()
    plain = evaluate_method(world, evaluator, all_samplers["flow_matching"], model, lambda: None)
    model.enable_flow_map(config.gate_value)
    scored = (
        plain,
        evaluate_method(world, evaluator, all_samplers["on_policy"], model, lambda: None),
    )
    curves = {method: metrics for method, (metrics, _) in zip(METHODS, scored, strict=True)}
    examples = {method: videos for method, (_, videos) in zip(METHODS, scored, strict=True)}
    seconds = {"flow_matching": 3.0, "pretrain": 1.0, "on_policy": 2.0}
    results = EvaluationResults(real_floor(world, evaluator), curves, seconds, seed, "tiny")
    out.mkdir(parents=True)
    write_results(config, world, results, examples, out)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[list[Path], list[EvaluationResults]]:
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / f"demo-{seed}" for seed in (0, 1)]
    return paths, [make_run(path, seed) for seed, path in enumerate(paths)]


@pytest.mark.slow
def test_run_has_the_moving_picture_and_small_animations(runs) -> None:
    folder = runs[0][0]
    assert {*MERGED_FILES, "samples"} == {path.name for path in folder.iterdir()}
    data = (folder / "any_step.gif").read_bytes()
    assert len(data) < 2**20
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.n_frames == 8 and picture.size[0] <= 800
    names = {f"{method}_{steps}.gif" for method in METHODS for steps in (1, 2)} | {"real.gif"}
    assert {path.name for path in (folder / "samples").glob("*.gif")} == names


@pytest.mark.slow
def test_report_command_merges_seeds(runs, tmp_path: Path) -> None:
    paths, results = runs
    done = CliRunner().invoke(
        app, ["report", *map(str, paths), "--out", str(tmp_path / "new" / "both")]
    )
    assert done.exit_code == 0, done.output
    out = tmp_path / "new" / "both"
    assert str((out / "report.html").resolve()) in done.output
    assert {path.name for path in out.iterdir()} == set(MERGED_FILES)
    merged = [
        EvaluationResults.from_dict(run)
        for run in json.loads((out / "metrics.json").read_text())["runs"]
    ]
    assert merged == results
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "mean of 2 seeds (0, 1)" in page and "the videos are those of seed 0" in page
    low, high = sorted(run.curves["on_policy"][2].coverage_tv for run in results)
    assert f"<small>{low:#.3g} – {high:#.3g}</small>" in page
    # Pictures, table of the recipe and machine are those of the first run.
    first = (paths[0] / "report.html").read_text(encoding="utf-8")
    pictures = [line for line in first.splitlines() if "<picture>" in line]
    assert len(pictures) > 4 and all(line in page for line in pictures)
    assert torch.__version__ in page and "Stage 1: flow-map pretraining" in page
    assert (out / "any_step.gif").read_bytes() == (paths[0] / "any_step.gif").read_bytes()
    assert "Do they move as much as real videos?" in page and "earlier version" not in page
    # An earlier report is replaced; a run of an earlier version has no motion, and neither has the
    # report.
    old = Path(shutil.copytree(paths[0], tmp_path / "old"))
    metrics = json.loads((old / "metrics.json").read_text())
    for score in (
        metrics["floor"],
        *(score for curve in metrics["curves"].values() for score in curve.values()),
    ):
        del score["motion"]
    (old / "metrics.json").write_text(json.dumps(metrics))
    merge_runs([old], out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "seed 0" in page and "made by an earlier version" in page and "Do they move" not in page


@pytest.mark.parametrize("method", ["flow_matching", "consistency_sampler"])
def test_parts_on_several_cores_have_the_numbers_of_one_call(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # a user's choice would be one part
        monkeypatch.delenv(name, raising=False)
    world = World(DemoConfig(num_layers=1, num_heads=2, samples=300, heldout=64, step_counts=(2,)))
    model, evaluator = world.model(), build_evaluator(world)
    torch.nn.init.normal_(model.proj_out.weight, std=0.1, generator=world.generator(1))
    if method != "flow_matching":
        model.enable_flow_map(world.config.gate_value)
    sampler, labels = samplers(world)[method], world.labels(300)
    metrics, _ = evaluate_method(world, evaluator, sampler, model, lambda: None)
    whole = sampler(model, world.noise(300, world.generator(920)), world.prompts(labels), 2)
    assert metrics[2] == evaluator.evaluate(world.decode(whole), labels)


@pytest.mark.slow
def test_report_command_refuses_what_cannot_be_merged(runs, tmp_path: Path) -> None:
    (first, second), _ = runs
    (tmp_path / "empty").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    shutil.copytree(second, tmp_path / "other")
    metrics = json.loads((second / "metrics.json").read_text())
    metrics["curves"] = {method: {"1": curve["1"]} for method, curve in metrics["curves"].items()}
    (tmp_path / "other" / "metrics.json").write_text(json.dumps(metrics))
    damaged = tmp_path / "damaged"
    shutil.copytree(first, damaged)
    (damaged / "samples" / "videos.safetensors").write_bytes(
        b"no tensors, but long enough for a header"
    )
    about = tmp_path / "about"
    shutil.copytree(first, about)
    (about / "samples" / "about.json").write_text('{"recipe": 3}')
    new = tmp_path / "new"
    for arguments, words in (
        ([first, first, "--out", new], "two runs have the seed 0"),
        ([first, tmp_path / "nothing", "--out", new], "is not a folder"),
        ([first, tmp_path / "empty", "--out", new], "holds no finished run"),
        ([first, tmp_path / "other", "--out", new], "different step counts"),
        ([damaged, second, "--out", new], "videos.safetensors"),
        ([about, second, "--out", new], "about.json is damaged: recipe"),
        ([first, second, "--out", tmp_path / "thesis"], "holds other files (thesis.tex)"),
        ([first, second, "--out", tmp_path / "thesis" / "thesis.tex"], "is a file"),
        ([first, second, "--out", first], "holds other files (samples)"),
    ):
        done = CliRunner().invoke(app, ["report", *map(str, arguments)])
        assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1, (
            words,
            done.output,
        )
        assert not new.exists()
