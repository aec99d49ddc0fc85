"""Time launch options of the row kernels: ``python benchmarks/tune_rows.py --seconds 60``.

For each kernel of a block, forward and backward, at the widths of both models: today's options
first, then other numbers of warps and stages of the loop over tokens, then the best of these with
other tokens per program. Timed is the whole call, the sums over programs included, as the median of
replayed CUDA graphs that take turns. A candidate that gives other numbers, or does not launch, says
so and is no candidate. ``FILE`` is written after every kernel; printed is today's time, the best
one, and which options of ``kernels/token_options.py`` give it.

Compiling takes longer than timing, so ``--jobs`` processes fill Triton's cache first.
``--device cpu --tiny`` proves the code without a GPU, in Triton's interpreter; its times mean
nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

TOKENS = 32760  # 480 x 832 pixels, 81 frames
DIMS, TINY_DIMS = (1536, 5120), (64,)
WARPS, STAGES = (1, 2, 4, 8, 16), (1, 3, 4)
TOKENS_PER_PROGRAM = (8, 16, 32, 64, 128)
TINY_KERNELS = 4  # of --tiny: enough for every line of this file
WORTH = 0.97  # of today's time: less of a gain is noise
MOST_ELEMENTS = 64  # of a row per thread: more do not fit into registers
COMPILE_SHARE = 0.6  # of the time, at most
SAME = 2e-3  # relative difference in the norm: sums in another order, rounded to bf16

Options = dict[str, int]


@dataclass(frozen=True)
class Task:
    """Hold a kernel at one width: ``call()`` runs it with its sums, ``bytes`` is what it moves."""

    name: str
    dim: int
    bytes: int
    today: Options
    call: Callable[[], Any]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, jobs = parser.add_argument, max((os.cpu_count() or 2) - 2, 1)
    add("--seconds", type=float, default=60.0, help="after which nothing more is timed")
    add("--out", type=Path, help="JSON file of every candidate")
    add("--only", default="", help="part of a kernel's name")
    add("--jobs", type=int, default=jobs, help="processes that compile")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--tiny", action="store_true", help="tiny shapes, to prove the code")
    # "3/12": the part of a process that only compiles
    add("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the published sizes take hours there")
    return options


# Candidates ---------------------------------------------------------------------------------------


def tasks(device: Any, tiny: bool) -> list[Task]:
    """List every kernel over rows at every width, on random tensors."""
    import torch

    from anyflow.kernels.ahead_of_time import kernel_calls
    from anyflow.ops.examples import row_examples

    tokens, dtype = (5, torch.float32) if tiny else (TOKENS, torch.bfloat16)
    found: list[Task] = []
    for dim in TINY_DIMS if tiny else DIMS:
        for example, direction, call in kernel_calls(row_examples(tokens, dim, 1), dtype, device):
            kernel, today = _launched(call)
            work = example.forward if direction == "forward" else example.backward
            form = f" ({example.variant})" if example.variant else ""
            found.append(Task(f"{kernel}{form} D={dim}", dim, work.bytes(dtype), today, call))
    return found[:TINY_KERNELS] if tiny else found


def _launched(call: Callable[[], Any]) -> tuple[str, Options]:
    """Return the name of the kernel that a call launches first, and its options."""
    from anyflow.kernels.launch import record

    with record() as launches:
        call()
    first = launches[0]
    options = {name: first.options[name] for name in ("num_warps", "STAGES", "TOKENS")}
    return str(first.kernel.fn.__name__).removesuffix("_kernel"), options


def first_round(task: Task) -> list[Options]:
    """Return today's options, then every number of warps and stages with today's tokens."""
    warps = [w for w in WARPS if 8 <= task.dim / (32 * w) <= MOST_ELEMENTS] or [1]
    others = [
        task.today | {"num_warps": w, "STAGES": s} for w, s in itertools.product(warps, STAGES)
    ]
    return [task.today, *(options for options in others if options != task.today)]


def second_round(best: Options) -> list[Options]:
    """Return the best options so far with other tokens per program."""
    return [best | {"TOKENS": n} for n in TOKENS_PER_PROGRAM if n != best["TOKENS"]]


def described(options: Options) -> str:
    """Write options as the key of a candidate."""
    return ", ".join(f"{name}={value}" for name, value in options.items())


# Measuring ----------------------------------------------------------------------------------------


def measure(
    task: Task, candidates: list[Options], device: Any, expected: Any
) -> dict[str, float | str]:
    """Time the candidates in turns: milliseconds, or what is wrong, by description."""
    import timing
    import torch

    from anyflow.kernels.token_options import override_options

    found: dict[str, float | str] = {}
    steps: dict[str, timing.Step] = {}
    for options in candidates:

        def step(options: Options = options) -> Any:
            with override_options(**options):
                return task.call()

        try:
            if _same(_tensors(step()), expected):
                steps[described(options)] = step
            else:
                found[described(options)] = "other numbers"
        except Exception as error:  # too much shared memory, for example
            found[described(options)] = (
                f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
            )
            if device.type == "cuda":
                torch.cuda.synchronize()
    rounds = timing.Interleaved(steps, device, graphs=True)
    rounds.run(9 if device.type == "cuda" else 2)
    return {name: rounds.milliseconds(name)["ms"] for name in steps} | found


def _tensors(result: Any) -> list[Any]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t.numel()]


def _same(actual: list[Any], expected: list[Any]) -> bool:
    """Tell whether results are the same but for rounding; NaN is not."""
    pairs = ((a.float(), e.float()) for a, e in zip(actual, expected, strict=True))
    return all(((a - e).norm() <= SAME * e.norm()).item() for a, e in pairs)


def tune(task: Task, device: Any, copy: float) -> dict[str, Any]:
    """Time both rounds of a kernel and name the best options."""
    expected = [t.clone() for t in _tensors(task.call())]
    candidates = first_round(task)
    times = measure(task, candidates, device, expected)
    today = times[described(task.today)]
    if isinstance(today, str):
        return {"bytes": task.bytes, "error": f"today's options: {today}", "candidates": times}
    numbers = {name: t for name, t in times.items() if isinstance(t, float)}
    best = min(numbers, key=numbers.__getitem__)
    chosen = next(options for options in candidates if described(options) == best)
    times |= measure(task, second_round(chosen), device, expected)
    numbers = {name: t for name, t in times.items() if isinstance(t, float)}
    best = min(numbers, key=numbers.__getitem__)
    return {
        "bytes": task.bytes,
        "today": described(task.today),
        "today_ms": today,
        "best": best,
        "best_ms": numbers[best],
        "share_today": task.bytes / (today / 1e3) / copy,
        "share_best": task.bytes / (numbers[best] / 1e3) / copy,
        "candidates": times,
    }


def advice(name: str, entry: dict[str, Any]) -> str:
    """Write one line: times and shares of the copy's bandwidth, and what to change."""
    if "error" in entry:
        return f"{name:46} {entry['error']}"
    worth = entry["best_ms"] <= WORTH * entry["today_ms"]
    change = (
        f"-> {entry['best_ms']:.4f} ms {entry['share_best']:.0%}: {entry['best']}"
        if worth
        else "stays"
    )
    return (
        f"{name:46} {entry['today_ms']:.4f} ms {entry['share_today']:.0%} ({entry['today']}) "
        f"{change}"
    )


