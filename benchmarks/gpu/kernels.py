"""Measure the limits of the device, and kernels at the shapes of both models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from networks import without_gradient
from ops import bench_ops
from timing import Step, capture_stream

from anyflow.ops import examples
from anyflow.ops.examples import Example
from gpu.run import DeviceRun, Skip, last_line

# Bytes copied, all beyond any cache: a tensor of 32760 tokens at 14B, and 1 GiB, which the driver
# of an H200 moved at 2.7 TB/s in place of 4.2.
COPIES = (320 * 2**20, 2**30)
ROUNDS = 15
# Variants that are not ours: one that raises is recorded, and fails no section. Inductor (2.11,
# 2.13) gives [D] for the gradient of a [1, 1, D] operand where it sums over rows and over columns
# in one kernel (mix_order_reduction).
PEERS = ("eager", "compile")
# of the time that is left: compiling the reference takes longer than all measurements
COMPILE_SHARE = 0.2


def run_limits(run: DeviceRun) -> None:
    """Measure what this device reaches: a product of matrices, and copies by two kinds of kernel.

    The matrices are random: of zeros, products on GPUs are faster.
    """
    n = 256 if run.tiny else 8192
    a, b = (torch.randn(n, n, device=run.device, dtype=run.dtype) for _ in range(2))
    found = _measured(run, {"matmul": partial(torch.mm, a, b, out=torch.empty_like(a))})["matmul"]
    run.put("matmul_flops", 2 * n**3 / found["ms"] * 1e3)
    run.put("matmul", {"size": n, "dtype": str(run.dtype), "samples_ms": found["samples_ms"]})
    put_copies(run, COPIES)


def put_copies(run: DeviceRun, sizes: Sequence[int]) -> None:
    """Record copies of these bytes."""
    for size in (2**22,) if run.tiny else sizes:
        for name, entry in _measured(run, copies(run.device, size)).items():
            run.put(f"copy: {size // 2**20} MiB, {name}", {"bytes": 2 * size, **entry})


def copies(device: torch.device, size: int) -> dict[str, Step]:
    """Return copies of ``size`` bytes: the driver's, and one by an element-wise kernel."""
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    return {
        "by the driver": lambda: target.copy_(source),
        "by a kernel": lambda: torch.bitwise_not(source, out=target),
    }


def _measured(run: DeviceRun, steps: dict[str, Step]) -> dict[str, dict[str, Any]]:
    """Time kernels beside each other; raise the first problem."""
    problems: dict[str, str] = {}
    timed = run.time(steps, ROUNDS, problems, graphs=True)
    if problems:
        raise RuntimeError(f"{problems}")
    return {name: timed.milliseconds(name) for name in timed.steps}


# Operators ----------------------------------------------------------------------------------------


def on_device(run: DeviceRun) -> list[Example]:
    """List every operator, what a forward of the models runs first, then a modulation per frame."""
    if run.tiny:
        small = [*examples.row_examples(24, 64, 1), examples.dual_timestep_embedding(3, 64)]
        return [*small, *examples.flow_map_examples(2, (2, 4, 4, 4))]
    found = [e for dim in (1536, 5120) for e in examples.row_examples(examples.TOKENS, dim, 1)]
    found += examples.flow_map_examples(8, examples.LATENTS)
    found += [examples.dual_timestep_embedding(21, dim) for dim in (1536, 5120)]
    return found + examples.row_examples(examples.TOKENS, 1536, 21)


def run_operators(run: DeviceRun) -> None:
    """Time Triton against the eager and the compiled reference, and native kernels that exist."""
    variants = (*bench_ops.BACKENDS, bench_ops.COMPILE)
    _measure_examples(run, on_device(run), variants, bench_ops.DIRECTIONS, ROUNDS)


def run_native(run: DeviceRun) -> None:
    """Time native CUDA kernels against Triton's, forward (backward is Triton's), in more rounds."""
    wanted = [e for e in on_device(run) if _not_timed(run, e.op, "native") is None]
    if not wanted:
        raise Skip(_not_timed(run, on_device(run)[0].op, "native") or "no native kernels")
    _measure_examples(run, wanted, ("triton", "native"), ("forward",), rounds=40)


def _measure_examples(
    run: DeviceRun,
    wanted: list[Example],
    variants: tuple[str, ...],
    directions: tuple[str, ...],
    rounds: int,
) -> None:
    failed, left_out = [], 0
    compile_until = run.remaining() * (1 - COMPILE_SHARE)
    for example in wanted:
        if _is_measured(run, example, directions):  # by an earlier run that ended too early
            continue
        if not run.affords(2.0):
            left_out += 1
            if run.get(example.name) is None:
                run.put(example.name, {"skipped": "budget"})
            continue
        moved = {"forward": example.forward_bytes, "backward": example.backward_bytes}
        entry: dict[str, Any] = {"op": example.op, "bytes": moved}
        try:
            for direction in directions:
                reasons = {v: _not_timed(run, example.op, v, direction) for v in variants}
                if run.remaining() <= compile_until and bench_ops.COMPILE in variants:
                    reasons[bench_ops.COMPILE] = "budget"
                dtype = example.dtype if run.cuda else torch.float32
                makers = bench_ops.makers(example, direction, dtype, run.place)
                entry[direction], problems = _measure(run, makers, reasons, rounds)
                own = (f"{v}: {text}" for v, text in problems.items() if v not in PEERS)
                failed += [f"{example.name}, {direction}: {problem}" for problem in own]
        except Exception as error:
            entry["error"] = last_line(error)
            failed.append(f"{example.name}: {entry['error']}")
            run.recover()
        run.put(example.name, entry)
    if failed:
        run.fail(f"{len(failed)} variants: {failed[0]}")
    elif left_out:
        raise Skip(f"budget: {left_out} of {len(wanted)} cases are not timed yet")


