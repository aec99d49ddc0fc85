"""``anyflow doctor``: the real command, on this installation and on broken ones."""

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import anyflow
from anyflow.cli import app
from anyflow.doctor.environment import Environment, Gpu, Program, environment, extension_warnings, package_problems
from anyflow.doctor.page import Page
from anyflow.doctor.self_check import CASES
from anyflow.ops.backend import OPERATORS

DOCTOR = ("-m", "anyflow", "doctor", "--device", "cpu")
PACKAGE = Path(anyflow.__file__).parent
COMPILED = {"TRITON_INTERPRET": "0"}  # kernels are not interpreted, so a CPU runs none


def python(*arguments: str, cwd: Path, path: Sequence[str | Path] = (PACKAGE.parent,)) -> CompletedProcess[str]:
    """Run Python in a folder with folders to import from, 80 columns wide, without the variables of the tests."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ANYFLOW_", "TRITON_", "FORCE_COLOR"))}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "80"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def python_on(package: Path, *arguments: str) -> CompletedProcess[str]:
    """Run Python on a copy of the package, out of reach of an installation that finds files of the original."""
    installed = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    return python("-S", *arguments, cwd=package.parent, path=[package.parent, *installed])


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder of a copy of the package without its extension."""
    ignored = shutil.ignore_patterns("__pycache__", "_C.*")
    return Path(shutil.copytree(PACKAGE, tmp_path / "site" / "anyflow", ignore=ignored))


def test_what_decides_numbers_is_listed_and_must_be_there() -> None:
    found = environment().numbers
    assert {"ftfy", "av", "transformers", "diffusers", "torch"} <= set(found) and package_problems(found) == []
    (missing,) = package_problems({**found, "ftfy": None, "av": None})
    assert missing == "ftfy is not installed, and numbers depend on it: pip install ftfy"
    (old,) = package_problems({**found, "torch": "2.8.1"})
    assert old == "torch 2.8.1 is older than 2.9, and may give other numbers"


def test_every_operator_has_a_case() -> None:
    assert set(CASES) == set(OPERATORS)


@pytest.mark.slow
def test_a_sound_installation_passes(tmp_path: Path) -> None:
    result = python(*DOCTOR, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\x1b" not in result.stdout and result.stdout.isascii()
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert f"anyflow       {anyflow.__version__} in {PACKAGE}" in lines
    assert lines[-1].startswith("All is well")
    assert f"ftfy          {importlib.metadata.version('ftfy')}" in lines
    for op in OPERATORS:
        (row,) = (line for line in lines if line.startswith(f"{op} ") and " eager " in line and line.endswith(" ok"))
        assert len(row) <= 80


@pytest.mark.slow
def test_wrong_numbers_fail(tmp_path: Path) -> None:
    """Kernels of the extension are replaced where torch finds them, by ones that are wrong in three ways."""
    code = f"""
import sys, torch, anyflow.ops
from anyflow.ops.gated_residual import gated_residual_backward_reference
from anyflow.ops.layer_norm_modulate import layer_norm_modulate_reference
from anyflow.ops.residual_layer_norm import residual_layer_norm_reference

def inaccurate(*args):
    return layer_norm_modulate_reference(*args) * 1.0001

def negated(*args):
    dy, dgate = gated_residual_backward_reference(*args)
    return -dy, dgate

def not_a_number(*args):
    h, n = residual_layer_norm_reference(*args)
    n[-1, -1, -1] = float("nan")
    return h, n

library = torch.library.Library("anyflow", "IMPL")
library.impl("layer_norm_modulate_native", inaccurate, "CPU")
library.impl("gated_residual_backward_native", negated, "CPU")
library.impl("residual_layer_norm_native", not_a_number, "CPU")
sys.argv = ["anyflow", *{DOCTOR[2:]}, "--json"]
from anyflow.cli import main
main()
"""
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    report = json.loads(result.stdout)
    wrong = {(c["op"], c["backend"], c["dtype"]): c["problem"] for c in report["checks"] if c["problem"]}
    assert report["ok"] is False and len(report["problems"]) == len(wrong)
    # A ten-thousandth is below what bf16 resolves; fp32 shows it.
    assert wrong.pop(("layer_norm_modulate", "native", "float32")).startswith("values are off by ")
    for dtype in ("float32", "bfloat16"):
        assert wrong.pop(("gated_residual", "native", dtype)).startswith("gradients are off by ")
        assert wrong.pop(("residual_layer_norm", "native", dtype)).startswith("values are not finite")
    assert not wrong


@pytest.mark.slow
def test_without_the_extension(package: Path) -> None:
    result = python_on(package, *DOCTOR)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert str(PACKAGE) not in result.stdout
    verdict = result.stdout.splitlines()[-1]
    assert verdict.startswith("1 problem: the native extension anyflow._C is not built; build it with `pip install")
    assert "native not run for" in result.stdout and "FAIL" not in result.stdout


def test_an_extension_that_does_not_load(package: Path) -> None:
    (package / next(PACKAGE.glob("_C.*.so")).name).write_bytes(b"not a library")
    code = """
import os
from anyflow.doctor.environment import load_operators
for variable in (None, "eager"):  # where the variable hides the error from an import, the doctor still shows it
    if variable is not None:
        os.environ["ANYFLOW_BACKEND"] = variable
    extension = load_operators()
    assert "does not load with torch" in extension.problem, extension
    assert os.path.exists(extension.file) and extension.instruction_set is None
    assert os.environ.get("ANYFLOW_BACKEND") == variable
import anyflow.ops
"""
    result = python_on(package, "-c", code)
    assert result.returncode == 0, result.stderr


def test_json_has_everything() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    assert report["ok"] is True and report["problems"] == [] and report["device"] == "cpu"
    assert report["environment"]["torch"] == torch.__version__
    assert report["extension"]["instruction_set"] in report["extension"]["build_info"]["cpu_instruction_sets"]
    assert any(choice["chosen"] for choice in report["attention"].values())
    assert set(report["operators"]) == set(OPERATORS)
    checked = {(c["op"], c["backend"]) for c in report["checks"]}
    assert checked | {(s["op"], s["backend"]) for s in report["skipped"]} == {
        (op, backend) for op in OPERATORS for backend in ("eager", "triton", "native")
    }
    taken = {(op, choice["backend"]) for op, choice in report["operators"].items()}
    assert taken <= checked  # nothing is taken that was not checked
    assert all(c["forward_error"] > 0 and c["backward_error"] > 0 for c in report["checks"])


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_one_line(device: str) -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", device])
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"anyflow: --device {device!r} cannot be used here: ")


