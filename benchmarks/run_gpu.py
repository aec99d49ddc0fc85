"""The GPU evidence in one command: ``python benchmarks/run_gpu.py`` from a checkout, nothing but PyTorch needed.

1. Checks every operator's Triton kernels on the device against the fp64 reference, values and gradients.
2. Runs the operator tests on the device, if pytest and hypothesis are installed.
3. Measures the bandwidth of a copy, then every operator at the shapes of the 1.3B and 14B models: Triton against eager
   and against ``torch.compile`` of the reference, interleaved, in milliseconds, GB/s and as a fraction of that copy.

Results go to ``benchmarks/results/<GPU>.json`` after every entry, so that a run cut short keeps what it has, and as a
table to the ``.md`` beside it. Without a GPU, ``--device cpu`` does step 1 only, in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402

import anyflow  # noqa: E402

if importlib.util.find_spec("anyflow.kernels") is None:  # a checkout that is not installed: the folder is kernels/
    anyflow.__path__.append(str(ROOT))

import op_cases  # noqa: E402
import timing  # noqa: E402
from op_cases import Case  # noqa: E402

from anyflow.ops import backend_report, use_backend  # noqa: E402

# Relative to the largest element, for results rounded once (bf16) or accumulated in another order (fp32).
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 4e-6}
GRADIENT_SLACK = 3.0


class Results:
    """The JSON file, rewritten after every entry."""

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"environment": environment, "checks": [], "tests": None, "copy": None, "ops": []}

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Append an entry to a list, print it and save."""
        self.data[key].append(entry)
        print(json.dumps(entry), flush=True)
        self.save()

    def put(self, key: str, value: Any) -> None:
        """Set a value, print it and save."""
        self.data[key] = value
        print(f"{key}: {value}", flush=True)
        self.save()

    def save(self) -> None:
        """Write atomically: a reader never sees half a file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)


def environment(device: torch.device) -> dict[str, Any]:
    """What was measured, on what."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__,
        "python": platform.python_version(),
        "anyflow": anyflow.__version__,
        "commit": commit or os.environ.get("ANYFLOW_COMMIT", "unknown"),
        "clean": not changed.strip(),
        "backends": {op: choice.backend for op, choice in backend_report(device).items()},
    }


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """Largest error of outputs and of gradients, relative to the largest element, against the reference in fp64."""
    call = case.build(device)
    exact = dataclasses.replace(call, inputs=[_double(t) for t in call.inputs])
    exact = dataclasses.replace(exact, wanted=exact.inputs[: len(call.wanted)])
    with use_backend("triton"):
        outputs = call.outputs()
        cotangents = [torch.randn_like(o) for o in outputs]
        gradients = torch.autograd.grad(outputs, call.wanted, cotangents)
    with use_backend("eager"):
        outputs64 = exact.outputs()
        gradients64 = torch.autograd.grad(outputs64, exact.wanted, [c.double() for c in cotangents])
    tolerance = TOLERANCE[call.inputs[0].dtype]
    forward, backward = _error(outputs, outputs64), _error(gradients, gradients64)
    passed = forward <= tolerance and backward <= GRADIENT_SLACK * tolerance
    return {"case": case.name, "forward_error": forward, "backward_error": backward, "passed": passed}


