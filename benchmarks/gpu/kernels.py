"""Measures the limits of the device, and kernels at the shapes of both models: operators and
attention.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import op_cases
import timing
import torch
from op_cases import Call, Case

from gpu.context import Context, Skip, last_line
from gpu.sizes import Size

# Bytes copied, all beyond any cache: a tensor of 32760 tokens at 14B, and 1 GiB, which the driver
# of an H200 moved at 2.7 TB/s in place of 4.2.
COPIES = (320 * 2**20, 2**30)
# Variants that are not ours: one that raises is recorded, and fails no section. Inductor (2.11,
# 2.13) gives [D] for the gradient of a [1, 1, D] operand where it sums over rows and over columns
# in one kernel (mix_order_reduction).
PEERS = ("eager", "compile")
# of the time that is left: compiling the reference takes longer than all measurements
COMPILE_SHARE = 0.2


def run_limits(context: Context) -> None:
    """Measure what this device reaches in this run: a product of matrices, and copies by two kinds
    of kernel.
    """
    size = 256 if context.tiny else 8192
    flops, samples = timing.matmul_rate(context.device, size, context.dtype)
    context.put("matmul_flops", flops)
    context.put("matmul", {"size": size, "dtype": str(context.dtype), "samples_ms": samples})
    for size in (2**22,) if context.tiny else COPIES:
        samples = timing.copies(context.device, size)
        for name, milliseconds in timing.medians(samples).items():
            entry = {"bytes": 2 * size, "ms": milliseconds, "samples_ms": samples[name]}
            context.put(f"copy: {size // 2**20} MiB, {name}", entry)


# Operators ----------------------------------------------------------------------------------------


def cases(context: Context) -> list[Case]:
    """List every operator, what a forward of the models runs first; one modulation row, then one
    per frame.
    """
    if context.tiny:
        return [
            *op_cases.row_cases(24, 64, 1),
            op_cases.embedding_case(3, 64),
            *op_cases.flow_map_cases(2, (2, 4, 4, 4)),
        ]
    ordered = [case for dim in (1536, 5120) for case in op_cases.row_cases(op_cases.TOKENS, dim, 1)]
    ordered += op_cases.flow_map_cases(8, op_cases.LATENTS)
    ordered += [op_cases.embedding_case(21, dim) for dim in (1536, 5120)]
    return ordered + op_cases.row_cases(op_cases.TOKENS, 1536, 21)


def run_operators(context: Context) -> None:
    """Time Triton against the eager reference, the compiled one, and a native CUDA kernel where
    there is one.
    """
    # a C++ compiler takes too long for the tiny run
    compiler = "aot_eager" if context.tiny else "inductor"
    _measure_cases(context, cases(context), ("triton", "native", "eager"), compiler)


def run_native(context: Context) -> None:
    """Time native CUDA kernels against Triton's, forward (backward is Triton's), in more rounds
    than the table's.
    """
    with_kernel = [case for case in cases(context) if _problem(context, case, "native") is None]
    if not with_kernel:
        raise Skip(_problem(context, cases(context)[0], "native") or "no native kernels")
    _measure_cases(
        context, with_kernel, ("triton", "native"), None, directions=("forward",), rounds=40
    )


def _measure_cases(
    context: Context,
    wanted: list[Case],
    backends: tuple[str, ...],
    compiler: str | None,
    directions: tuple[str, ...] = ("forward", "backward"),
    rounds: int = timing.ROUNDS,
) -> None:
    failed, left_out = [], 0
    compile_until = context.remaining() * (1 - COMPILE_SHARE)
    for case in wanted:
        # by an earlier run that ended before all cases were
        if _is_measured(context, case, directions):
            continue
        if not context.affords(2.0):
            left_out += 1
            if context.file.get(context.name, case.name) is None:
                context.put(case.name, {"skipped": "budget"})
            continue
        entry: dict[str, Any] = {"op": case.op}
        entry["bytes"] = {"forward": case.forward_bytes, "backward": case.backward_bytes}
        try:
            call = (
                case.build(context.device)
                if context.cuda
                else case.build(context.device, torch.float32)
            )
            for direction in directions:
                able, reasons = _able(context, case, backends, direction)
                compiled = compiler if context.remaining() > compile_until else None
                if compiler is not None and compiled is None:
                    reasons["compile"] = "budget"
                entry[direction], problems = _measure(
                    context, call, direction, able, compiled, rounds
                )
                entry[direction]["not_timed"] = reasons | problems
                own = {name: problem for name, problem in problems.items() if name not in PEERS}
                failed += [
                    f"{case.name}, {direction}: {name}: {problem}" for name, problem in own.items()
                ]
        except Exception as error:
            entry["error"] = last_line(error)
            failed.append(f"{case.name}: {entry['error']}")
            _require_device(context)
        context.put(case.name, entry)
    if failed:
        context.fail(f"{len(failed)} variants: {failed[0]}")
    elif left_out:
        raise Skip(f"budget: {left_out} of {len(wanted)} cases are not timed yet")


def _is_measured(context: Context, case: Case, directions: tuple[str, ...]) -> bool:
    """Tell whether the results have a case already, without an error and with no kernel that is
    wrong.
    """
    entry = context.file.get(context.name, case.name) or {}
    if "error" in entry or any(direction not in entry for direction in directions):
        return False
    wrong = context.wrong_kernels().get(case.op, [])
    return not any(
        backend in entry[direction]["ms"] for direction in directions for backend in wrong
    )


def _measure(
    context: Context,
    call: Call,
    direction: str,
    backends: tuple[str, ...],
    compiler: str | None,
    rounds: int,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time the variants of one direction beside each other; one that raises is a problem of its
    own.
    """
    steps: dict[str, timing.Step] = {}
    problems: dict[str, str] = {}

    def failed(name: str, error: Exception) -> None:
        problems[name] = last_line(error)
        _require_device(context)

    for name in (*backends, *(() if compiler is None else ("compile",))):
        try:
            own = (name,) if name != "compile" else ()
            steps |= timing.variants(call, direction, own, compiler if name == "compile" else None)
        except Exception as error:
            failed(name, error)
    samples = timing.kernels(steps, context.device, rounds, failed)
    return {"ms": timing.medians(samples), "samples_ms": samples}, problems


