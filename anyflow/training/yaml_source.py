"""Read YAML whose values know where they were written, with ``base:`` and overrides.

Plain scalars follow the core schema of YAML 1.2, less its hexadecimal, octal and non-finite
numbers: ``5e-5`` is a number, ``no`` and ``off`` are text, ``010`` is ten. A document is bounded in
bytes, in depth and in the number of its values, those that aliases repeat included, and so is the
chain of ``base:``.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow import recipes
from anyflow.utils.documents import read_text, shortened
from anyflow.utils.packages import missing

try:
    import yaml
except ImportError as error:
    raise ImportError(missing("reading a recipe", "pyyaml"), name="yaml") from error


MAX_BYTES = 2**16
MAX_DEPTH = 32
MAX_VALUES = 2000
MAX_FILES = 16
_INT64 = range(-(2**63), 2**63)


class RecipeError(ValueError):
    """Say why a recipe cannot be used, one line for each problem, with its place and key."""


@dataclass(frozen=True)
class Located:
    """Hold a value of a YAML document and its place.

    Args:
        value: a scalar, a ``list[Located]`` or a ``dict[str, Located]``.
        place: ``recipe.yaml:12``, the file alone for its whole content, or ``override key=value``.
    """

    value: Any
    place: str

    def merged(self, over: Located) -> Located:
        """Lay ``over`` on top of this value: mappings merge key by key, all else is replaced."""
        if not (isinstance(self.value, dict) and isinstance(over.value, dict)):
            return over
        value = dict(self.value)
        for key, item in over.value.items():
            value[key] = value[key].merged(item) if key in value else item
        return Located(value, over.place)

    def place_of(self, path: tuple[int | str, ...]) -> str:
        """Return where ``path`` was written, or the innermost part of it that was."""
        here = self
        for key in path:
            if not isinstance(here.value, dict | list):
                break
            items = here.value if isinstance(here.value, dict) else dict(enumerate(here.value))
            if key not in items:
                break
            here = items[key]
        return here.place

    def plain(self) -> Any:
        """Return the value without places, as lists and dictionaries."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value


def read_file(recipe: Path | str) -> Located:
    """Read the mapping in a file, laid over that of its ``base:``.

    Args:
        recipe: path, or name of a recipe that comes with anyflow (:func:`anyflow.recipes.locate`),
            as ``base:`` is too; a path there is relative to the file.

    Raises:
        RecipeError: a file is missing, no regular file, too large, not YAML or not a mapping, has a
            key twice, or is its own base; or the chain of bases is longer than ``MAX_FILES``.
    """
    path = recipes.locate(recipe)
    return _read_file(path, f"{shortened(path)}: no such file{recipes.hint(recipe)}", ())


def read_override(text: str) -> Located:
    """Read the mapping that ``a.b=value`` stands for; the value is YAML.

    Raises:
        RecipeError: the text has another form, or its value is not YAML.
    """
    place = f"override {shortened(' '.join(text.split()), 100)}"
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not (equals and value.strip() and all(re.fullmatch(r"\w+", name) for name in names)):
        raise RecipeError(
            f"{place}: must have the form key.key=value, with null as the empty value"
        )
    if len(names) > MAX_DEPTH:
        raise RecipeError(f"{place}: its key is nested more than {MAX_DEPTH} deep")
    if len(value.encode("utf-8", "replace")) > MAX_BYTES:
        raise RecipeError(f"{place}: its value is larger than the {MAX_BYTES} bytes allowed")
    node = _compose(value, lambda line: place)
    if node is None:
        raise RecipeError(f"{place}: has no value; write null for the empty one")
    tree = _Document(lambda line: place).located(node, ".".join(names), ())
    for name in reversed(names):
        tree = Located({name: tree}, place)
    return tree


def write_yaml(values: Mapping[str, Any]) -> str:
    """Write a mapping as YAML that :func:`read_file` reads as the same values.

    Tuples become lists, on one line each.
    """
    return str(
        yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    )


