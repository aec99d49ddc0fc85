"""Run the quickstart on tiny budgets: files, a real kill, determinism, and mistakes."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from diffusers import AnyFlowTransformer3DModel as DiffusersTransformer
from nbclient import NotebookClient
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.demo import DemoConfig, DemoProgress, finished_report, run_demo
from anyflow.demo.progress import Advance
from anyflow.evaluation import EvaluationResults
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.training import TrainingError

STAGES = ("flow_matching", "pretrain", "on_policy")

# The same tiny configuration, for this process and for the subprocesses that are killed.
TINY = """
from dataclasses import replace
from anyflow.demo import DemoConfig
base = DemoConfig(
    num_layers=1, num_heads=2, samples=64, heldout=64, step_counts=(1, 4), checkpoint_every=2
)
stages = {name: replace(getattr(base, name), steps=6, batch_size=8) for name in
          ("flow_matching", "pretrain", "on_policy")}
tiny = replace(base, **stages)
"""

KILLED = (
    TINY
    + """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from rich.console import Console
from anyflow.demo import DemoProgress, run_demo

class Killed(DemoProgress):
    @contextmanager
    def stage(self, name, steps, cost):
        with super().stage(name, steps, cost) as advance:
            losses = []
            def counted(loss):
                losses.append(loss)
                if (name, len(losses)) == ("pretrain", 5):
                    os.kill(os.getpid(), signal.SIGKILL)
                advance(loss)
            yield counted

with Killed(Console(quiet=True)) as progress:
    run_demo(tiny, Path(sys.argv[1]), progress)
"""
)


def tiny_config() -> DemoConfig:
    scope: dict[str, DemoConfig] = {}
    exec(TINY, scope)
    return scope["tiny"]


def run(config: DemoConfig, out: Path) -> EvaluationResults:
    with DemoProgress(Console(quiet=True)) as progress:
        return run_demo(config, out, progress)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    run(tiny_config(), out)
    return out


class Interrupted(DemoProgress):
    """Press Ctrl-C as the third stage begins."""

    def stage(self, name: str, steps: int, cost: float) -> AbstractContextManager[Advance]:
        if name == "on_policy":
            raise KeyboardInterrupt
        return super().stage(name, steps, cost)


class Log(io.StringIO):
    """Keep the text of a run without a terminal, and torch's threads at each piece of it."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()

    def write(self, text: str) -> int:
        self.threads.add(torch.get_num_threads())
        return super().write(text)