def _require_device(context: Context) -> None:
    """Raise if an error has broken the device: the section ends, and the process."""
    if context.cuda:
        torch.cuda.synchronize()


def _able(
    context: Context, case: Case, backends: tuple[str, ...], direction: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the backends that are timed, and why the others are not."""
    reasons = {name: _problem(context, case, name, direction) for name in backends}
    known = {name: reason for name, reason in reasons.items() if reason is not None}
    return tuple(name for name in backends if name not in known), known


def _problem(context: Context, case: Case, backend: str, direction: str = "forward") -> str | None:
    """Return why a backend is not timed, or None."""
    from anyflow.ops.backend import missing

    if backend in context.wrong_kernels().get(case.op, []):
        return "wrong: a check of it failed"
    return missing(backend, context.device, case.op, direction)


# Attention ----------------------------------------------------------------------------------------


def run_attention(context: Context) -> None:
    """Time every backend that runs here, forward and backward, at the shapes of self-attention and
    of the text's.
    """
    from anyflow.models.attention import attention, attention_report

    failed = []
    for size, keys, grad in _attention_shapes(context):
        name = (
            f"{size.name} {'self' if keys == size.tokens else 'text'} "
            f"{'backward' if grad else 'forward'}"
        )
        products = 5 if grad else 2  # of which backward computes one again
        flops = 2.0 * products * size.tokens * keys * size.dim
        if not context.affords(6.0):
            context.put(name, {"skipped": "budget"})
            continue
        report = attention_report(
            context.device, dtype=context.dtype, head_dim=size.head_dim, requires_grad=grad
        )
        tensors = tuple(
            torch.randn(
                1, length, size.heads, size.head_dim, device=context.device, dtype=context.dtype
            )
            for length in (size.tokens, keys, keys)
        )
        entry: dict[str, Any] = {"flops": flops, "ms": {}, "samples_ms": {}, "not_timed": {}}
        for backend, choice in report.items():
            if choice.chosen:
                entry["chosen"] = backend
            reason = _attention_problem(context, backend, choice.available, choice.reason)
            if reason is not None:
                entry["not_timed"][backend] = reason
                continue
            step = None  # its saved tensors go before the next one's come
            try:
                step = _attention_step(attention, backend, tensors, grad)
                timing.once(step, context.device)
                if keys == size.tokens:  # milliseconds: the launch does not show
                    samples, _ = timing.calls(
                        {backend: step}, context.device, 2 if context.tiny else 7
                    )
                else:
                    samples = timing.kernels({backend: step}, context.device)
            except Exception as error:
                entry["not_timed"][backend] = last_line(error)
                failed.append(f"{name}: {backend}: {last_line(error)}")
                _require_device(context)
                continue
            entry["samples_ms"] |= samples
            entry["ms"][backend] = statistics.median(samples[backend])
            context.put(name, entry, quiet=True)
        context.put(name, entry)
    if failed:
        context.fail("; ".join(failed))


def _attention_problem(context: Context, backend: str, available: bool, reason: str) -> str | None:
    """Return why a backend is not timed, or None."""
    if not available:
        return reason
    if backend in context.wrong_kernels().get("attention", []):
        return "wrong: a check of it failed"
    # 50 GB of them
    return "materializes the scores" if backend == "math" and not context.tiny else None


def _attention_shapes(context: Context) -> Iterator[tuple[Size, int, bool]]:
    for size in context.sizes.values():
        yield size, size.tokens, False
    for size in context.sizes.values():
        yield size, size.text_tokens, False
    yield context.sizes["1.3B"], context.sizes["1.3B"].tokens, True


def _attention_step(
    function: Any, backend: str, tensors: tuple[torch.Tensor, ...], grad: bool
) -> timing.Step:
    if not grad:

        def forward() -> object:
            with torch.no_grad():
                return function(*tensors, attention_backend=backend)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, attention_backend=backend)
    cotangent = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
