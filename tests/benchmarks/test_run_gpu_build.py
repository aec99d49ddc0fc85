"""Test benchmarks/gpu/build.py: the package that processes find, the extension that is used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import anyflow._C

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = Path(anyflow._C.__file__)


def python(runner: Path, code: str, path: Path | None = None) -> Any:
    """Run code that prints one JSON value as one of the runner's processes, in its own folder."""
    before = (
        f"import json, sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); from gpu import "
        "build\n"
    )
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "ANYFLOW_GPU_RUNNER": str(runner)
    }
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", before + code],
        cwd="/",
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_process_finds_this_checkout_and_no_other_one(tmp_path: Path) -> None:
    """Test it with another copy first on the path, and in a child process too."""
    other = tmp_path / "other"
    (other / "anyflow" / "kernels").mkdir(parents=True)
    for name in ("anyflow/__init__.py", "anyflow/kernels/__init__.py", "anyflow/kernels/tokens.py"):
        (other / name).write_text("raise ImportError('the other copy')\n")
    code = (
        "import subprocess\n"
        "build.find_package('cpu')\n"
        "child = 'import json, anyflow as a, anyflow.kernels.tokens as t; "
        "print(json.dumps([a.__file__, t.__file__]))'\n"
        "done = subprocess.run([sys.executable, '-c', child], cwd=build.workplace(), "
        "capture_output=True, text=True)\n"
        "import anyflow, anyflow.kernels.tokens as tokens\n"
        "print(json.dumps([anyflow.__file__, tokens.__file__, *json.loads(done.stdout or "
        "repr(done.stderr))]))\n"
    )
    before = {path for path in ROOT.iterdir() if path.name != "build"}
    files = [Path(file).resolve() for file in python(tmp_path / "runner", code, other)]
    assert files == [ROOT / "anyflow" / "__init__.py", ROOT / "kernels" / "tokens.py"] * 2
    assert {path for path in ROOT.iterdir() if path.name != "build"} == before
    link = tmp_path / "runner" / "site" / "anyflow" / "gone.py"
    link.symlink_to(ROOT / "anyflow" / "gone.py")  # of a module that the checkout had before
    python(tmp_path / "runner", "build.lay_out(); print(0)")
    assert not link.is_symlink() and (link.parent / "ops").is_dir()


@pytest.mark.slow
def test_an_extension_of_the_same_sources_is_kept(tmp_path: Path) -> None:
    """Test that one of other sources is forgotten, and one without a record is used if it loads."""
    built = tmp_path / "anyflow" / EXTENSION.name
    record = tmp_path / "extension.json"
    built.parent.mkdir()
    shutil.copy(EXTENSION, built)
    code = (
        "status, reason, data = build.prepare_extension('cpu', 1.0); print(json.dumps([status, "
        "reason, data]))"
    )
    status, reason, data = python(tmp_path, code)
    assert (status, reason, data["sources"]) == ("done", None, "not recorded")
    assert Path(data["file"]).resolve() == built
    record.write_text(
        json.dumps({"sources": python(tmp_path, "print(json.dumps(build._sources()))")})
    )
    _, _, data = python(tmp_path, code)
    assert data["sources"] == "those of the checkout" and Path(data["file"]).resolve() == built
    record.write_text('{"sources": "others"}')
    status, _, data = python(tmp_path, code)
    # the one that is installed
    assert status == "done" and Path(data["file"]).resolve() == EXTENSION.resolve()
    assert not built.exists() and not record.exists()
