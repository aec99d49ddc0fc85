"""Report what is installed and built, what would run where, and whether the numbers are right.

``anyflow.ops`` is imported late: without the native extension that import is an error, which
belongs on the page.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from anyflow.doctor.environment import NativeExtension, environment, load_operators
from anyflow.doctor.requirements import (
    hub,
    install_commands,
    package_problems,
    packages,
    video_encoder,
)
from anyflow.utils.devices import resolve_device
from anyflow.utils.packages import OPTIONAL

if TYPE_CHECKING:
    from anyflow.doctor.page import Page
    from anyflow.doctor.self_check import Check, Skipped
    from anyflow.ops import BackendChoice


def run(device: str | None = None, *, as_json: bool = False) -> bool:
    """Examine this machine and print what is found, section by section or as one JSON object.

    Args:
        device: torch device to check; None means CUDA where torch finds a GPU, else the CPU.
        as_json: print one JSON object instead of the page.

    Returns:
        True if all is well: the packages that sampling and the demo need import, a video can be
        written, the extension loads, every operator can run, and every check passes.

    Raises:
        ValueError: the device cannot be used, or an environment variable names an unknown backend.
    """
    from anyflow.doctor.page import Page  # needs rich, which the self-check does not

    target = resolve_device(device, "--device", computes=True)
    page = Page(sys.stdout, quiet=as_json)

    found = environment()
    page.environment(found)
    installed = packages()
    commands = install_commands(installed)
    page.packages(installed, commands)
    encoder, cache = video_encoder(), hub()
    page.sources(encoder, cache)
    extension = load_operators()
    page.extension(extension)
    attention, attention_problem = _attention(target)
    page.attention(target, attention, attention_problem)

    operators, checks, skipped = _check_operators(target, page, extension)

    problems = [
        *package_problems(installed, encoder),
        *(text for text in (extension.problem, attention_problem) if text is not None),
        *_operator_problems(operators, checks),
    ]
    lacking = {group: command for group, command in commands.items() if group in OPTIONAL}
    page.verdict(problems, len(extension.warnings) + (encoder.warning is not None), lacking)
    if as_json:
        everything = {
            "ok": not problems,
            "problems": problems,
            "device": str(target),
            "environment": found,
            "packages": installed,
            "install": commands,
            "video_encoder": encoder,
            "hub": cache,
            "extension": extension,
            "attention": attention,
            "operators": operators,
            "checks": checks,
            "skipped": skipped,
        }
        print(json.dumps(everything, indent=1, allow_nan=False, default=dataclasses.asdict))
    return not problems


def _check_operators(
    device: torch.device, page: Page, extension: NativeExtension
) -> tuple[dict[str, BackendChoice], list[Check], list[Skipped]]:
    """Print which backend each operator takes, and check the numbers of all backends."""
    from anyflow.doctor.self_check import Check, self_check
    from anyflow.ops import backend_report

    operators = backend_report(device)
    page.operators(device, operators, extension)
    page.begin_self_check(device)
    results = list(self_check(device))
    checks = [result for result in results if isinstance(result, Check)]
    skipped = [result for result in results if not isinstance(result, Check)]
    page.self_check(checks, skipped)
    return operators, checks, skipped


def _operator_problems(
    operators: Mapping[str, BackendChoice], checks: Iterable[Check]
) -> list[str]:
    """List which operators cannot run, by the reason, and which checks fail."""
    unavailable: dict[str, list[str]] = {}
    for op, choice in operators.items():
        if choice.backend == "unavailable":
            unavailable.setdefault(choice.reason, []).append(op)
    return [f"{', '.join(names)} cannot run: {reason}" for reason, names in unavailable.items()] + [
        f"{c.op} on {c.backend} in {c.dtype}: {c.problem}" for c in checks if c.problem is not None
    ]


def _attention(device: torch.device) -> tuple[dict[str, Any], str | None]:
    """Report on attention, or say why not: the models need packages that may not fit."""
    try:
        from anyflow.models import attention_report
    except (ImportError, RuntimeError) as error:
        return {}, f"anyflow.models does not import: {error}"
    return attention_report(device), None