@pytest.mark.slow
def test_folder_holds_everything_promised(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {"floor", "curves", "seconds", "seed", "budget"}
    assert set(metrics["curves"]) == {
        "flow_matching",
        "pretrain",
        "on_policy",
        "consistency_sampler",
    }
    for curve in metrics["curves"].values():
        assert set(curve) == {"1", "4"}
        assert all(
            set(point) == {"fd", "template_mse", "coverage_tv", "motion"}
            for point in curve.values()
        )
    assert metrics["floor"]["fd"] > 0 and metrics["floor"]["motion"] == pytest.approx(1.0, rel=0.02)
    assert {*STAGES, "evaluation", "total"} == set(metrics["seconds"])
    assert metrics["seconds"]["total"] == pytest.approx(
        sum(metrics["seconds"][k] for k in (*STAGES, "evaluation"))
    )
    with Image.open(finished / "samples" / "on_policy_4.gif") as animation:
        assert animation.n_frames == 8
    report = (finished / "report.html").read_text()
    assert "<html" in report and "http://" not in report and "https://" not in report
    with Image.open(finished / "curve.png") as picture:
        assert picture.size[0] > 600


@pytest.mark.slow
def test_checkpoints_are_diffusers_folders(finished: Path) -> None:
    folder = finished / "checkpoints" / "on_policy"
    ours = AnyFlowTransformer3DModel.from_pretrained(folder / "transformer")
    theirs = DiffusersTransformer.from_pretrained(folder / "transformer")
    assert (
        FlowMapEulerDiscreteScheduler.from_pretrained(
            folder / "scheduler"
        ).config.num_train_timesteps
        == 100
    )
    x, text = torch.randn(1, 4, 8, 6, 6), torch.randn(1, 4, 32)
    t, r = torch.full((1, 4), 60.0), torch.full((1, 4), 20.0)
    torch.testing.assert_close(
        ours(x, t, r, text).sample, theirs(x, t, r, text).sample, rtol=1e-5, atol=1e-6
    )
    teacher = AnyFlowTransformer3DModel.from_pretrained(
        finished / "checkpoints" / "flow_matching" / "transformer"
    )
    assert teacher.condition_embedder.delta_embedder is None


@pytest.mark.slow
def test_other_seed_other_weights_and_the_log_says_how_far_it_is(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with another seed; tests of resuming, below, compare runs of one seed."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    log = Log()
    with (
        pytest.raises(KeyboardInterrupt),
        Interrupted(Console(file=log, width=200), line_seconds=0.0) as progress,
    ):
        run_demo(replace(tiny_config(), seed=1), tmp_path / "other", progress)
    weights = Path("checkpoints", "pretrain", "transformer", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / "other" / weights).read_bytes() != (finished / weights).read_bytes()
    line = (
        r"everything: \d+ %, .* left; stage 1: flow-map pretraining: step 3 of 6, 50 %, .* left, "
        r"loss \d+\.\d+"
    )
    assert re.search(line, log.getvalue())
    # outside of the run
    assert log.threads == {1, torch.get_num_threads()} and torch.get_num_threads() == 2


def test_a_network_that_diverges_ends_the_run(tmp_path: Path) -> None:
    config = tiny_config()
    with pytest.raises(TrainingError, match="of the student"):
        run(
            replace(config, flow_matching=replace(config.flow_matching, lr=1e30, cosine=False)),
            tmp_path / "run",
        )


@pytest.mark.slow
def test_finished_folder_is_recognized_and_other_settings_are_refused(finished: Path) -> None:
    assert finished_report(tiny_config(), finished) == finished / "report.html"
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        finished_report(replace(tiny_config(), seed=3), finished)


@pytest.mark.slow
def test_killed_run_goes_on_within_its_stage(finished: Path, tmp_path: Path) -> None:
    """Let a run kill itself after an update between two checkpoints of the second stage."""
    out = tmp_path / "killed"
    process = subprocess.run([sys.executable, "-c", KILLED, str(out)], timeout=600)
    assert process.returncode == -signal.SIGKILL
    assert list(json.loads((out / "state.json").read_text())["finished"]) == ["flow_matching"]
    weights = (
        out
        / "checkpoints"
        / "flow_matching"
        / "transformer"
        / "diffusion_pytorch_model.safetensors"
    )
    written = weights.stat().st_mtime_ns

    log = io.StringIO()
    with DemoProgress(Console(file=log, width=200), line_seconds=0.0) as progress:
        resumed = run_demo(tiny_config(), out, progress)
    assert weights.stat().st_mtime_ns == written, "a finished stage was run again"
    steps = dict(re.findall(r"pretraining: step (\d) of 6(.*)", log.getvalue()))
    assert "loss" not in steps["4"] and "loss" in steps["5"], "it did not go on from its checkpoint"
    assert resumed.curves == EvaluationResults.load(finished / "metrics.json").curves
    assert not (out / ".unfinished").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff\xfe{\x00",
        b"[" * 1000,
        b'{"config": {}}',
        b'{"config": {}, "finished": []}',
        b'{"config": {}, "finished": {"pretrain": "1"}}',
        b'{"config": {}, "finished": {"pretrain": NaN}}',
    ],
)
def test_a_state_that_is_none_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json is damaged.*delete"):
        finished_report(tiny_config(), tmp_path)


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_when_there_is_room_again(
    finished: Path, tmp_path: Path
) -> None:
    """Refuse to write in the first stage, then in the results: what was there stays the same."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "demo"
    for folder in (out, Path(shutil.copytree(finished, tmp_path / "copy"))):
        state = folder / "state.json"
        if state.is_file():
            content = json.loads(state.read_text())
            del content["finished"]["report"]
            state.write_text(json.dumps(content))
        before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                run(tiny_config(), folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        after = {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
        assert set(after) - {out / "state.json"} == set(before)
        assert all(
            after[file] == before[file]
            for file in before
            if file.suffix in (".gif", ".png", ".html")
        )
    resumed = run(tiny_config(), out)
    assert resumed.curves == EvaluationResults.load(finished / "metrics.json").curves


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "anyflow", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "huge"], ["--budget", "'fast'", "'full'"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--out", "file.txt"], ["file.txt", "is a file"]),
        (["--out", "file.txt/below"], ["file.txt"]),
        (["--out", "full"], ["full", "not empty"]),
        (["--out", "damaged"], ["damaged"]),
        (["--device", "warp"], ["--device", "'warp'"]),
        (["--budgets", "fast"], ["--budgets"]),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.txt").write_text("not a folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["demo", "--no-open", *arguments])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    for word in words:
        assert word in result.stderr
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"
    if not arguments[0].startswith("--budget"):  # typer frames its own usage errors
        assert result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder whose ``run`` is a whole demo on the CI budget."""
    folder = tmp_path_factory.mktemp("fast")
    result = cli("demo", "--budget", "fast", "--out", "run", "--no-open", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "report.html" in result.stdout
    return folder


@pytest.mark.slow
def test_fast_demo_shows_the_any_step_property(fast: Path) -> None:
    """Run the whole command on the CI budget.

    Only what held with a wide margin on several seeds is asserted.
    """
    fd = EvaluationResults.load(fast / "run" / "metrics.json").values("fd")
    assert fd["flow_matching"][1] / fd["pretrain"][1] > 5
    assert fd["flow_matching"][2] / fd["pretrain"][2] > 2
    assert fd["pretrain"][16] / fd["pretrain"][4] < 1.3
    assert fd["on_policy"][1] / fd["pretrain"][1] < 1.05

    second = cli("demo", "--budget", "fast", "--out", "run", "--no-open", cwd=fast)
    assert second.returncode == 0 and "already holds a finished run" in second.stdout
    other = cli("demo", "--budget", "full", "--out", "run", "--no-open", cwd=fast)
    assert other.returncode == 2 and "budget" in other.stderr


NOTEBOOK = Path(__file__).parents[2] / "examples" / "any_step.ipynb"


def test_the_notebook_is_committed_without_results() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 5
    assert all(
        not cell.outputs and cell.execution_count is None and not cell.metadata for cell in cells
    )


@pytest.mark.slow
def test_the_notebook_runs_on_what_the_demo_leaves(
    fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYFLOW_DEMO", str(fast / "run"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]), prepend=os.pathsep)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(
        output.text
        for output in outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    assert len(pictures) == 3
    rows = re.findall(r"^(flow map|flow matching) +1: +([0-9.]+)", printed, re.MULTILINE)
    first = {name: float(value) for name, value in rows}
    assert first["flow map"] < first["flow matching"] / 4
    assert printed.count("standard deviation") == 3 and "largest difference" in printed
