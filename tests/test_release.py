"""Compare what a release has beside the code: the change log, the citation, the templates."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import anyflow

ROOT = Path(__file__).resolve().parent.parent
HOST = "https://github.com/anyflow-video/anyflow"


def _yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_top_of_the_change_log_is_this_version() -> None:
    """Require a released version to have a date, and one under development to be newer."""
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](.*)$", log, re.MULTILINE)
    (top, date), *older = sections
    if ".dev" in anyflow.__version__:
        assert (top, date) == ("Unreleased", "")
    else:
        assert top == anyflow.__version__ and re.fullmatch(r" - \d{4}-\d\d-\d\d", date)
    numbers = [tuple(map(int, version.split("."))) for version, _ in older]
    assert numbers == sorted(numbers, reverse=True)
    assert all(n < tuple(map(int, anyflow.__version__.split(".")[:3])) for n in numbers)
    assert set(re.findall(r"^### (.*)$", log, re.MULTILINE)) <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    }


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = _yaml("CITATION.cff")
    assert citation["version"] == anyflow.__version__ and citation["cff-version"] == "1.2.0"
    assert citation["repository-code"] == HOST and "2605.13724" in citation["references"][0]["url"]
    assert {"message", "title", "authors", "license"} <= set(citation)


@pytest.mark.parametrize("name", ["bug_report", "question"])
def test_an_issue_asks_for_what_the_doctor_prints(name: str) -> None:
    template = _yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(template)
    (doctor,) = (field for field in template["body"] if field["id"] == "doctor")
    assert doctor["attributes"]["label"] == "anyflow doctor --json"


def test_the_workflow_calls_the_two_commands_of_the_readme() -> None:
    commands = [
        step.get("run", "") for step in _yaml(".github/workflows/ci.yml")["jobs"]["check"]["steps"]
    ]
    assert "make test" in commands and any(command.startswith("make demo") for command in commands)
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {command.split()[1] for command in commands if command.startswith("make")} <= targets