# Processes ----------------------------------------------------------------------------------------


def compile_part(options: argparse.Namespace, device: Any) -> int:
    """Compile this process's part of the candidates into Triton's cache on disk."""
    from anyflow.kernels.token_options import override_options

    part, parts = map(int, options.compile.split("/"))
    wanted = [t for t in tasks(device, options.tiny) if options.only in t.name]
    todo = [(task, candidate) for task in wanted for candidate in first_round(task)]
    for task, candidate in todo[part::parts]:
        try:
            with override_options(**candidate):
                task.call()
        except Exception as error:  # measured again, and recorded, by the process that times
            print(f"{task.name} {described(candidate)}: {type(error).__name__}", flush=True)
    return 0


def compile_all(options: argparse.Namespace, until: float) -> None:
    """Let processes compile side by side; those that are not done in time are stopped."""
    command = [sys.executable, __file__, "--device", options.device, "--only", options.only]
    command += ["--tiny"] if options.tiny else []
    children = [
        subprocess.Popen([*command, "--compile", f"{i}/{options.jobs}"])
        for i in range(options.jobs)
    ]
    for child in children:
        try:
            child.wait(timeout=max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def main(arguments: list[str] | None = None) -> int:
    """Tune; exit status 0 also where time ran out, which the file says."""
    options, started = parse(arguments), time.monotonic()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    from gpu import build, without_diffusers

    build.find_package(options.device)  # before diffusers, which imports triton where it is there
    without_diffusers.install()
    import timing
    import torch
    import triton
    from gpu.kernels import copies
    from gpu.state import commit

    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    if options.compile is not None:
        return compile_part(options, device)
    if options.device == "cuda":
        compile_all(options, started + COMPILE_SHARE * options.seconds)
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    size = 2**20 if options.tiny else 320 * 2**20
    copying = timing.Interleaved(copies(device, size), device, graphs=True)
    copying.run(9)
    copy = max(2 * size / copying.seconds(name) for name in copying.steps)
    name = torch.cuda.get_device_name(device) if options.device == "cuda" else "cpu"
    found: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        **commit(),
    }
    found |= {"copy_bytes_per_s": copy, "tasks": {}}
    for task in tasks(device, options.tiny):
        if options.only not in task.name:
            continue
        if time.monotonic() - started > options.seconds:
            found["tasks"][task.name] = {"skipped": "no time left"}
        else:
            found["tasks"][task.name] = tune(task, device, copy)
            print(advice(task.name, found["tasks"][task.name]), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
