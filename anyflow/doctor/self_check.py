"""Check every operator on every backend that runs here against its reference in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from anyflow.ops import use_backend
from anyflow.ops.backend import BACKENDS, OPERATORS, missing
from anyflow.ops.examples import (
    Arguments,
    Example,
    moved,
    public_call,
    small_examples,
)

# Relative to the largest element: fp32 accumulates in another order, and a GPU's roots,
# exponentials and divisions are approximate, each by up to 2^-22 (PTX ISA 9.1, section 9.7.3), of
# which no operator has more than three; one rounding to bf16 is up to 2^-8, and some results have
# two, such as the norm of a sum that is rounded first.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7}
GRADIENT_SLACK = 3.0  # gradients are rounded more than once on their way

# by operator: small, with odd numbers of everything but D
CASES: dict[str, tuple[Example, ...]] = {
    op: tuple(examples)
    for op, examples in groupby(small_examples(), key=lambda example: example.op)
}

_SEED = 7  # of draws that make no sum of the gradients nearly cancel


@dataclass(frozen=True)
class Check:
    """Hold the errors of an operator on a backend, relative to the largest element.

    Attributes:
        op: name of the operator.
        backend: backend that ran it.
        dtype: dtype of the operands.
        forward_error: None where a problem left no number.
        backward_error: None too where the backend has no backward here.
        problem: what failed, or None.
    """

    op: str
    backend: str
    dtype: str
    forward_error: float | None
    backward_error: float | None
    problem: str | None


@dataclass(frozen=True)
class Skipped:
    """Say that a backend does not run an operator on this device, and why."""

    op: str
    backend: str
    reason: str


def self_check(
    device: torch.device, operators: Sequence[str] | None = None, backends: Sequence[str] = BACKENDS
) -> Iterator[Check | Skipped]:
    """Check operators on a device; an error in one is its result, and does not end the others.

    Args:
        device: on which the operators run.
        operators: names; None for all.
        backends: names.
    """
    for op in sorted(OPERATORS) if operators is None else operators:
        for backend in backends:
            reason = missing(backend, device, op)
            if reason is None and backend == "triton" and device.type == "cpu":
                reason = "interpreted on a CPU, which is for tests of the kernels"
            if reason is not None:
                yield Skipped(op, backend, reason)
                continue
            for dtype in TOLERANCE:
                yield _check(op, backend, dtype, device)


def tolerance(dtype: torch.dtype, backward: bool) -> float:
    """Return the largest relative error that passes."""
    return TOLERANCE[dtype] * (GRADIENT_SLACK if backward else 1.0)


def _check(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> Check:
    """Compare every example of an operator, and keep the largest errors."""
    name = str(dtype).removeprefix("torch.")
    with_backward = _runs_backward(op, backend, device)
    errors: dict[bool, float] = {}
    try:
        for example in CASES[op]:
            arguments = example.arguments("cpu", dtype, _SEED)
            found = _errors(op, arguments, backend, device, with_backward)
            for direction, error in zip((False, True), found, strict=True):
                if error is not None:
                    errors[direction] = max(errors.get(direction, 0.0), error)
    except Exception as error:
        raised = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
        return Check(op, backend, name, None, None, raised)
    wrong = [
        _describe(dtype, backward, error)
        for backward, error in errors.items()
        if not error <= tolerance(dtype, backward)  # NaN too
    ]
    finite = {direction: error for direction, error in errors.items() if math.isfinite(error)}
    problem = "; ".join(wrong) if wrong else None
    return Check(op, backend, name, finite.get(False), finite.get(True), problem)


def _describe(dtype: torch.dtype, backward: bool, error: float) -> str:
    """Say what is wrong with values or gradients."""
    what = "gradients" if backward else "values"
    if not math.isfinite(error):
        return f"{what} are not finite"
    return f"{what} are off by {error:.1e}, tolerance {tolerance(dtype, backward):.1e}"


def _runs_backward(op: str, backend: str, device: torch.device) -> bool:
    """Tell whether a backend has a backward; behind native CUDA kernels it is Triton's."""
    if backend == "native" and device.type == "cuda":
        backend = "triton"
    return missing(backend, device, op, "backward") is None


def _errors(
    op: str,
    arguments: Arguments,
    backend: str,
    device: torch.device,
    with_backward: bool,
) -> tuple[float, float | None]:
    """Return the relative errors of the results and of the gradients that the operands want."""
    exact = public_call(op, moved(arguments, "cpu", torch.float64))
    call = public_call(op, moved(arguments, device))
    with use_backend("eager"):
        expected = exact.outputs()
    with use_backend(backend), torch.set_grad_enabled(with_backward):
        actual = call.outputs()
    forward = _error(actual, expected)
    if not with_backward:
        return forward, None
    generator = torch.Generator().manual_seed(_SEED)
    # rounded before either pass reads them: their rounding is no error of the operator
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in actual
    ]
    given = [c.to(device) for c in cotangents]
    gradients = torch.autograd.grad(actual, call.wanted, given)
    wide = [c.double() for c in cotangents]
    return forward, _error(gradients, torch.autograd.grad(expected, exact.wanted, wide))


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest error of the tensors, each relative to its largest element.

    What is not finite counts as infinitely wrong.
    """
    largest = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            raise ValueError(f"the result has shape {tuple(a.shape)}, expected {tuple(e.shape)}")
        error = ((a.detach().cpu().double() - e).abs().max() / e.detach().abs().max()).item()
        largest = max(largest, error if math.isfinite(error) else math.inf)
    return largest
