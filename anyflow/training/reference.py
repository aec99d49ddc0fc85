"""List the keys of a recipe from the dataclasses that define them.

``python -m anyflow.training.reference FILE`` writes docs/recipes.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from anyflow.training.config import Recipe
from anyflow.utils.writing import write_text

_HEAD = """\
# The keys of a recipe

Every key that `anyflow train` knows, made from the dataclasses of `anyflow/training` by
`python -m anyflow.training.reference docs/recipes.md`. An unknown key is an error that names the
nearest one. On the command line a key is written with dots,
`anyflow train smoke_pretrain optimizer.lr=1e-4 preview.step_counts='[1, 4]'`; in a file, sections
are nested. [Training by recipe](training.md) says how files, `base:` and the command line add up.
"""


@dataclass(frozen=True)
class Key:
    """Describe one key of a recipe.

    Args:
        name: name with dots, as on the command line.
        types: what the value may be, in words.
        default: as YAML; None where the key is required.
        meaning: meaning, from the docstring of its dataclass.
        is_flag: the value is ``true`` or ``false``.
        is_list: the value is a list.
    """

    name: str
    types: str
    default: str | None
    meaning: str
    is_flag: bool
    is_list: bool


@dataclass(frozen=True)
class Section:
    """Hold the keys of one dataclass at one place of a recipe.

    Args:
        name: name with dots; empty for the recipe itself.
        cls: the dataclass.
        optional: ``null`` leaves the section out.
        keys: keys that hold values; a key that is a section has a section of its own.
    """

    name: str
    cls: type
    optional: bool
    keys: tuple[Key, ...]


def sections(cls: type = Recipe) -> list[Section]:
    """Return every section of a recipe, each after the one that it is part of.

    Args:
        cls: the dataclass of the whole recipe.

    Raises:
        ValueError: a key has no meaning in the docstring of its dataclass.
    """
    return list(_sections(cls, "", dataclasses.MISSING, False))


def keys() -> list[Key]:
    """Return every key that holds a value."""
    return [key for section in sections() for key in section.keys]


def render() -> str:
    """Return the reference as Markdown."""
    seen: dict[type, Section] = {}
    parts = [_HEAD]
    for section in sections():
        parts.append(_rendered(section, seen.get(section.cls)))
        seen.setdefault(section.cls, section)
    return "\n".join(parts)


def _sections(cls: type, name: str, default: Any, optional: bool) -> Iterator[Section]:
    hints, meanings = typing.get_type_hints(cls), _meanings(cls)
    values, inner = [], []
    for field in dataclasses.fields(cls):
        key = f"{name}.{field.name}" if name else field.name
        given = _default(field) if default is dataclasses.MISSING else getattr(default, field.name)
        section = next(
            (c for c in (hints[field.name], *typing.get_args(hints[field.name])) if _is_section(c)),
            None,
        )
        if section is not None:
            inner.append(
                (section, key, dataclasses.MISSING if given is None else given, given is None)
            )
            continue
        if field.name not in meanings:
            raise ValueError(f"{key}: the docstring of {cls.__name__} does not say what it means")
        shown = None if given is dataclasses.MISSING else _yaml(given)
        hint = hints[field.name]
        values.append(
            Key(key, _words(hint), shown, meanings[field.name], hint is bool, _is_list(hint))
        )
    yield Section(name, cls, optional, tuple(values))
    # those that may be left out come last
    for arguments in sorted(inner, key=lambda section: section[3]):
        yield from _sections(*arguments)


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _default(field: dataclasses.Field[Any]) -> Any:
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _is_list(hint: Any) -> bool:
    return any(typing.get_origin(h) is tuple for h in (hint, *typing.get_args(hint)))


def _words(hint: Any) -> str:
    """Say in words what a value may be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _either([f"`{value}`" for value in arguments])
    if origin in (Union, types.UnionType):
        return _either(
            ["`null`" if argument is type(None) else _words(argument) for argument in arguments]
        )
    if origin is tuple:
        item = _words(arguments[0])
        plural = item if "`" in item or item == "text" else f"{item}s"
        return (
            f"list of {plural}"
            if arguments[-1] is Ellipsis
            else f"list of {len(arguments)} {plural}"
        )
    return {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}[hint]


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _meanings(cls: type) -> dict[str, str]:
    """Read the ``Args:`` of a dataclass and its bases, or of the class whose arguments it has."""
    found: dict[str, str] = {}
    for each in (*cls.__mro__[::-1], *_documented_by(cls)):
        text = inspect.cleandoc(each.__doc__ or "")
        block = re.search(r"(?:^|\n) *Args:\n((?: +.*\n?|\n)*)", text)
        for names, meaning in re.findall(
            r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", block[1] if block else "", re.M
        ):
            for name in names.split(", "):
                found[name] = _markdown(meaning)
    return found


def _documented_by(cls: type) -> tuple[type, ...]:
    from anyflow.models import AnyFlowTransformer3DModel

    return (AnyFlowTransformer3DModel,) if cls.__name__ == "ArchitectureConfig" else ()


def _markdown(text: str) -> str:
    """Turn the markup of a docstring into that of a page, on one line that a table can hold."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(text.split()))
    text = re.sub(r"\bNone\b", "`null`", text)
    return (
        re.sub(r"``(.*?)``", r"`\1`", text)
        .replace('"`', "`")
        .replace('`"', "`")
        .replace("|", "\\|")
    )


def _rendered(section: Section, like: Section | None) -> str:
    summary = _markdown((section.cls.__doc__ or "").partition("\n\n")[0])
    summary = re.sub(r"^(Hold|Say) (\w)", lambda verb: verb[2].upper(), summary)
    summary = re.sub(r", beside those of .*\.$", ".", summary)  # the bases' keys are in the table
    lines = [f"## {f'`{section.name}`' if section.name else 'The run'}", ""]
    if section.name:
        lines += [summary + (" Left out unless it is given." if section.optional else ""), ""]
    shown = section.keys
    if like is not None:
        before = [(key.types, key.default) for key in like.keys]
        shown = tuple(
            k for k, b in zip(section.keys, before, strict=True) if (k.types, k.default) != b
        )
        anchor = re.sub(r"[^\w-]", "", like.name)
        lines[-1:] = [
            "",
            f"The keys are those of [`{like.name}`](#{anchor})"
            + (", with other defaults:" if shown else "."),
        ]
        lines.append("")
    if shown:
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key in shown:
        default = "required" if key.default is None else f"`{key.default}`"
        lines.append(f"| `{key.name}` | {key.types} | {default} | {key.meaning} |")
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str]) -> None:
    """Write the reference to the file that is named, or print it."""
    if arguments:
        write_text(Path(arguments[0]), render())
    else:
        print(render(), end="")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
