"""Test anyflow's own recipes: found by name from any folder, listed, and copied.

Copying replaces nothing.
"""

import os
from pathlib import Path

import pytest

from anyflow import recipes
from anyflow.training.recipe import RecipeError, load_recipe


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_recipe_has_a_summary_that_fits_a_line_beside_its_name() -> None:
    names = recipes.names()
    assert len(names) >= 18 and {
        "smoke_pretrain",
        "anyflow_pretrain_t2v",
        "teacher_t2v_14b",
    } <= set(names)
    for name in names:
        assert recipes.summary(name).endswith(".")
        assert max(map(len, names)) + 2 + len(recipes.summary(name)) <= 82


@pytest.mark.parametrize("name", ["smoke_onpolicy", "smoke_onpolicy.yaml"])
def test_a_name_is_found_from_any_folder_with_its_base(name: str) -> None:
    recipe = load_recipe(name, ["steps=3"])
    # the kind is the base's
    assert (recipe.stage, recipe.steps, recipe.data.kind) == ("on_policy", 3, "synthetic")


def test_a_file_that_exists_wins_over_a_name_and_a_folder_does_not() -> None:
    Path("smoke_teacher").mkdir()
    assert load_recipe("smoke_teacher").out == "runs/smoke_teacher"
    Path("smoke_pretrain.yaml").write_text("base: smoke_teacher\nout: runs/mine\n")
    for name in ("smoke_pretrain.yaml", "smoke_pretrain", Path("smoke_pretrain")):
        assert load_recipe(name).out == "runs/mine"
    Path("smoke_pretrain").write_text("base: smoke_pretrain.yaml\nout: runs/exact\n")
    assert load_recipe("smoke_pretrain").out == "runs/exact"
    # its base is the one beside it
    assert load_recipe("smoke_onpolicy").student.path == "runs/smoke_pretrain/model"


def test_a_path_into_a_folder_is_never_a_name() -> None:
    with pytest.raises(
        RecipeError,
        match=r"^configs/smoke_pretrain\.yaml: no such file; did you mean smoke_pretrain",
    ):
        load_recipe("configs/smoke_pretrain.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smoke_pretrian",
            "smoke_pretrian: no such file; did you mean smoke_pretrain or smoke_far_pretrain?",
        ),
        (
            "smoke",
            "smoke: no such file; did you mean smoke_far_onpolicy or smoke_far_pretrain or "
            "smoke_onpolicy or smoke_pretrain or smoke_teacher?",
        ),
        (
            "teacher_t2v_1b.yaml",
            "teacher_t2v_1b.yaml: no such file; did you mean teacher_t2v_14b or teacher_t2v",
        ),
        ("xyz", "xyz: no such file; `anyflow recipes` lists the recipes that come with anyflow"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_and_the_command_that_lists_them(
    name: str, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value).startswith(message) and "`anyflow recipes` lists" in str(caught.value)


def test_a_base_that_is_missing_suggests_the_nearest_name() -> None:
    Path("mine.yaml").write_text("out: runs/a\nbase: smoke_pretrian\n")
    with pytest.raises(
        RecipeError,
        match=r"^mine\.yaml:2: base: no such file: smoke_pretrian; did you mean smoke_pre",
    ):
        load_recipe("mine.yaml")


@pytest.mark.parametrize("name", recipes.names())
def test_a_copy_says_the_same_as_the_recipe(name: str) -> None:
    copied = recipes.copy(name, Path("new/folder"))
    assert copied == Path(f"new/folder/{name}.yaml")
    assert load_recipe(copied) == load_recipe(name)


def test_a_copy_replaces_nothing() -> None:
    Path("mine.yaml").write_text("stage: teacher\n")
    os.symlink("absent", "smoke_pretrain.yaml")
    for dest in (Path("mine.yaml"), Path()):
        with pytest.raises(
            ValueError, match=r"\.yaml exists already and is left as it is; name another file"
        ):
            recipes.copy("smoke_pretrain", dest)
    assert Path("mine.yaml").read_text() == "stage: teacher\n" and not Path("absent").exists()


def test_a_copy_that_cannot_be_written_is_an_error_of_the_system_that_names_it() -> None:
    Path("file").touch()
    with pytest.raises(OSError, match="file"):
        recipes.copy("smoke_pretrain", Path("file/mine.yaml"))


def test_an_unknown_recipe_is_not_copied() -> None:
    with pytest.raises(
        ValueError, match="smok: no recipe of this name comes with anyflow; did you mean smoke"
    ):
        recipes.copy("smok", Path())
    with pytest.raises(ValueError, match="no recipe of this name"):
        recipes.copy("../recipes/smoke_pretrain", Path())
