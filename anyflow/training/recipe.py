"""Read and write recipes: YAML files and overrides, checked against the dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from anyflow.training.config import Recipe
from anyflow.training.network_config import NO_ADAPTERS, NOT_CAUSAL
from anyflow.training.yaml_source import Located, RecipeError, read_file, read_override, write_yaml
from anyflow.utils.documents import shortened
from anyflow.utils.packages import missing
from anyflow.utils.validation import SettingError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

try:
    from pydantic import TypeAdapter, ValidationError
except ImportError as error:
    raise ImportError(missing("reading a recipe", "pydantic"), name="pydantic") from error

__all__ = ["RecipeError", "dump_recipe", "load_recipe", "print_config"]

_Path = tuple[int | str, ...]

_LISTED = 30  # problems
# Keys that a recipe gives elsewhere, or not at all; null is allowed, as older recipes have it.
_ELSEWHERE = {
    "teacher.lora": NO_ADAPTERS["teacher"],
    "on_policy.teacher.lora": NO_ADAPTERS["teacher"],
    "on_policy.critic.lora": NO_ADAPTERS["critic"],
    "teacher.causal": NOT_CAUSAL,
    "on_policy.teacher.causal": NOT_CAUSAL,
    "on_policy.critic.causal": NOT_CAUSAL,
    "causal": "give student.causal, which makes the model causal, and pretrain.causal",
    "on_policy.method.pretrain": "give these keys in the recipe's own top-level pretrain",
}
_EXPECTED = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dataclass_type": "must be a mapping",
    "too_long": "has too many items",
}


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Each of these is laid over the one before, mappings key by key: the defaults, the file named by
    ``base:`` (relative to the file that names it, or a recipe that comes with anyflow, by name),
    the file itself, the overrides in their order. A section that is given in part keeps the
    recipe's defaults for the rest: with ``optimizer: {lr: 1e-4}`` the warm-up stays.

    Args:
        path: YAML file, or the name of a recipe that comes with anyflow, such as
            ``"smoke_pretrain"``.
        overrides: ``key.key=value``, the value as YAML.

    Raises:
        RecipeError: a file cannot be read, an override is malformed, a key is unknown or missing, a
            value has the wrong type or cannot work. All problems of keys and values are listed, a
            line each: place, key, what is wrong.
    """
    tree = read_file(path)
    for text in overrides:
        tree = tree.merged(read_override(text))
    tree = dataclasses.replace(tree, place=str(path))
    problems: list[str] = []
    values = _with_defaults(tree, Recipe, None, (), problems)
    try:
        # JSON, because only there does pydantic's strict mode take mappings and lists for
        # dataclasses and tuples.
        recipe = _adapter().validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems += [_problem(tree, details) for details in error.errors(include_url=False)]
    if problems:
        lines = list(dict.fromkeys(problems))
        more = (
            [f"{tree.place}: {len(lines) - _LISTED} more problems"] if len(lines) > _LISTED else []
        )
        raise RecipeError("\n".join(lines[:_LISTED] + more))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with every value; :func:`load_recipe` reads an equal one from it."""
    return write_yaml(dataclasses.asdict(recipe))


def print_config(path: Path | str, overrides: Sequence[str] = ()) -> str:
    """Return what a recipe with overrides amounts to, as YAML with every value.

    Raises:
        RecipeError: as :func:`load_recipe`.
        ValueError: training would refuse the schedule, the architecture or the adapters that the
            recipe describes.
    """
    from anyflow.training.networks import check_networks
    from anyflow.training.updates import build_scheduler
    from anyflow.utils.devices import known_device

    recipe = load_recipe(path, overrides)
    if recipe.device is not None:
        known_device(recipe.device)
    scheduler = build_scheduler(recipe)
    if recipe.on_policy is not None and recipe.on_policy.method.timesteps is not None:
        scheduler.schedule(timesteps=recipe.on_policy.method.timesteps)
    check_networks(recipe)
    return dump_recipe(recipe)


@functools.cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


@functools.cache
def _sections(cls: type) -> dict[str, type]:
    """Return the fields that are dataclasses themselves, or may be None."""
    found: dict[str, type] = {}
    for name, hint in get_type_hints(cls).items():
        for candidate in (hint, *get_args(hint)):
            if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
                found[name] = candidate
    return found


def _with_defaults(tree: Located, cls: type, default: Any, path: _Path, problems: list[str]) -> Any:
    """Lay a section's plain values over ``default``; note and drop unknown keys.

    ``default`` is an instance of ``cls`` or None.
    """
    if not isinstance(tree.value, dict):
        return tree.plain()
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {} if default is None else dataclasses.asdict(default)
    for name, entry in tree.value.items():
        here = (*path, name)
        if ".".join(here) in _ELSEWHERE:
            if entry.value is not None:
                problems.append(_line(entry.place, here, _ELSEWHERE[".".join(here)]))
        elif name not in fields:
            suggested = len(problems) < _LISTED  # a search in every field's name is not cheap
            problems.append(
                _line(
                    entry.place, here, _unknown(name, list(fields)) if suggested else "unknown key"
                )
            )
        elif name in _sections(cls):
            inner = _default(fields[name]) if default is None else getattr(default, name)
            values[name] = _with_defaults(entry, _sections(cls)[name], inner, here, problems)
        else:
            values[name] = entry.plain()
    return values


def _default(field: dataclasses.Field[Any]) -> Any:
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _unknown(name: str, allowed: list[str]) -> str:
    from anyflow.training.reference import keys

    near = []
    if "stage" in allowed:  # at the top of a recipe; the key may be one of a section
        near = [key.name for key in keys() if key.name.endswith(f".{name}")][:1]
    near = near or difflib.get_close_matches(name[:100], allowed, n=1)
    return (
        f"unknown key; did you mean {near[0]}?"
        if near
        else f"unknown key; allowed are {', '.join(allowed)}"
    )


def _problem(tree: Located, details: ErrorDetails) -> str:
    path, kind = details["loc"], details["type"]
    if kind == "value_error":
        error = details["ctx"]["error"]
        text = str(error)
        if isinstance(error, SettingError):
            path, text = (*path, *filter(None, error.field.split("."))), error.text
    elif kind == "missing" and isinstance(path[-1], int):
        path, text = path[:-1], f"has too few items, got {_shown(details['input'])}"
    elif kind == "missing":
        text = "is required"
    elif kind == "literal_error":
        text = f"must be {details['ctx']['expected']}, got {_shown(details['input'])}"
    else:
        text = f"{_EXPECTED.get(kind, details['msg'])}, got {_shown(details['input'])}"
    return _line(tree.place_of(path), path, text)


def _line(place: str, path: _Path, text: str) -> str:
    key = shortened(".".join(map(str, path)))
    return f"{place}: {key}: {text}" if key else f"{place}: {text}"


def _shown(value: Any) -> str:
    return (
        "a mapping" if isinstance(value, dict) else shortened(json.dumps(value, ensure_ascii=False))
    )
