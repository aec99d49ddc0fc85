"""Hold the code of the repository to its limits: language, names, sizes.

``tools/measure_code.py`` prints the same figures.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Documents that are not in the repository, spelled so that this file does not name them itself.
# Layers of the package: each imports from those before it.
LAYERS = (
    *("utils", "kernels", "ops", "schedulers", "models", "methods", "sampling", "formats"),
    *("pipelines", "recipes", "data", "evaluation", "training", "demo", "doctor", "cli"),
)
# `anyflow evaluate` imports the demo where it is given a run of it; the kernels' own command lines
# compile them for the examples of the operators.
UPWARDS = {("evaluation", "demo"), ("kernels", "ops")}
FOREIGN = re.compile(r"\b(" + "SP" + "EC|DE" + r"SIGN)\b")
VERB_SHARE = 0.6


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """Import the script, which is in no package."""
    spec = importlib.util.spec_from_file_location("measure_code", ROOT / "tools/measure_code.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_code"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measured(tool: ModuleType) -> object:
    if not (ROOT / ".git").exists():
        pytest.skip("the files of the repository are listed by git, and this is no checkout")
    return tool.measure()


def test_no_file_refers_to_documents_that_are_not_in_the_repository() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("the files of the repository are listed by git, and this is no checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and FOREIGN.search(path.read_text(encoding="utf-8", errors="ignore")):
            found.append(name)
    assert len(listed.stdout.splitlines()) > 300 and not found


def test_docstrings_say_what_a_function_does(tool: ModuleType, measured: object) -> None:
    wrong = [d for d in measured.docstrings if d.opening() in tool.NO_OPENINGS]
    assert not wrong, f"these begin with one of {sorted(tool.NO_OPENINGS)}: {wrong}"
    assert measured.verb_share() >= VERB_SHARE


def test_a_name_of_a_class_means_one_thing(measured: object) -> None:
    assert not measured.repeated_classes()


def test_lines_end_at_the_limit_in_every_language(measured: object) -> None:
    assert {name: size.too_long for name, size in measured.sizes.items()} == {
        "product": 0,
        "tests": 0,
        "benchmarks": 0,
    }


def test_the_measure_finds_what_it_counts(tool: ModuleType) -> None:
    """Measure two docstrings: one says what a thing is, the other what a function does."""
    tree = ast.parse('"""Of a thing."""\nclass _A:\n    """Hold a thing."""\n')
    module, hidden = tool._docstrings("file.py", tree)
    assert module.opening() in tool.NO_OPENINGS and not module.begins_with_verb() and module.public
    assert hidden.begins_with_verb() and not hidden.public


def imported_layers(path: Path) -> Iterator[str]:
    """List the layers that a module imports from, at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            whole = node.module == "anyflow"
            names = [f"anyflow.{a.name}" for a in node.names] if whole else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (n.split(".")[1] for n in names if n.startswith("anyflow."))


def test_imports_point_one_way() -> None:
    wrong, seen = set(), set()
    for folder in (ROOT / "anyflow", ROOT / "kernels"):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            layer = "kernels" if "kernels" in parts else parts[1]
            if layer not in LAYERS:
                continue
            for other in imported_layers(path):
                seen.add((layer, other))
                if other in LAYERS and LAYERS.index(other) > LAYERS.index(layer):
                    wrong.add((layer, other))
    assert len(seen) > 40 and wrong == UPWARDS
