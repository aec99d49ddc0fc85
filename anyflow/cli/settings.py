"""Read the settings of ``anyflow train``, and correct settings in the form of other trainers."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyflow import recipes
from anyflow.utils.documents import shortened

if TYPE_CHECKING:
    from anyflow.training.reference import Key

OPTIONS = ("print-config", "resume", "no-resume", "help")
# What other trainers call these settings.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "max_steps": "steps",
    "max_train_steps": "steps",
    "output_dir": "out",
    "train_batch_size": "data.batch_size",
    "dataset": "data.path",
    "data_dir": "data.path",
    "model": "student.path",
    "model_path": "student.path",
    "lora_rank": "student.lora.rank",
    "mixed_precision": "precision",
    "gradient_checkpointing": "activation_checkpointing",
    "report_to": "loggers",
    "max_grad_norm": "optimizer.clip_norm",
}
_NAME = r"\w+(?:\.\w+)*"


@dataclass(frozen=True)
class _Word:
    """Hold one setting as it was given.

    Args:
        given: the arguments that it took.
        name: name of the setting, with underscores.
        values: what it was given; empty for a name alone.
    """

    given: list[str]
    name: str
    values: list[str]


def settings_problem(arguments: Sequence[str]) -> str | None:
    """Say how the arguments of ``anyflow train`` should be written, or return None where they are.

    Args:
        arguments: the recipe and the settings, with options that the command does not have among
            them.

    Returns:
        A line for each setting that is not written ``key=value``, and one where the recipe is
        missing or comes last.
    """
    if arguments and not _is_option(arguments[0]) and "=" not in arguments[0]:
        recipe, rest = arguments[0], list(arguments[1:])
    else:
        recipe, rest = None, list(arguments)
    if recipe is not None and all(_is_setting(text) for text in rest):
        return None
    from anyflow.training.reference import keys

    known = {key.name: key for key in keys()}
    lines, written = [], []
    while rest:
        if _is_setting(rest[0]):
            written.append(rest.pop(0))
        elif recipe is None and _is_recipe(rest[0]):
            recipe = rest.pop(0)
        else:
            line, setting = _advice(_take(rest, known, recipe is None), known)
            lines.append(line)
            written += setting
    command = shlex.join(["anyflow", "train", "RECIPE" if recipe is None else recipe, *written])
    if recipe is None:
        lines.append(
            f"the recipe is missing: {command} (`anyflow recipes` lists those that come with "
            "anyflow)"
        )
    elif recipe != arguments[0]:
        lines.append(f"the recipe comes first: {command}")
    return "\n".join(lines[:10])


def _is_option(text: str) -> bool:
    return re.match(r"--?[^\W\d]", text) is not None


def _is_setting(text: str) -> bool:
    return not _is_option(text) and re.match(rf"\s*{_NAME}\s*=\s*\S", text) is not None


def _is_recipe(text: str) -> bool:
    return not _is_option(text) and "=" not in text and recipes.locate(text).is_file()


def _take(rest: list[str], known: dict[str, Key], recipe_follows: bool) -> _Word:
    """Take one setting from the front of the arguments, with its values if they follow it."""
    given = [rest.pop(0)]
    name, equals, value = given[0].partition("=")
    if not equals and not _is_option(name):
        name, equals, value = name.partition(":")  # as in a file
    name = name.lstrip("-").strip().replace("-", "_")
    if not equals and rest and rest[0].startswith("="):
        given.append(rest.pop(0))
        value = given[-1][1:]
    values = [value] if value else []
    nearest, _ = _nearest(name, known)
    key = None if nearest is None else known[nearest]
    flag = key is not None and key.is_flag
    while rest and not (
        _is_option(rest[0]) or "=" in rest[0] or (recipe_follows and _is_recipe(rest[0]))
    ):
        if values and not (key is not None and key.is_list):
            break
        if flag and rest[0].lower() not in ("true", "false"):
            break
        given.append(rest.pop(0))
        values.append(given[-1])
    return _Word(given, name, values)


def _advice(word: _Word, known: dict[str, Key]) -> tuple[str, list[str]]:
    """Return a line that says how a setting is written, and the setting where it is known."""
    given = shortened(" ".join(word.given), 100)
    option = difflib.get_close_matches(word.name.replace("_", "-")[:100], OPTIONS, n=1, cutoff=0.8)
    values = word.values
    if word.name.startswith("no_") and not values:
        name, sure = _nearest(word.name.removeprefix("no_"), known)
        values = ["false"]
    else:
        name, sure = _nearest(word.name, known)
    if option and not sure:
        return f"{given}: did you mean --{option[0]}?", []
    if name is None:
        return (
            f"{given}: no option or setting has this name; settings are written key=value, and "
            "`anyflow train RECIPE --print-config` shows all of them",
            [],
        )
    key = known[name]
    if not values:
        values = ["true"] if key.is_flag else ["VALUE"]
    is_list = key.is_list and not values[0].startswith("[")
    setting = f"{name}={'[' + ', '.join(values) + ']' if is_list else values[0]}"
    shown = shlex.quote(setting)
    if sure:
        return f"{given}: settings are written {shown}", [setting]
    unknown = f"no setting is named {shortened(word.name, 60)}"
    return f"{given}: {unknown}; did you mean {name}? Settings are written {shown}", [setting]


def _nearest(name: str, known: dict[str, Key]) -> tuple[str | None, bool]:
    """Return the key that a name means or comes near to, and whether the key is meant.

    The last part of a key means the shortest key that ends in it: ``lr`` is ``optimizer.lr``.
    """
    if name in known:
        return name, True
    flat = name.replace(".", "_")
    ends = [key for key in known if key.endswith(f".{name}") or key.replace(".", "_") == flat]
    if ends:
        return min(ends, key=lambda key: (key.count("."), len(key))), True
    if name.rpartition(".")[2] in ELSEWHERE:
        return ELSEWHERE[name.rpartition(".")[2]], False
    by_end = {key.rpartition(".")[2]: key for key in sorted(known, key=lambda key: -key.count("."))}
    near = difflib.get_close_matches(name[:100], [*known, *by_end], n=1, cutoff=0.7)
    return (by_end.get(near[0], near[0]), False) if near else (None, False)