def test_an_unknown_backend_is_one_line() -> None:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json"], env={"ANYFLOW_BACKEND": "fast"})
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "ANYFLOW_BACKEND: unknown backend 'fast'" in line


def test_operators_that_cannot_run_fail() -> None:
    result = CliRunner().invoke(
        app, ["doctor", "--device", "cpu", "--json"], env={"ANYFLOW_BACKEND": "triton"} | COMPILED
    )
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert "layer_norm_modulate" in problem and "cannot run: forced by ANYFLOW_BACKEND" in problem


def test_warnings_of_the_extension() -> None:
    (text,) = (w for w in extension_warnings({"torch": "2.0.0"}) if "2.0.0" in w)
    assert torch.__version__ in text and "rebuild" in text
    assert not any("built for torch" in w for w in extension_warnings({"torch": torch.__version__}))


def test_programs_are_found_with_their_versions(tmp_path: Path) -> None:
    """Those of this environment: the extension could not have been built without them."""
    programs = environment().programs
    for name in ("c++", "cmake", "ninja"):
        program = programs[name]
        assert program is not None and Path(program.path).exists()
        assert program.version is not None and program.version[0].isdigit()


def test_page_with_gpus_and_without_programs() -> None:
    programs = {"c": None, "c++": Program("/usr/bin/c++", None), "nvcc": Program("/usr/bin/nvcc", "13.0")}
    gpus = (Gpu("Some GPU", "9.0", 79.6), Gpu("Another [GPU]", "8.0", 39.5))
    out = io.StringIO()
    Page(out).environment(
        Environment("1.0", "/somewhere", "3.11", "Linux", "2.13", "CUDA 13.0", 4, None, "580.95", gpus, programs, {})
    )
    text = [line.rstrip() for line in out.getvalue().splitlines()]
    assert "CUDA          Some GPU, capability 9.0, 79.6 GiB" in text
    assert "              Another [GPU], capability 8.0, 39.5 GiB" in text
    assert "              driver 580.95" in text
    assert "triton        missing" in text
    assert "C compiler    missing: Triton needs one at run time" in text
    assert "C++ compiler  /usr/bin/c++" in text


@pytest.mark.parametrize(
    ("problems", "warnings", "verdict"),
    [
        ([], 0, "All is well."),
        ([], 2, "All is well, with 2 warnings."),
        (["a\nb"], 1, "1 problem: a b"),
        (["a", "b", "c", "d", "e"], 0, "5 problems: a; b; c; and 2 more"),
    ],
)
def test_verdict_is_one_line(problems: list[str], warnings: int, verdict: str) -> None:
    out = io.StringIO()
    Page(out).verdict(problems, warnings)
    assert out.getvalue() == f"\n{verdict}\n"


def test_the_command_line_stays_light(tmp_path: Path) -> None:
    code = "import sys, anyflow.cli; print([m for m in ('torch', 'rich.table', 'anyflow.doctor') if m in sys.modules])"
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "[]"
