"""``anyflow doctor``: what is installed and built, what would run where, and whether it computes
the right numbers.

``anyflow.ops`` is imported late: without the native extension that import is an error, which
belongs on the page.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch

from anyflow.doctor.environment import environment, load_operators
from anyflow.doctor.requirements import hub, install_commands, packages, video_encoder
from anyflow.utils.devices import resolve_device
from anyflow.utils.packages import OPTIONAL


def run(device: str | None = None, *, as_json: bool = False) -> bool:
    """Examine this machine and print what is found, section by section or as one JSON object.

    Args:
        device: torch device to check; None means CUDA where there is a CUDA device, else the CPU.
        as_json: print one JSON object instead of the page.

    Returns:
        Whether all is well: the packages that sampling and the demo need import, a video can be
            written, the extension
        loads, every operator can run, and every check passes.

    Raises:
        ValueError: the device cannot be used, or an environment variable names an unknown backend.
    """
    from anyflow.doctor.page import Page  # needs rich, which the self-check does not

    target = resolve_device(device, "--device", computes=True)
    page = Page(sys.stdout, quiet=as_json)
    problems: list[str] = []

    found = environment()
    page.environment(found)
    installed = packages()
    commands = install_commands(installed)
    page.packages(installed, commands)
    # What training and evaluation lack is no problem of sampling; what is there and broken is one
    # of everybody.
    problems += [
        p.problem
        for p in installed
        if p.problem and (p.group not in OPTIONAL or p.version is not None)
    ]
    encoder, cache = video_encoder(), hub()
    page.sources(encoder, cache)
    if encoder.problem is not None and "av" not in [p.name for p in installed if p.problem]:
        problems.append(encoder.problem)
    extension = load_operators()
    page.extension(extension)
    if extension.problem is not None:
        problems.append(extension.problem)

    attention, problem = _attention(target)
    page.attention(target, attention, problem)
    if problem is not None:
        problems.append(problem)

    from anyflow.doctor.self_check import Check, self_check
    from anyflow.ops import backend_report

    operators = backend_report(target)
    page.operators(target, operators, extension)
    unavailable: dict[str, list[str]] = {}
    for op, choice in operators.items():
        if choice.backend == "unavailable":
            unavailable.setdefault(choice.reason, []).append(op)
    problems += [
        f"{', '.join(names)} cannot run: {reason}" for reason, names in unavailable.items()
    ]

    page.begin_self_check(target)
    results = list(self_check(target))
    checks = [result for result in results if isinstance(result, Check)]
    skipped = [result for result in results if not isinstance(result, Check)]
    page.self_check(checks, skipped)
    problems += [
        f"{c.op} on {c.backend} in {c.dtype}: {c.problem}" for c in checks if c.problem is not None
    ]

    lacking = {group: command for group, command in commands.items() if group in OPTIONAL}
    page.verdict(problems, len(extension.warnings) + (encoder.warning is not None), lacking)
    if as_json:
        everything = {
            "ok": not problems,
            "problems": problems,
            "device": str(target),
            "environment": dataclasses.asdict(found),
            "packages": [dataclasses.asdict(package) for package in installed],
            "install": commands,
            "video_encoder": dataclasses.asdict(encoder),
            "hub": dataclasses.asdict(cache),
            "extension": dataclasses.asdict(extension),
            "attention": {name: dataclasses.asdict(choice) for name, choice in attention.items()},
            "operators": {op: dataclasses.asdict(choice) for op, choice in operators.items()},
            "checks": [dataclasses.asdict(check) for check in checks],
            "skipped": [dataclasses.asdict(entry) for entry in skipped],
        }
        print(json.dumps(everything, indent=1, allow_nan=False))
    return not problems


def _attention(device: torch.device) -> tuple[dict[str, Any], str | None]:
    """The report on attention; or why there is none: the models need packages that may not fit
    together.
    """
    try:
        from anyflow.models import attention_report
    except (ImportError, RuntimeError) as error:
        return {}, f"anyflow.models does not import: {error}"
    return attention_report(device), None