def _read_file(path: Path, missing: str, below: tuple[Path, ...], asked_by: str = "") -> Located:
    """Read a file and its bases.

    ``missing`` is the error if there is none, ``asked_by`` the place that names it.
    """
    try:
        content = read_text(path, max_bytes=MAX_BYTES)
    except ValueError as error:
        if isinstance(error.__context__, FileNotFoundError):
            raise RecipeError(missing) from None
        raise RecipeError(f"{asked_by}{error}") from error
    node = _compose(content, lambda line: f"{path}:{line}")
    tree = None if node is None else _Document(lambda line: f"{path}:{line}").located(node, "", ())
    if tree is None or not isinstance(tree.value, dict):
        raise RecipeError(f"{path}: must hold a mapping of keys to values")
    tree = Located(tree.value, str(path))
    base = tree.value.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base.value, str):
        raise RecipeError(f"{base.place}: base: must be the path of a recipe, relative to this one")
    parent, chain = recipes.locate(base.value, path.parent), (*below, path)
    # of a loop of links it makes a path, not an error
    if os.path.realpath(parent) in map(os.path.realpath, chain):
        raise RecipeError(
            f"{base.place}: base: goes in a circle: {' -> '.join(map(str, (*chain, parent)))}"
        )
    if len(chain) == MAX_FILES:
        raise RecipeError(f"{base.place}: base: more than {MAX_FILES} files in a chain")
    asked_by = f"{base.place}: base: "
    missing = f"{asked_by}no such file: {shortened(parent)}{recipes.hint(base.value)}"
    return _read_file(parent, missing, chain, asked_by).merged(tree)


class _CoreSchema:
    """Define which plain scalars are not text, for reading and for writing.

    Writing leaves the others unquoted.
    """

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012
        None: [
            ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z")),
            ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")),
            ("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+\Z")),
            (
                "tag:yaml.org,2002:float",
                re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"),
            ),
        ]
    }


class _Loader(_CoreSchema, yaml.SafeLoader):
    """Compose nodes down to a depth: PyYAML's composer is recursive."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(_CoreSchema, yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    tuple, lambda dumper, data: dumper.represent_sequence(_TAG + "seq", data, flow_style=True)
)

_TAG = "tag:yaml.org,2002:"
_LINE_BREAKS = "\x85\u2028\u2029"  # a reader may fold them, unless they are escaped


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    escaped = any(character in text for character in _LINE_BREAKS)
    return dumper.represent_scalar(_TAG + "str", text, style='"' if escaped else None)


_Dumper.add_representer(str, _represent_text)
_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "int": int,
    _TAG + "float": float,
    _TAG + "str": str,
}


def _compose(content: str, place: Callable[[int], str]) -> Any:
    """Return the document's root node, or None if there is none."""
    try:
        return yaml.compose(content, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = (
            error.problem_mark
            if error.context_mark is None or error.problem_mark
            else error.context_mark
        )
        line = 1 if mark is None else mark.line + 1
        text = " ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"{place(line)}: not valid YAML: {text}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{place(1)}: not valid YAML: {' '.join(str(error).split())}") from error


class _Document:
    """Read the values of one document, counting them.

    Args:
        place: place of a line of it.
    """

    def __init__(self, place: Callable[[int], str]) -> None:
        self._place = place
        self._values = 0

    def located(self, node: Any, path: str, around: tuple[Any, ...]) -> Located:
        """Read a node; ``path`` names it in errors, ``around`` holds the nodes it is inside of."""
        here = self._place(node.start_mark.line + 1)
        prefix = f"{here}: {shortened(path)}: " if path else f"{here}: "
        if node in around:
            raise RecipeError(f"{prefix}contains itself")
        self._values += 1
        # aliases make both larger than the text shows
        if self._values > MAX_VALUES or len(around) > MAX_DEPTH:
            raise RecipeError(
                f"{prefix}the document has more than {MAX_VALUES} values or {MAX_DEPTH} levels"
            )
        around = (*around, node)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return Located(self._items(node, path, around), here)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return Located([self.located(item, path, around) for item in node.value], here)
        if node.tag not in _SCALARS or not isinstance(node, yaml.ScalarNode):
            raise RecipeError(
                f"{prefix}the tag {shortened(node.tag.removeprefix(_TAG))!r} is not allowed"
            )
        return Located(_scalar(node, prefix), here)

    def _items(self, mapping: Any, path: str, around: tuple[Any, ...]) -> dict[str, Located]:
        items: dict[str, Located] = {}
        for key_node, value_node in mapping.value:
            line = self._place(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{line}: {path + ': ' if path else ''}keys must be names")
            key = key_node.value
            key_path = f"{path}.{key}" if path else key
            if key in items:
                raise RecipeError(
                    f"{line}: {shortened(key_path)}: is given twice, first at {items[key].place}"
                )
            items[key] = Located(self.located(value_node, key_path, around).value, line)
        return items


def _scalar(node: Any, prefix: str) -> Any:
    try:
        value = _SCALARS[node.tag](node.value)
    except (ValueError, KeyError):
        shown = reprlib.repr(node.value)
        raise RecipeError(f"{prefix}not a valid {node.tag.removeprefix(_TAG)}: {shown}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{prefix}{shortened(node.value, 40)} is too large for a number")
    if isinstance(value, int) and value not in _INT64:
        raise RecipeError(f"{prefix}{shortened(node.value, 40)} is too large for a whole number")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise RecipeError(
            f"{prefix}{shortened(value, 40)} has a lone surrogate, which is no character"
        )
    return value