def _double(x: Any) -> Any:
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def _error(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    pairs = zip(actual, expected, strict=True)
    errors = [((a.double() - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() for a, e in pairs]
    return max(errors) if all(e == e for e in errors) else float("nan")


def run_tests(limit_s: float) -> dict[str, Any]:
    """The operator tests on the device, in a process of their own."""
    if not all(importlib.util.find_spec(name) for name in ("pytest", "hypothesis")):
        return {"skipped": "pytest or hypothesis is not installed"}
    code = "import sys, anyflow, pytest; anyflow.__path__.append('.'); sys.exit(pytest.main(sys.argv[1:]))"
    # Without the project's settings, which ask for plugins that may not be installed.
    options = ["-c", os.devnull, "--rootdir=.", "--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-c", code, *options, "tests/ops"]
    variables = os.environ | {"ANYFLOW_TEST_DEVICE": "cuda", "PYTHONPATH": str(ROOT)}
    try:
        run = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        return {"timed_out_after_s": limit_s, "output": (error.stdout or b"").decode()[-2000:]}
    return {"exit_code": run.returncode, "output": (run.stdout + run.stderr)[-4000:]}


def measure(case: Case, device: torch.device, copy_gb_s: float) -> dict[str, Any]:
    """Time the three variants of one case, forward and backward."""
    entry: dict[str, Any] = {"case": case.name, "bytes": [case.forward_bytes, case.backward_bytes]}
    call = case.build(device)
    for direction, size in (("forward", case.forward_bytes), ("backward", case.backward_bytes)):
        milliseconds = timing.interleaved(timing.variants(call, direction))
        gb_s = {name: size / ms / 1e6 for name, ms in milliseconds.items()}
        entry[direction] = {
            "ms": milliseconds,
            "gb_s": gb_s,
            "of_copy": gb_s["triton"] / copy_gb_s,
            "speedup_over_eager": milliseconds["eager"] / milliseconds["triton"],
            "speedup_over_compile": milliseconds["compile"] / milliseconds["triton"],
        }
    return entry


def table(data: dict[str, Any]) -> str:
    """The results as Markdown."""
    env, copy = data["environment"], data["copy"]
    lines = [
        f"# Operators on {env['gpu']}",
        "",
        f"torch {env['torch']}, triton {env['triton']}, CUDA {env['cuda']}, commit `{env['commit'][:12]}`"
        f"{'' if env['clean'] else ' with changes'}. A copy runs at {copy:.0f} GB/s; bytes are the least that an "
        "operator must move. Medians of interleaved rounds, from a CUDA graph.",
        "",
        "| operator | direction | ms | GB/s | of copy | eager / ours | compile / ours |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for entry in data["ops"]:
        if "error" in entry:
            lines.append(f"| {entry['case']} | failed: {entry['error'].splitlines()[0][:120]} | | | | | |")
            continue
        for direction in ("forward", "backward"):
            d = entry[direction]
            lines.append(
                f"| {entry['case']} | {direction} | {d['ms']['triton']:.4f} | {d['gb_s']['triton']:.0f} | "
                f"{d['of_copy']:.0%} | {d['speedup_over_eager']:.2f} | {d['speedup_over_compile']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/<GPU>.json")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing new is started")
    parser.add_argument("--skip-tests", action="store_true", help="leave out step 2")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps in order; 1 if a check, a test or a case failed, or if the budget ran out before the end."""
    options, started = parse(arguments), time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    device = torch.device(options.device)
    env = environment(device)
    slug = re.sub(r"[^a-z0-9]+", "-", (env["gpu"] or "cpu").lower()).strip("-")
    results = Results(options.output or ROOT / "benchmarks" / "results" / f"{slug}.json", env)

    def remaining() -> float:
        return options.budget - (time.monotonic() - started)

    def wanted(cases: list[Case]) -> Iterator[Case]:
        for case in cases:
            if options.only in case.name and remaining() > 0:
                yield case

    for case in wanted(op_cases.small_cases()):
        results.add("checks", attempt(check, case, device))
    if device.type == "cuda":
        if not options.skip_tests:
            results.put("tests", run_tests(min(240.0, remaining() / 2)))
        results.put("copy", timing.copy_bandwidth(device))
        for case in wanted(op_cases.model_cases()):
            results.add("ops", attempt(measure, case, device, results.data["copy"]))
        results.path.with_suffix(".md").write_text(table(results.data))
    results.put("seconds", round(time.monotonic() - started, 1))
    failed = [c["case"] for c in results.data["checks"] if not c.get("passed")]
    failed += [c["case"] for c in results.data["ops"] if "error" in c]
    print(f"{results.path}: {len(failed)} failed, budget {'kept' if remaining() > 0 else 'used up'}")
    tests = results.data["tests"]
    tests_failed = tests is not None and "skipped" not in tests and tests.get("exit_code") != 0  # or they timed out
    return int(bool(failed) or tests_failed or remaining() <= 0)


def attempt(function: Callable[..., dict[str, Any]], case: Case, *args: Any) -> dict[str, Any]:
    """One entry; a failure is an entry too and does not stop the run."""
    try:
        return function(case, *args)
    except Exception as error:
        return {"case": case.name, "error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())
