"""The limits of the device, and kernels at the shapes of both models: operators and attention."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import op_cases
import timing
import torch
from op_cases import Case

from gpu.context import Context, Skip, last_line
from gpu.sizes import Size

COMPILE_SHARE = 0.2  # of the time that is left: compiling the reference takes longer than all measurements


def run_limits(context: Context) -> None:
    """What this device reaches in this run: a product of matrices, and a copy."""
    size = 256 if context.tiny else 8192
    flops, samples = timing.matmul_rate(context.device, size, context.dtype)
    context.put("matmul_flops", flops)
    context.put("matmul", {"size": size, "dtype": str(context.dtype), "samples_ms": samples})
    size = 2**22 if context.tiny else 2**30
    bandwidth, samples = timing.copy_bandwidth(context.device, size)
    context.put("copy_bytes_per_s", bandwidth)
    context.put("copy", {"bytes": 2 * size, "samples_ms": samples})


# Operators ----------------------------------------------------------------------------------------------------------


def cases(context: Context) -> list[Case]:
    """Every operator, what a forward of the models runs first; one modulation row, then one per frame."""
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
    """Triton against the eager reference, the compiled one, and a native CUDA kernel where there is one."""
    compiler = "aot_eager" if context.tiny else "inductor"  # a C++ compiler takes too long for the tiny run
    _measure_cases(context, cases(context), ("triton", "native", "eager"), compiler)


def run_native(context: Context) -> None:
    """Native CUDA kernels against Triton's, forward (backward is Triton's), with more rounds than the table's."""
    with_kernel = [case for case in cases(context) if _problem(context, case, "native") is None]
    if not with_kernel:
        raise Skip(_problem(context, cases(context)[0], "native") or "no native kernels")
    _measure_cases(context, with_kernel, ("triton", "native"), None, directions=("forward",), rounds=40)


def _measure_cases(
    context: Context,
    wanted: list[Case],
    backends: tuple[str, ...],
    compiler: str | None,
    directions: tuple[str, ...] = ("forward", "backward"),
    rounds: int = timing.ROUNDS,
) -> None:
    failed = []
    compile_until = context.remaining() * (1 - COMPILE_SHARE)
    for case in wanted:
        if not context.affords(2.0):
            context.put(case.name, {"skipped": "budget"})
            continue
        compiled = compiler if context.remaining() > compile_until else None
        entry: dict[str, Any] = {"op": case.op}
        entry["bytes"] = {"forward": case.forward_bytes, "backward": case.backward_bytes}
        try:
            call = case.build(context.device) if context.cuda else case.build(context.device, torch.float32)
            for direction in directions:
                able, reasons = _able(context, case, backends, direction)
                if compiler is not None and compiled is None:
                    reasons["compile"] = "budget"
                samples = timing.kernels(timing.variants(call, direction, able, compiled), context.device, rounds)
                entry[direction] = {"ms": timing.medians(samples), "samples_ms": samples, "not_timed": reasons}
        except Exception as error:
            entry["error"] = last_line(error)
            failed.append(case.name)
            if context.cuda:
                torch.cuda.synchronize()  # an error here has broken the device: the section ends, and the process
        context.put(case.name, entry)
    if failed:
        context.fail(
            f"{len(failed)} of {len(wanted)}: {failed[0]}: {context.file.get(context.name, failed[0])['error']}"
        )


def _able(
    context: Context, case: Case, backends: tuple[str, ...], direction: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends that are timed, and why the others are not."""
    reasons = {name: _problem(context, case, name, direction) for name in backends}
    known = {name: reason for name, reason in reasons.items() if reason is not None}
    return tuple(name for name in backends if name not in known), known


def _problem(context: Context, case: Case, backend: str, direction: str = "forward") -> str | None:
    """Why a backend is not timed, or None."""
    from anyflow.ops.backend import missing

    if backend in context.wrong_kernels().get(case.op, []):
        return "its tests failed"
    return missing(backend, context.device, case.op, direction)


# Attention ----------------------------------------------------------------------------------------------------------


def run_attention(context: Context) -> None:
    """Every backend that runs here, forward and backward, at the shapes of self-attention and of the text's."""
    from anyflow.models.attention import attention, attention_report

    failed = []
    for size, keys, grad in _attention_shapes(context):
        name = f"{size.name} {'self' if keys == size.tokens else 'text'} {'backward' if grad else 'forward'}"
        flops = (
            4.0 * size.tokens * keys * size.dim * (2.5 if grad else 1.0)
        )  # backward: five products, one of them again
        if not context.affords(6.0):
            context.put(name, {"skipped": "budget"})
            continue
        report = attention_report(context.device, dtype=context.dtype, head_dim=size.head_dim, requires_grad=grad)
        query, key, value = (
            torch.randn(1, length, size.heads, size.head_dim, device=context.device, dtype=context.dtype)
            for length in (size.tokens, keys, keys)
        )
        entry: dict[str, Any] = {"flops": flops, "ms": {}, "samples_ms": {}, "not_timed": {}}
        for backend, choice in report.items():
            if choice.chosen:
                entry["chosen"] = backend
            if not choice.available or (backend == "math" and not context.tiny):  # its scores alone would be 50 GB
                entry["not_timed"][backend] = choice.reason if not choice.available else "materializes the scores"
                continue
            step = _attention_step(attention, backend, (query, key, value), grad)
            try:
                timing.once(step, context.device)
                if keys == size.tokens:  # milliseconds: the launch does not show
                    samples, _ = timing.calls({backend: step}, context.device, 2 if context.tiny else 7)
                else:
                    samples = timing.kernels({backend: step}, context.device)
            except RuntimeError as error:
                entry["not_timed"][backend] = last_line(error)
                failed.append(f"{name}: {backend}: {last_line(error)}")
                continue
            entry["samples_ms"] |= samples
            entry["ms"][backend] = statistics.median(samples[backend])
        context.put(name, entry)
    if failed:
        context.fail("; ".join(failed))


def _attention_shapes(context: Context) -> Iterator[tuple[Size, int, bool]]:
    for size in context.sizes.values():
        yield size, size.tokens, False
    for size in context.sizes.values():
        yield size, size.text_tokens, False
    yield context.sizes["1.3B"], context.sizes["1.3B"].tokens, True


def _attention_step(function: Any, backend: str, tensors: tuple[torch.Tensor, ...], grad: bool) -> timing.Step:
    if not grad:

        def forward() -> object:
            with torch.no_grad():
                return function(*tensors, attention_backend=backend)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, attention_backend=backend)
    cotangent = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
