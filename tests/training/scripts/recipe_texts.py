"""Write recipes, and read the errors of loading them."""

from pathlib import Path

import pytest

from anyflow.training.recipe import RecipeError, load_recipe

SMALL = "stage: pretrain\nout: runs/a\nstudent: {path: model}\ndata: {path: latents}\n"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def errors(path: Path, *overrides: str) -> list[str]:
    """Return the lines of the error without the folder of the recipe."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()
