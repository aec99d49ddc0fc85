"""Test ``anyflow recipes``, and ``anyflow train`` by the name of a recipe."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from anyflow import recipes
from anyflow.cli import app


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_list_has_a_line_for_each_recipe() -> None:
    lines = _run("recipes").stdout.splitlines()
    for name, line in zip(recipes.names(), lines, strict=False):
        assert line.split(maxsplit=1) == [name, recipes.summary(name)]
    assert "anyflow recipes --copy NAME" in lines[-2]


def test_a_recipe_is_printed_as_it_is() -> None:
    printed = _run("recipes", "smoke_teacher").stdout
    assert printed == (recipes.FOLDER / "smoke_teacher.yaml").read_text()


def test_a_recipe_is_copied_and_the_copy_is_used() -> None:
    done = _run("recipes", "--copy", "smoke_teacher", "mine.yaml")
    assert done.exit_code == 0
    assert done.stdout == "Copied to mine.yaml. Change it, then: anyflow train mine.yaml\n"
    file = Path("mine.yaml")
    file.write_text(file.read_text().replace("runs/smoke_teacher", "runs/mine"))
    shown = _run("train", "mine.yaml", "--print-config")
    assert shown.exit_code == 0 and "out: runs/mine\n" in shown.stdout
    assert [file.name for file in Path().iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smok",), "smok: no recipe of this name comes with anyflow; did you mean smoke_"),
        (("--copy",), "--copy needs the name of a recipe"),
        (("smoke_teacher", "mine.yaml"), "'mine.yaml' is where to copy a recipe to: add --copy"),
        (("--copy", "smoke_teacher", "there.yaml"), "there.yaml exists already"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments: tuple[str, ...], message: str) -> None:
    Path("there.yaml").touch()
    done = _run("recipes", *arguments)
    assert (
        done.exit_code == 2
        and done.stderr.startswith(f"anyflow: {message}")
        and done.stderr.count("\n") == 1
    )


def test_train_finds_a_recipe_by_name() -> None:
    assert "runs/smoke_teacher" in _run("train", "smoke_teacher", "--print-config").stdout
    done = _run("train", "smoke_teachr")
    assert done.exit_code == 2
    assert done.stderr.startswith("anyflow: smoke_teachr: no such file; did you mean smoke_teacher")
    assert "`anyflow recipes`" in done.stderr and done.stderr.count("\n") == 1
