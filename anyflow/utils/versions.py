"""Record the versions of packages that decide tokens, pixels and latents.

The published models were trained on prompts that ftfy had cleaned; a tokenizer, a text encoder or a
color conversion of another version can give other numbers for the same files, without an error.
Datasets and results therefore record these versions, and ``anyflow doctor`` shows them.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping

from anyflow.utils.packages import DISTRIBUTION, install_command

TEXT_PACKAGES = ("ftfy", "tokenizers", "transformers", "diffusers")
VIDEO_PACKAGES = ("av",)
PACKAGES = (*TEXT_PACKAGES, *VIDEO_PACKAGES, "safetensors", "numpy", "torch")

_FLOOR = re.compile(r"^([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)")


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Return the versions of packages without importing any; None for those not installed."""
    return {name: _version(name) for name in packages}


def required_floors() -> dict[str, str]:
    """Return the lowest versions that the installed anyflow requires, by package."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (
        _FLOOR.match(requirement) for requirement in ([] if requirements is None else requirements)
    )
    return {match[1]: match[2] for match in found if match is not None}


def is_below(version: str, floor: str) -> bool:
    """Return whether a version is older than ``floor``, without regard to tags such as ``+cpu``."""
    return _release(version) < _release(floor)


def differences(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """Describe every package of ``before`` whose version differs ``now``, build tags aside."""
    return [
        f"{name} {_or_none(before[name])}, here {_or_none(now.get(name))}"
        for name in sorted(before)
        if _public(before[name]) != _public(now.get(name))
    ]


def require_ftfy() -> None:
    """Raise ``ImportError`` without ftfy.

    diffusers passes over its absence, and prompts become other tokens.
    """
    try:
        import ftfy  # noqa: F401
    except ImportError:
        raise ImportError(
            "prompts are cleaned by ftfy, as those of the published models were, and it is not "
            "installed: "
            f"{install_command('ftfy')}"
        ) from None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _public(version: str | None) -> str | None:
    return None if version is None else version.split("+")[0]


def _or_none(version: str | None) -> str:
    return "not installed" if version is None else version


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
