"""Which implementation of an operator runs: registration, forcing a backend, and a report that explains it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BACKENDS = ("eager", "triton", "native")

_implementations: dict[str, dict[str, Callable[..., Any]]] = {}
_forced: str | None = None


def register(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function as the ``backend`` implementation of operator ``op``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(op, {})[_validated(backend)] = function
        return function

    return decorate


class use_backend:
    """Force every operator onto one backend, as a setter or as a context manager.

    ``use_backend("eager")`` takes effect at once; used as ``with use_backend("eager"): ...`` the previous choice comes
    back at the end of the block. ``use_backend(None)`` returns to the automatic choice.

    Raises:
        ValueError: the name is not one of ``"eager"``, ``"triton"``, ``"native"``.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self._previous = _forced
        _forced = None if name is None else _validated(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._previous


@dataclass(frozen=True)
class BackendChoice:
    """The backend an operator would run on, and the reason in one phrase."""

    backend: str
    reason: str


def forced_backend() -> tuple[str, str] | None:
    """The forced backend and who forced it, or None for the automatic choice."""
    if _forced is not None:
        return _forced, "forced by use_backend()"
    name = os.environ.get("ANYFLOW_BACKEND")
    if name:
        return _validated(name, "ANYFLOW_BACKEND: "), "forced by ANYFLOW_BACKEND"
    return None


def resolve(op: str) -> Callable[..., Any]:
    """The implementation of ``op`` to call now. A forced backend that does not have the operator is a RuntimeError."""
    forced = forced_backend()
    if forced is None:
        return _implementations[op]["eager"]
    name, reason = forced
    try:
        return _implementations[op][name]
    except KeyError:
        have = ", ".join(sorted(_implementations[op]))
        raise RuntimeError(
            f"anyflow.ops.{op}: backend {name!r} ({reason}) is not available; this build has: {have}"
        ) from None


def backend_report() -> dict[str, BackendChoice]:
    """For every operator, the backend that would run and why; a forced one that is missing reads ``unavailable``."""
    forced = forced_backend()
    report = {}
    for op, implementations in sorted(_implementations.items()):
        if forced is None:
            others = [name for name in BACKENDS if name != "eager" and name not in implementations]
            report[op] = BackendChoice("eager", f"no {' or '.join(others)} kernel in this build")
        elif forced[0] in implementations:
            report[op] = BackendChoice(*forced)
        else:
            report[op] = BackendChoice("unavailable", f"{forced[0]!r} {forced[1]}, but there is no such kernel")
    return report


def _validated(name: str, prefix: str = "") -> str:
    if name not in BACKENDS:
        raise ValueError(f"{prefix}unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name
