"""Find the recipes that come with anyflow by name: YAML files beside this one.

Listing and copying them needs none of the packages that training needs.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from anyflow.utils.documents import shortened
from anyflow.utils.writing import writing

FOLDER = Path(__file__).parent
_SUFFIX = ".yaml"


def names() -> list[str]:
    """Return the names of the recipes that come with anyflow, sorted."""
    return sorted(file.stem for file in FOLDER.glob(f"*{_SUFFIX}"))


def summary(name: str) -> str:
    """Return the first line of a recipe's first comment, which says what the recipe is for."""
    first = (FOLDER / f"{name}{_SUFFIX}").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()


def locate(recipe: Path | str, folder: Path | None = None) -> Path:
    """Return the file that a path or a name stands for.

    The first of these that exists: the path itself, the path with ``.yaml`` after it, the recipe of
    this name that comes with anyflow. A name has no folder in it; ``.yaml`` at its end may be left
    out.

    Args:
        recipe: path or name.
        folder: folder that the path is relative to; the working directory if left out.

    Returns:
        The file, which may be missing: then it is the path as given, relative to ``folder``.
    """
    path = Path(recipe) if folder is None else folder / recipe
    for candidate in (path, path.with_name(f"{path.name}{_SUFFIX}") if path.name else path):
        if os.path.lexists(candidate) and not candidate.is_dir():
            return candidate
    return FOLDER / f"{_name(recipe)}{_SUFFIX}" if _name(recipe) in names() else path


def hint(recipe: Path | str) -> str:
    """Say which recipes a path or name that was not found may have meant; empty if none is near."""
    text = Path(recipe).name.removesuffix(_SUFFIX)[:100]
    near = [
        name for name in names() if text and name.startswith(text)
    ] or difflib.get_close_matches(text, names())
    if near:
        return (
            f"; did you mean {' or '.join(near)}? `anyflow recipes` lists the recipes that come "
            "with anyflow"
        )
    if _name(recipe) is not None:
        return "; `anyflow recipes` lists the recipes that come with anyflow"
    return ""


def require(name: str) -> Path:
    """Return the file of a recipe that comes with anyflow.

    Args:
        name: with or without ``.yaml``.

    Raises:
        ValueError: no recipe has this name; the nearest ones are listed.
    """
    if _name(name) not in names():
        raise ValueError(
            f"{shortened(name)}: no recipe of this name comes with anyflow{hint(name)}"
        )
    return FOLDER / f"{_name(name)}{_SUFFIX}"


def copy(name: str, dest: Path) -> Path:
    """Copy a recipe that comes with anyflow, to be changed; its ``base:`` is found by name.

    Args:
        name: with or without ``.yaml``.
        dest: new file, if it ends with ``.yaml`` or ``.yml``, else the folder for it; missing
            folders are made.

    Returns:
        The new file.

    Raises:
        ValueError: no recipe has this name, or there is such a file already.
        OSError: the file cannot be written.
    """
    source = require(name)
    target = dest if dest.suffix in (_SUFFIX, ".yml") and not dest.is_dir() else dest / source.name
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = target.open("xb")
        except FileExistsError:
            raise ValueError(
                f"{shortened(target)} exists already and is left as it is; name another file"
            ) from None
        with file:
            file.write(source.read_bytes())
    return target


def _name(recipe: Path | str) -> str | None:
    """Return what a path names, without the suffix, if it has no folder in it; else None."""
    text = str(recipe)
    return None if os.sep in text else text.removesuffix(_SUFFIX)