def _is_measured(run: DeviceRun, example: Example, directions: tuple[str, ...]) -> bool:
    """Tell whether the results have an example without an error and without a wrong kernel."""
    entry = run.get(example.name, {})
    if "error" in entry or any(direction not in entry for direction in directions):
        return False
    wrong = run.wrong_kernels().get(example.op, [])
    return not any(v in entry[direction]["ms"] for direction in directions for v in wrong)


def _measure(
    run: DeviceRun,
    makers: Mapping[str, Callable[[], Step]],
    reasons: Mapping[str, str | None],
    rounds: int,
    graphs: bool = True,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time variants beside each other, and return the entry of the results and the problems.

    Args:
        run: of the section.
        makers: make the steps of the variants.
        reasons: why a variant is not timed, or None.
        rounds: of measurements.
        graphs: replay CUDA graphs of several calls.
    """
    problems: dict[str, str] = {}
    made = {
        v: run.attempt(problems, v, partial(_warm, run.device, makers[v]))
        for v, reason in reasons.items()
        if reason is None
    }
    steps = {v: step for v, step in made.items() if v not in problems}
    timed = run.time(steps, rounds, problems, graphs)
    found = {v: timed.milliseconds(v) for v in timed.steps}
    entry = {key: {v: e[key] for v, e in found.items()} for key in ("ms", "samples_ms")}
    known = {v: reason for v, reason in reasons.items() if reason is not None}
    return entry | {"not_timed": known | problems}, problems


def _warm(device: torch.device, make: Callable[[], Step]) -> Step:
    """Make a step that has run once, on the stream of captures."""
    step = make()
    with capture_stream(device):
        step()
    return step


def _not_timed(run: DeviceRun, op: str, variant: str, direction: str = "forward") -> str | None:
    """Return why a variant is not timed, or None."""
    from anyflow.ops.backend import missing

    if variant not in bench_ops.BACKENDS:
        return None
    if variant in run.wrong_kernels().get(op, []):
        return "wrong: a check of it failed"
    return missing(variant, run.device, op, direction)


# Attention ----------------------------------------------------------------------------------------


def run_attention(run: DeviceRun) -> None:
    """Time every backend that runs here at the shapes of self-attention and of the text's."""
    from anyflow.models.attention import attention_report

    failed = []
    wrong, small = run.wrong_kernels().get("attention", []), run.sizes["1.3B"]
    shapes = [(size, size.tokens, False) for size in run.sizes.values()]
    shapes += [(size, size.text_tokens, False) for size in run.sizes.values()]
    for size, keys, grad in [*shapes, (small, small.tokens, True)]:
        kind = "self" if keys == size.tokens else "text"
        name = f"{size.name} {kind} {'backward' if grad else 'forward'}"
        if not run.affords(6.0):
            run.put(name, {"skipped": "budget"})
            continue
        example = examples.attention(size.tokens, size.dim, size.head_dim, keys)
        work = example.backward if grad else example.forward
        call = example.call(run.device, run.dtype)
        report = attention_report(
            run.device, dtype=run.dtype, head_dim=size.head_dim, requires_grad=grad
        )
        entry: dict[str, Any] = {"flops": float(work.flops)}
        # calls of milliseconds: launches do not show
        rounds, graphs = (7, False) if kind == "self" else (ROUNDS, True)
        for backend, choice in report.items():  # one by one, as saved tensors are large
            reason = None if choice.available else choice.reason
            if choice.chosen:
                entry["chosen"] = backend
            if backend in wrong:
                reason = "wrong: a check of it failed"
            elif backend == "math" and not run.tiny:
                reason = "materializes the scores"  # 50 GB of them
            maker = {backend: partial(_attend, backend, call.inputs, grad)}
            part, problems = _measure(run, maker, {backend: reason}, rounds, graphs)
            entry |= {key: entry.get(key, {}) | found for key, found in part.items()}
            failed += [f"{name}: {backend}: {problem}" for problem in problems.values()]
            run.put(name, entry, quiet=True)
        run.put(name, entry)
    if failed:
        run.fail("; ".join(failed))


def _attend(backend: str, tensors: Sequence[torch.Tensor], grad: bool) -> Step:
    """Return a step of attention, or of its gradients."""
    from anyflow.models.attention import attention

    if not grad:
        return without_gradient(partial(attention, *tensors, attention_backend=backend))
    out = attention(*tensors, attention_backend=backend)
    return partial(torch.autograd.grad, out, tensors, torch.randn_like(out), retain_graph=True)
