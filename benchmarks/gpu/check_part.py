"""Run some of the device checks in a process of its own, for :mod:`gpu.checks` or by hand.

By hand: ``PYTHONPATH=benchmarks python -m gpu.child gpu.check_part [--device cpu --tiny]``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from gpu.device_checks import catalogue, evaluate


def run_part(
    names: list[str], device: torch.device, tiny: bool, deadline: float, out: Path | None
) -> int:
    """Run checks by name, or all, and return how many failed.

    Each is noted in ``out`` before and after, a line of JSON.
    """
    checks = {check.name: check for check in catalogue(device, tiny)}
    failed = 0
    for check in [checks[name] for name in names] or checks.values():
        if time.monotonic() >= deadline:
            break
        _note(out, {"started": check.name})
        outcome = evaluate(check)
        failed += not outcome.ok
        _note(out, asdict(outcome))
        shown = outcome.problem or f"{outcome.error:.1e} of {outcome.limit:.1e}"
        mark = "ok  " if outcome.ok else "FAIL"
        print(f"{mark} {outcome.seconds:5.1f} s  {check.name}: {shown}", flush=True)
        if device.type == "cuda":
            # raises where the check has broken the device: this process is of no more use
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return failed


def _note(out: Path | None, entry: dict[str, object]) -> None:
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, or a part of them; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--tiny", action="store_true", help="small shapes in place of the models'")
    add("--seconds", type=float, default=120.0, help="after which no check is started")
    add("--names", type=Path, help="a JSON list of the checks to run; default all")
    add("--out", type=Path, help="file for the outcomes, a line of JSON for each")
    options = parser.parse_args(arguments)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    names = [] if options.names is None else json.loads(options.names.read_text())
    failed = run_part(names, device, options.tiny, time.monotonic() + options.seconds, options.out)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
