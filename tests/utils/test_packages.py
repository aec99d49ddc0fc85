"""Test that the commands in errors are right, and that extras are what the groups say."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from anyflow.utils.packages import (
    DEMO,
    DISTRIBUTION,
    EVALUATE,
    SAMPLE,
    TRAIN,
    install_command,
    is_missing,
    missing,
    module_name,
)

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
ADVICE = re.compile(r"pip3? install\b[^\n`]*?(?<![\w./-])anyflow(?![\w-]|[./]\w)")


def _texts() -> Iterator[Path]:
    """Return every text of the project: what git tracks and what is new.

    In a copy without git, all files of the folders below count.
    """
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    listed = (
        [ROOT / name for name in done.stdout.splitlines()]
        if done.returncode == 0
        else ROOT.glob("[!.]*/**/*.*")
    )
    for path in listed:
        if path.is_file() and path.suffix not in (".png", ".gif", ".so", ".pyc"):
            yield path


def test_nothing_advises_to_install_the_other_project_of_this_name() -> None:
    for wrong in (
        "anyflow[train]",
        "'anyflow'",
        "--no-build-isolation anyflow[flash]",
        "-U anyflow.",
    ):
        assert ADVICE.search("pip install " + wrong)
    for right in (
        "anyflow-video",
        "'anyflow-video[train]'",
        "anyflow_video-1-cp311.whl",
        "./anyflow",
        "-e .",
    ):
        assert not ADVICE.search("pip install " + right)
    texts = list(_texts())
    assert {"README.md", "pyproject.toml", "sampling.md", "packages.py"} <= {
        path.name for path in texts
    }
    found = [
        (path, match[0])
        for path in texts
        for match in ADVICE.finditer(path.read_text("utf-8", "replace"))
    ]
    assert found == []


def test_the_groups_are_what_is_installed_with_the_distribution_and_its_extras() -> None:
    assert re.search(r'^name = "(.*)"$', PYPROJECT, re.MULTILINE)[1] == DISTRIBUTION
    lists = dict(re.findall(r"^(\w+) = \[(.*?)\]\n", PYPROJECT, re.MULTILINE | re.DOTALL))
    names = {key: set(re.findall(r'"([\w-]+)', value)) for key, value in lists.items()}
    assert {*SAMPLE, *DEMO} < names["dependencies"]
    assert set(TRAIN) == names["train"] and set(EVALUATE) == names["eval"]
    assert 'all = ["anyflow-video[train,eval]"]' in PYPROJECT and {
        "flash",
        "dev",
        "docs",
        "eval",
    } <= set(names)


@pytest.mark.parametrize("package", [*SAMPLE, *DEMO, *TRAIN, *EVALUATE])
def test_a_package_is_found_by_the_name_of_its_module(package: str) -> None:
    assert not is_missing(package)
    files = distribution(package).files
    assert files is None or any(str(file).startswith(f"{module_name(package)}/") for file in files)


def test_the_command_names_what_is_missing_of_the_same_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert install_command("peft") == "pip install peft"
    assert install_command("no-such-package") == "pip install no-such-package"
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert (
        install_command("peft") == "pip install peft pyyaml"
        and install_command("av") == "pip install av"
    )
    expected = (
        "reading a recipe needs the package pyyaml, which is not installed: pip install pyyaml"
    )
    assert missing("reading a recipe", "pyyaml") == expected


def test_the_installed_distribution_has_the_new_name() -> None:
    try:
        requires = distribution(DISTRIBUTION).requires
    except PackageNotFoundError:
        pytest.skip(f"{DISTRIBUTION} is not installed: a checkout on the path only")
    assert requires is not None and any(entry.startswith("av>=") for entry in requires)
