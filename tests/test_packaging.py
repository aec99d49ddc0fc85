"""Test the package map, the guard of `kernels/` and the cost of `import anyflow`.

Each runs in an interpreter of its own.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("diffusers", "transformers", "triton", "matplotlib", "accelerate")

has_kernels_distribution = any(d.name == "kernels" for d in importlib.metadata.distributions())
without_pypi = pytest.mark.skipif(
    has_kernels_distribution, reason="the PyPI package `kernels` is installed here"
)


def python(
    code: str, *, cwd: Path = ROOT, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter with `cwd` first on sys.path, then `path`."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def output(code: str, *, cwd: Path = ROOT, path: Path | None = None) -> str:
    done = python(code, cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pip(*args: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        *map(str, args),
    ]
    # what is found there would count as installed
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def pypi_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder that holds the distribution `kernels` from PyPI."""
    target = tmp_path_factory.mktemp("pypi")
    done = pip(
        "install",
        "--no-deps",
        "--target",
        target,
        "-c",
        ROOT / "constraints.txt",
        "kernels",
        cwd=target,
    )
    if done.returncode != 0:
        pytest.skip(f"`kernels` could not be downloaded: {done.stderr.strip()[-500:]}")
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel; CMake's folder is that of `make venv`, so nothing is compiled again."""
    out, made = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("made")
    folders = f"build --build-base={made} egg_info --egg-base={made}"
    options = ["--no-build-isolation", "--no-deps", f"--config-settings=--global-option={folders}"]
    done = pip("wheel", ".", *options, "--wheel-dir", out)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("anyflow_video-*.whl")
    return built


def test_import_anyflow_loads_nothing_heavy():
    loaded = output(f"import anyflow, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded == "[]"


def test_installed_package_map(tmp_path):
    code = "import anyflow.kernels, sys; print(anyflow.kernels.__name__, 'kernels' in sys.modules)"
    assert output(code, cwd=tmp_path) == "anyflow.kernels False"


@without_pypi
@pytest.mark.parametrize(
    "statement", ["import kernels", "from kernels import get_kernel", "import kernels.layer"]
)
def test_root_refuses_the_name_kernels(statement):
    done = python(statement)
    assert done.returncode == 1
    assert "ImportError: This folder" in done.stderr
    assert "anyflow.kernels" in done.stderr


def test_any_other_name_is_refused(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "elsewhere")
    done = python("import elsewhere", cwd=tmp_path)
    assert "ImportError: This folder" in done.stderr and "`elsewhere`" in done.stderr


@without_pypi
@pytest.mark.slow
def test_peers_import_from_the_root_without_the_pypi_package():
    code = """
import transformers
from transformers import UMT5EncoderModel, AutoTokenizer
import diffusers
from diffusers import AnyFlowTransformer3DModel, AnyFlowPipeline
from transformers.utils import is_kernels_available
print(is_kernels_available())
try:
    import kernels
except ImportError as error:
    print(str(error).startswith("This folder"))
"""
    assert output(code).split() == ["False", "True"]


@pytest.mark.slow
def test_peers_import_from_the_root_with_the_pypi_package(pypi_kernels):
    code = """
import diffusers, transformers
from diffusers import AnyFlowTransformer3DModel, AnyFlowPipeline
from transformers import UMT5EncoderModel
from diffusers.utils import is_kernels_available
print(is_kernels_available())
"""
    assert output(code, path=pypi_kernels) == "True"


@pytest.mark.slow
def test_pypi_package_takes_precedence_at_the_root(pypi_kernels):
    code = """
import sys
import kernels, kernels.layer
from kernels import get_kernel, LayerRepository
import anyflow.kernels
print(kernels.__file__)
same = kernels.layer.LayerRepository is LayerRepository
print(kernels is sys.modules["kernels"], same, hasattr(kernels, "_guard"))
print(anyflow.kernels is kernels)
"""
    file, same, ours = output(code, path=pypi_kernels).splitlines()
    assert Path(file).is_relative_to(pypi_kernels)
    assert same == "True True False"
    assert ours == "False"


@pytest.mark.slow
def test_wheel_holds_one_top_level_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = (n for n in names if n.endswith(".dist-info/top_level.txt"))
        assert archive.read(top_level).decode().split() == ["anyflow"]
    tops = {n.partition("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"anyflow"}
    assert {"anyflow/py.typed", "anyflow/kernels/__init__.py"} <= set(names)
    assert [n for n in names if n.startswith("anyflow/_C.") and n.endswith(".so")]
    assert not [n for n in names if n.endswith((".cpp", ".cu", ".h", ".cuh"))]
    # the extension makes it a wheel of one platform
    assert "-linux_" in wheel.name or sys.platform != "linux"
    data = [*(ROOT / "anyflow").rglob("*.j2"), *(ROOT / "anyflow" / "recipes").glob("*.yaml")]
    assert len(data) > 12 and {file.relative_to(ROOT).as_posix() for file in data} <= set(names)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the wheel, this one's dependencies, and pip's program."""
    environment = tmp_path_factory.mktemp("fresh") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    done = pip(
        "--python",
        environment / "bin" / "python",
        "install",
        "--no-deps",
        wheel,
        cwd=environment.parent,
    )
    assert done.returncode == 0, done.stderr
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(
        "\n".join(p for p in sys.path if Path(p).name == "site-packages")
    )
    return environment


def installed(environment: Path, program: str, *arguments: str, cwd: Path) -> str:
    """Run a program of the environment in another folder and return what it prints."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ANYFLOW"))}
    done = subprocess.run(
        [environment / "bin" / program, *arguments],
        cwd=cwd,
        env=inherited | {"COLUMNS": "500"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_serves_anyflow_kernels(environment, tmp_path):
    code = "import anyflow, anyflow.kernels as k; print(anyflow.__file__, k.__file__)"
    assert all(
        Path(f).is_relative_to(environment)
        for f in installed(environment, "python", "-c", code, cwd=tmp_path).split()
    )


@pytest.mark.slow
def test_wheel_passes_the_doctor_in_a_fresh_environment(environment, tmp_path):
    page = installed(environment, "anyflow", "doctor", "--device", "cpu", cwd=tmp_path)
    assert str(environment) in page and str(ROOT / "anyflow") not in page


@pytest.mark.slow
def test_wheel_lists_its_recipes_and_trains_by_name(environment, tmp_path):
    assert "smoke_pretrain  " in installed(environment, "anyflow", "recipes", cwd=tmp_path)
    assert "Finished 1 step" in installed(
        environment, "anyflow", "train", "smoke_pretrain", "steps=1", cwd=tmp_path
    )
    assert (tmp_path / "runs" / "smoke_pretrain" / "model" / "transformer").is_dir()
