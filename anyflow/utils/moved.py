"""Keep imports from the former place of a module working."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def moved(
    old: str, new: str, names: Sequence[str], renamed: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds ``names`` in another module, with a warning.

    Args:
        old: the module that still exists for the sake of imports.
        new: the module that has the names.
        names: public names, and no others.
        renamed: their names in the other module, where these differ.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        found = name if renamed is None else renamed.get(name, name)
        warnings.warn(
            f"{old} is deprecated: import {found} from {new}", DeprecationWarning, stacklevel=2
        )
        return getattr(importlib.import_module(new), found)

    return __getattr__
