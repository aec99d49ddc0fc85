"""YAML in which every value knows where it was written, inheritance by ``base:``, and overrides from the command line.

Plain scalars follow the core schema of YAML 1.2, less its hexadecimal, octal and non-finite numbers: ``5e-5`` is a
number, ``no`` and ``off`` are text, ``010`` is ten.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import yaml
except ImportError as error:
    raise ImportError("recipes need the package pyyaml: pip install anyflow[train]", name="yaml") from error


class RecipeError(ValueError):
    """A recipe that cannot be used; one line for each problem, each with its place and the path of the key."""


@dataclass(frozen=True)
class Located:
    """A value of a YAML document and its place.

    Args:
        value: a scalar, a ``list[Located]`` or a ``dict[str, Located]``.
        place: ``recipe.yaml:12``, the file alone for its whole content, or ``override key=value``.
    """

    value: Any
    place: str

    def merged(self, over: Located) -> Located:
        """This value with ``over`` laid on top: mappings merge key by key, everything else is replaced."""
        if not (isinstance(self.value, dict) and isinstance(over.value, dict)):
            return over
        value = dict(self.value)
        for key, item in over.value.items():
            value[key] = value[key].merged(item) if key in value else item
        return Located(value, over.place)

    def place_of(self, path: tuple[int | str, ...]) -> str:
        """Where ``path`` was written, or the innermost part of it that was."""
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
        """The value without places, as lists and dictionaries."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value


def read_file(path: Path) -> Located:
    """The mapping in a file, laid over that of its ``base:``, which is a path relative to the file.

    Raises:
        RecipeError: a file is missing, not YAML or not a mapping, has a key twice, or is its own base.
    """
    return _read_file(path, f"{path}: ", ())


def read_override(text: str) -> Located:
    """The mapping that ``a.b=value`` stands for; the value is YAML.

    Raises:
        RecipeError: the text has another form, or its value is not YAML.
    """
    place = f"override {' '.join(text.split())}"
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not (equals and value.strip() and all(re.fullmatch(r"\w+", name) for name in names)):
        raise RecipeError(f"{place}: must have the form key.key=value, with null as the empty value")
    node = _compose(value, lambda line: place)
    if node is None:
        raise RecipeError(f"{place}: has no value; write null for the empty one")
    tree = _located(node, lambda line: place, ".".join(names), ())
    for name in reversed(names):
        tree = Located({name: tree}, place)
    return tree


def write_yaml(values: Mapping[str, Any]) -> str:
    """A mapping as YAML that :func:`read_file` reads as the same values; tuples become lists, on one line each."""
    return str(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def _read_file(path: Path, asked_by: str, below: tuple[Path, ...]) -> Located:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise RecipeError(f"{asked_by}no such file" + (f": {path}" if below else "")) from None
    except OSError as error:
        raise RecipeError(f"{asked_by}cannot read {path}: {error.strerror}") from error
    node = _compose(content, lambda line: f"{path}:{line}")
    tree = None if node is None else _located(node, lambda line: f"{path}:{line}", "", ())
    if tree is None or not isinstance(tree.value, dict):
        raise RecipeError(f"{path}: must hold a mapping of keys to values")
    tree = Located(tree.value, str(path))
    base = tree.value.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base.value, str):
        raise RecipeError(f"{base.place}: base: must be the path of a recipe, relative to this one")
    parent, chain = path.parent / base.value, (*below, path)
    if parent.resolve() in [file.resolve() for file in chain]:
        raise RecipeError(f"{base.place}: base: goes in a circle: {' -> '.join(map(str, (*chain, parent)))}")
    return _read_file(parent, f"{base.place}: base: ", chain).merged(tree)


class _CoreSchema:
    """Which plain scalars are not text, for reading and, so that others are not quoted, for writing."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {  # noqa: RUF012
        None: [
            ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z")),
            ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")),
            ("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+\Z")),
            ("tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")),
        ]
    }


class _Loader(_CoreSchema, yaml.SafeLoader):
    pass


class _Dumper(_CoreSchema, yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(tuple, lambda dumper, data: dumper.represent_sequence(_TAG + "seq", data, flow_style=True))

_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "int": int,
    _TAG + "float": float,
    _TAG + "str": str,
}


def _compose(content: bytes | str, place: Callable[[int], str]) -> Any:
    """The document's root node, or None if there is none."""
    try:
        return yaml.compose(content, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark if error.context_mark is None or error.problem_mark else error.context_mark
        line = 1 if mark is None else mark.line + 1
        text = " ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"{place(line)}: not valid YAML: {text}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{place(1)}: not valid YAML: {' '.join(str(error).split())}") from error


def _located(node: Any, place: Callable[[int], str], path: str, around: tuple[Any, ...]) -> Located:
    """A node's value; ``path`` names it in errors, ``around`` holds the nodes it is inside of."""
    here = place(node.start_mark.line + 1)
    prefix = f"{here}: {path}: " if path else f"{here}: "
    if node in around:
        raise RecipeError(f"{prefix}contains itself")
    around = (*around, node)
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        items: dict[str, Located] = {}
        for key_node, value_node in node.value:
            line = place(key_node.start_mark.line + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{line}: {path + ': ' if path else ''}keys must be names")
            key = key_node.value
            key_path = f"{path}.{key}" if path else key
            if key in items:
                raise RecipeError(f"{line}: {key_path}: is given twice, first at {items[key].place}")
            items[key] = Located(_located(value_node, place, key_path, around).value, line)
        return Located(items, here)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return Located([_located(item, place, path, around) for item in node.value], here)
    if node.tag not in _SCALARS or not isinstance(node, yaml.ScalarNode):
        raise RecipeError(f"{prefix}the tag {node.tag.removeprefix(_TAG)!r} is not allowed")
    try:
        value = _SCALARS[node.tag](node.value)
    except (ValueError, KeyError):
        raise RecipeError(f"{prefix}not a valid {node.tag.removeprefix(_TAG)}: {node.value!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{prefix}{node.value} is too large for a number")
    return Located(value, here)
