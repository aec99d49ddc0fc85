"""Run ``anyflow doctor``, the real command, on this installation and on broken ones."""

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import anyflow
from anyflow.cli import app
from anyflow.doctor.environment import Environment, Gpu, Program, environment, extension_warnings
from anyflow.doctor.page import Page
from anyflow.doctor.requirements import (
    Package,
    VideoCodec,
    hub,
    install_commands,
    package_problems,
    packages,
    video_encoder,
)
from anyflow.doctor.self_check import CASES
from anyflow.ops.backend import OPERATORS

PEFT = {"train": "pip install peft"}
DOCTOR = ("-m", "anyflow", "doctor", "--device", "cpu")
PACKAGE = Path(anyflow.__file__).parent
COMPILED = {"TRITON_INTERPRET": "0"}  # kernels are not interpreted, so a CPU runs none


def python(
    *arguments: str,
    cwd: Path,
    path: Sequence[str | Path] = (PACKAGE.parent,),
    more: Mapping[str, str] | None = None,
) -> CompletedProcess[str]:
    """Run Python with folders to import from, 80 columns wide, without the tests' variables."""
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ANYFLOW_", "TRITON_", "FORCE_COLOR"))
    }
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "80"} | dict(more or {})
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def python_on(package: Path, *arguments: str) -> CompletedProcess[str]:
    """Run Python on a copy of the package, out of reach of an installation of the original."""
    installed = [
        folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))
    ]
    return python("-S", *arguments, cwd=package.parent, path=[package.parent, *installed])


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return the folder of a copy of the package without its extension."""
    ignored = shutil.ignore_patterns("__pycache__", "_C.*")
    return Path(shutil.copytree(PACKAGE, tmp_path / "site" / "anyflow", ignore=ignored))


def test_what_decides_numbers_is_listed_and_must_be_there() -> None:
    found = packages()
    assert all(package.problem is None for package in found)
    for package in found:
        assert package.version == importlib.metadata.version(package.name)
    names = {g: {p.name for p in found if p.group == g} for g in ("sample", "train", "evaluate")}
    assert names["train"] == {"peft", "pyarrow", "pyyaml", "pydantic"}
    assert names["evaluate"] == {"opencv-python-headless", "torchmetrics"}
    assert {"av", "ftfy", "diffusers", "transformers", "accelerate"} <= names["sample"]
    assert install_commands(found) == {}


def test_a_package_that_is_missing_old_or_broken_is_a_problem_with_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("av", "peft", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ftfy", raising=False)
    (tmp_path / "ftfy.py").write_text("raise OSError('libthing.so: cannot open\\nshared object')\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = packages({"numpy": "99.1"})
    problems = {package.name: package.problem for package in found if package.problem}
    version = importlib.metadata.version("numpy")
    assert problems == {
        "ftfy": "ftfy is installed, but does not import: libthing.so: cannot open shared object",
        "numpy": f"numpy {version} is older than 99.1, and may give other numbers: pip install "
        "--upgrade numpy",
        "av": "av is not installed, and anyflow sample needs it: pip install av",
        "peft": "peft is not installed, and anyflow train needs it: pip install peft",
        "pyarrow": "pyarrow is not installed, and anyflow train needs it: pip install pyarrow",
    }
    assert install_commands(packages()) == {
        "sample": "pip install av",
        "train": "pip install peft pyarrow",
    }
    encoder = video_encoder()
    assert encoder.codec is None and encoder.problem.endswith("pip install av")
    # sampling does without peft and pyarrow, and the encoder's problem is that of av
    needed = [problem for name, problem in problems.items() if name not in ("peft", "pyarrow")]
    assert sorted(package_problems(found, encoder)) == sorted(needed)
    alone = VideoCodec(None, None, "no file", None)
    assert package_problems([], alone) == ["no file"]


def test_the_encoder_is_the_one_that_wrote_a_file() -> None:
    assert video_encoder() == VideoCodec("libx264", "h264", None, None)


def test_the_cache_of_models_is_counted(tmp_path: Path) -> None:
    for i, name in enumerate(("models--a--b", "models--c--d", "datasets--e--f")):
        blobs = tmp_path / "hub" / name / "blobs"
        blobs.mkdir(parents=True)
        with (blobs / "x").open("wb") as file:
            file.truncate((i + 1) * 10**9)  # holes take no space
    code = """
