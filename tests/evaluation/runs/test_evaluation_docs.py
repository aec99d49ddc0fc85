"""Run every command of docs/evaluation.md, on tiny models and small videos."""

import json
import re
import shlex
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.evaluation.runs import EvaluationRecord

PAGE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
COMMANDS = re.findall(r"^    (?:torchrun .* -m )?anyflow (.*)$", PAGE, flags=re.MULTILINE)
OPTION = r"--[a-z][a-z-]+"
FEW = ["--steps", "1", "--reference-steps", "2", "--num-samples", "2"]
SMALL = [
    "--height",
    "16",
    "--width",
    "16",
    "--num-frames",
    "5",
    "--device",
    "cpu",
    "--dtype",
    "float32",
]


@pytest.fixture
def workplace(
    wan_model: Path,
    shapes_model: Path,
    vbench_python: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Make a folder with what the page's commands name, and enter it."""
    monkeypatch.chdir(tmp_path)
    sizes = {
        "num_attention_heads": 1,
        "attention_head_dim": 12,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    sizes |= {"text_dim": 16, "freq_dim": 16, "ffn_dim": 16}
    for name in ("model", "other", "wan"):
        for part in ("vae", "text_encoder", "tokenizer"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / part).symlink_to(wan_model / part)
        kind = (
            diffusers.WanTransformer3DModel
            if name == "wan"
            else diffusers.AnyFlowTransformer3DModel
        )
        torch.manual_seed(len(name))
        kind(**sizes).save_pretrained(tmp_path / name / "transformer")
        diffusers.FlowMapEulerDiscreteScheduler(shift=5.0).save_pretrained(
            tmp_path / name / "scheduler"
        )
    shutil.copytree(shapes_model, tmp_path / "runs" / "demo" / "checkpoints" / "on_policy")
    (tmp_path / "runs" / "demo" / "state.json").write_text(
        json.dumps({"config": {"seed": 0}, "finished": {}})
    )
    (tmp_path / "prompts.txt").write_text("a red disc moves\n")
    (tmp_path / "vbench-env").symlink_to(vbench_python.parents[1])
    return tmp_path


@pytest.mark.slow
def test_the_commands(workplace: Path) -> None:
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        arguments = shlex.split(
            command.replace("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", "model")
        )
        if "--report-only" not in arguments:
            arguments += FEW if "runs/demo" in arguments else [*FEW, *SMALL]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (command, result.output)
    records = {
        path.parent.name: EvaluationRecord.load(path)
        for path in workplace.glob("*/evaluation.json")
    }
    assert list(records["comparison"].models) == ["student", "wan-student", "teacher"]
    assert records["evaluation"].sets["model"]["vbench_imaging_quality"] == {1: 0.15}
    demo = EvaluationRecord.load(workplace / "runs" / "demo-evaluation" / "evaluation.json")
    assert list(demo.sets["demo"]["fd"]) == [1]


def test_every_option_and_metric_that_the_page_names_is_one() -> None:
    known = set(
        re.findall(
            OPTION, CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200"}).output
        )
    )
    of_others = {"--nproc-per-node", "--prompt_file"}
    assert set(re.findall(r"--[a-z][a-z_-]+", PAGE)) - of_others <= known
    from anyflow.evaluation.runs.measuring import METRICS

    table = PAGE.partition("## Metrics")[2].partition("Weights are never")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == set(METRICS)