from huggingface_hub import constants
from anyflow.doctor.requirements import hub
print(hub())
constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = "/absent/hub", False
print(hub())
"""
    more = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert python("-c", code, cwd=tmp_path, more=more).stdout.splitlines() == [
        f"Hub(cache='{tmp_path}/hub', models=2, gigabytes=3.0, offline=True)",
        "Hub(cache='/absent/hub', models=0, gigabytes=0.0, offline=False)",
    ]
    assert hub().cache


def test_every_operator_has_a_case() -> None:
    assert set(CASES) == set(OPERATORS)


@pytest.mark.slow
def test_a_sound_installation_passes(tmp_path: Path) -> None:
    result = python(*DOCTOR, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\x1b" not in result.stdout and result.stdout.isascii()
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert f"anyflow {anyflow.__version__} in {PACKAGE}" in [
        " ".join(line.split()) for line in lines
    ]
    assert lines[-1].startswith("All is well")
    assert ["ftfy", importlib.metadata.version("ftfy")] in [line.split() for line in lines]
    assert "MP4 files  H.264 by libx264" in lines
    assert max(map(len, lines)) <= 80
    for op in OPERATORS:
        (row,) = (
            line
            for line in lines
            if line.startswith(f"{op} ") and " eager " in line and line.endswith(" ok")
        )
        assert len(row) <= 80


@pytest.mark.slow
def test_wrong_numbers_fail(tmp_path: Path) -> None:
    """Replace kernels of the extension, where torch finds them, by wrong ones of three kinds."""
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
    wrong = {
        (c["op"], c["backend"], c["dtype"]): c["problem"] for c in report["checks"] if c["problem"]
    }
    assert report["ok"] is False and len(report["problems"]) == len(wrong)
    # A ten-thousandth is below what bf16 resolves; fp32 shows it.
    assert wrong.pop(("layer_norm_modulate", "native", "float32")).startswith("values are off by ")
    for dtype in ("float32", "bfloat16"):
        assert wrong.pop(("gated_residual", "native", dtype)).startswith("gradients are off by ")
        assert wrong.pop(("residual_layer_norm", "native", dtype)).startswith(
            "values are not finite"
        )
    assert not wrong


@pytest.mark.slow
def test_without_the_extension(package: Path) -> None:
    result = python_on(package, *DOCTOR)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert str(PACKAGE) not in result.stdout
    page = " ".join(result.stdout.split())
    assert page.endswith("1 problem.")
    assert "- the native extension anyflow._C is not built; build it with `pip install" in page
    assert "native not run for" in result.stdout and "FAIL" not in result.stdout


def test_an_extension_that_does_not_load(package: Path) -> None:
    (package / next(PACKAGE.glob("_C.*.so")).name).write_bytes(b"not a library")
    code = """
import os
from anyflow.doctor.environment import load_operators
# where the variable hides the error from an import, the doctor still shows it
for variable in (None, "eager"):
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
    assert report["environment"]["cores"] >= 1 and "commit" in report["environment"]
    assert {
        "name": "av",
        "version": importlib.metadata.version("av"),
        "group": "sample",
        "problem": None,
    } in report["packages"]
    assert report["video_encoder"]["name"] == "libx264" and report["install"] == {}
    assert set(report["hub"]) == {"cache", "models", "gigabytes", "offline"}
    assert (
        report["extension"]["instruction_set"]
        in report["extension"]["build_info"]["cpu_instruction_sets"]
    )
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
    result = CliRunner().invoke(
        app, ["doctor", "--device", "cpu", "--json"], env={"ANYFLOW_BACKEND": "fast"}
    )
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
    """Look for programs that the extension could not have been built without."""
    programs = environment().programs
    for name in ("c++", "cmake", "ninja"):
        program = programs[name]
        assert program is not None and Path(program.path).exists()
        assert program.version is not None and program.version[0].isdigit()


def test_page_with_gpus_and_without_programs() -> None:
    programs = {
        "c": None,
        "c++": Program("/usr/bin/c++", None),
        "nvcc": Program("/usr/bin/nvcc", "13.0"),
    }
    gpus = (Gpu("Some GPU", "9.0", 79.6), Gpu("Another [GPU]", "8.0", 39.5))
    out = io.StringIO()
    Page(out).environment(
        Environment(
            anyflow="1.0",
            location="/somewhere",
            commit="abc+",
            python="3.11",
            platform="Linux",
            torch="2.13",
            torch_built_for="CUDA 13.0",
            threads=4,
            cores=8,
            settings={"HF_HUB_OFFLINE": "1"},
            triton=None,
            driver="580.95",
            gpus=gpus,
            programs=programs,
        )
    )
    text = [line.rstrip() for line in out.getvalue().splitlines()]
    assert "CUDA            Some GPU, capability 9.0, 79.6 GiB" in text
    assert "                Another [GPU], capability 8.0, 39.5 GiB" in text
    assert "                driver 580.95" in text
    assert "triton          missing" in text
    assert "C compiler      missing: Triton needs one at run time" in text
    assert "C++ compiler    /usr/bin/c++" in text
    assert (
        "commit          abc+" in text
        and "threads         4 on 8 cores" in text
        and "HF_HUB_OFFLINE  1" in text
    )


@pytest.mark.parametrize(
    ("problems", "warnings", "commands", "verdict"),
    [
        ([], 0, {}, "All is well."),
        ([], 2, {}, "All is well, with 2 warnings."),
        ([], 0, PEFT, "All is well but for this: anyflow train needs more: pip install peft."),
        (["a\nb"], 1, PEFT, "1 problem."),
        (list("abcdefghijkl"), 0, {}, "12 problems."),
    ],
)
def test_the_last_line_is_the_verdict(
    problems: list[str], warnings: int, commands: dict[str, str], verdict: str
) -> None:
    out = io.StringIO()
    Page(out).verdict(problems, warnings, commands)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[-1] == verdict
    items = [" ".join(problem.split()) for problem in problems[:10]] + (
        ["and 2 more"] if len(problems) > 10 else []
    )
    assert [line for line in lines if line.startswith("- ")] == [f"- {item}" for item in items]


def test_the_page_says_what_is_missing_and_broken_by_what_needs_it() -> None:
    out = io.StringIO()
    found = (
        Package("sample", "torch", "2.13", None),
        Package("sample", "av", "18.1", "av is installed, but does not import: x"),
        Package("train", "peft", None, "peft is not installed"),
    )
    Page(out).packages(found, install_commands(found))
    assert [line.rstrip() for line in out.getvalue().splitlines()][2:] == [
        "sample  torch  2.13",
        "        av     18.1: av is installed, but does not import: x",
        "train   peft   missing",
        "               pip install peft",
    ]


def test_the_command_line_stays_light(tmp_path: Path) -> None:
    code = (
        "import sys, anyflow.cli; print([m for m in ('torch', 'rich.table', 'anyflow.doctor') if m "
        "in sys.modules])"
    )
    assert python("-c", code, cwd=tmp_path).stdout.strip() == "[]"
