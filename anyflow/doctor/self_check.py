"""Every operator, forward and backward, on every backend that runs here, against its reference in
fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow import ops
from anyflow.ops import use_backend
from anyflow.ops.backend import BACKENDS, OPERATORS, missing

# Relative to the largest element: fp32 accumulates in another order, and a GPU's roots,
# exponentials and divisions are approximate, each by up to 2^-22 (PTX ISA 9.1, section 9.7.3), of
# which no operator has more than three; one rounding to bf16 is up to 2^-8, and some results have
# two, such as the norm of a sum that is rounded first.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7}
GRADIENT_SLACK = 3.0  # gradients are rounded more than once on their way

_SEED = 7  # of draws that make no sum of the gradients nearly cancel
_DIM = 88  # D: the kernels take multiples of 8; this one is none of 16

Draw = Callable[..., Tensor]
Call = tuple[Callable[..., Any], Sequence[Tensor]]
Build = Callable[[Draw], Call]


@dataclass(frozen=True)
class Check:
    """An operator on a backend in a dtype; errors are relative to the largest element.

    Attributes:
        forward_error: None where there is no number, because of the problem.
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
    """An operator that a backend does not run on this device, and why."""

    op: str
    backend: str
    reason: str


def self_check(
    device: torch.device, operators: Sequence[str] | None = None, backends: Sequence[str] = BACKENDS
) -> Iterator[Check | Skipped]:
    """Check operators on a device, None for all of them; an error in one is its result, and the
    others go on.
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
    """The largest relative error that passes."""
    return TOLERANCE[dtype] * (GRADIENT_SLACK if backward else 1.0)


def _check(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> Check:
    name = str(dtype).removeprefix("torch.")
    with_backward = _runs_backward(op, backend, device)
    errors: dict[bool, float] = {}
    try:
        for build in CASES[op]:
            forward, backward = _errors(build, backend, dtype, device, with_backward)
            for direction, error in ((False, forward), (True, backward)):
                if error is not None:
                    errors[direction] = max(errors.get(direction, 0.0), error)
    except Exception as error:
        return Check(
            op,
            backend,
            name,
            None,
            None,
            f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}",
        )
    wrong = [
        f"{'gradients' if backward else 'values'} are off by {error:.1e}, tolerance "
        f"{tolerance(dtype, backward):.1e}"
        if math.isfinite(error)
        else f"{'gradients' if backward else 'values'} are not finite"
        for backward, error in errors.items()
        if not error <= tolerance(dtype, backward)  # NaN too
    ]
    finite = {direction: error for direction, error in errors.items() if math.isfinite(error)}
    return Check(
        op, backend, name, finite.get(False), finite.get(True), "; ".join(wrong) if wrong else None
    )


def _runs_backward(op: str, backend: str, device: torch.device) -> bool:
    if backend == "native" and device.type == "cuda":
        backend = "triton"  # as the choice of the backend does it
    return missing(backend, device, op, "backward") is None


def _errors(
    build: Build, backend: str, dtype: torch.dtype, device: torch.device, with_backward: bool
) -> tuple[float, float | None]:
    """Relative errors of the outputs and of the gradients of everything that has one."""
    generator = torch.Generator().manual_seed(_SEED)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        )

    function, inputs = build(draw)
    exact = [_leaf(x, torch.device("cpu"), torch.float64) for x in inputs]
    with use_backend("eager"):
        expected = _tuple(function(*exact))
        cotangents = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype)
            for o in expected
        ]
        wanted = [x for x in exact if x.requires_grad]
        expected_gradients = torch.autograd.grad(expected, wanted, [c.double() for c in cotangents])
    actual_inputs = [_leaf(x, device, x.dtype) for x in inputs]
    with use_backend(backend), torch.set_grad_enabled(with_backward):
        actual = _tuple(function(*actual_inputs))
        forward = _error(actual, expected)
        if not with_backward:
            return forward, None
        wanted = [x for x in actual_inputs if x.requires_grad]
        given = [c.to(o.device, o.dtype) for c, o in zip(cotangents, actual, strict=True)]
        return forward, _error(torch.autograd.grad(actual, wanted, given), expected_gradients)


def _leaf(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    moved = x.detach().to(device, dtype if x.is_floating_point() else x.dtype)
    return moved.requires_grad_(x.requires_grad)


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest error of each tensor relative to its largest element; infinity for what is not
    finite.
    """
    largest = 0.0
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            raise ValueError(f"the result has shape {tuple(a.shape)}, expected {tuple(e.shape)}")
        error = ((a.detach().cpu().double() - e).abs().max() / e.detach().abs().max()).item()
        largest = max(largest, error if math.isfinite(error) else math.inf)
    return largest


def _layer_norm_modulate(draw: Draw) -> Call:
    rows = [draw(2, 5, _DIM, dtype=torch.float32) for _ in range(2)]
    return ops.layer_norm_modulate, [draw(2, 15, _DIM), *rows]


def _residual_affine(draw: Draw) -> Call:
    gate, weight, bias = (
        draw(*shape, dtype=torch.float32) for shape in ((2, 3, _DIM), (_DIM,), (_DIM,))
    )
    inputs = [draw(2, 15, _DIM), draw(2, 15, _DIM), gate, weight, bias]
    return lambda x, y, g, w, b: ops.residual_layer_norm(x, y, g, weight=w, bias=b), inputs


def _residual_modulated(draw: Draw) -> Call:
    shift, scale = (draw(2, 1, _DIM, dtype=torch.float32) for _ in range(2))
    inputs = [draw(2, 7, _DIM), draw(2, 7, _DIM), shift, scale]
    return lambda x, y, s, c: ops.residual_layer_norm(x, y, shift=s, scale=c), inputs


def _gated_residual(draw: Draw) -> Call:
    return ops.gated_residual, [
        draw(2, 15, _DIM),
        draw(2, 15, _DIM),
        draw(2, 5, _DIM, dtype=torch.float32),
    ]


def _rms_norm_rope(draw: Draw) -> Call:
    heads = 4
    angle = draw(13, _DIM // heads // 2, dtype=torch.float32).detach()
    inputs = [draw(2, 13, _DIM), draw(_DIM, dtype=torch.float32), angle.cos(), angle.sin()]
    return lambda x, w, c, s: ops.rms_norm_rope(x, w, c, s, num_heads=heads), inputs


def _dual_timestep_embedding(fusion: str) -> Build:
    def build(draw: Draw) -> Call:
        gate = torch.tensor(0.25, requires_grad=True)
        return lambda t, r, g: ops.dual_timestep_embedding(t, r, g, fusion), [
            draw(3, _DIM),
            draw(3, _DIM),
            gate,
        ]

    return build


def _flow_map_inputs(draw: Draw) -> Call:
    times, rows = torch.linspace(0.1, 0.9, 15).view(3, 5), torch.tensor([2, -3])
    inputs = [draw(3, 5, 2, 3, 7), draw(3, 5, 2, 3, 7), times, rows]
    return lambda x, e, t, rows: ops.flow_map_inputs(x, e, t, (0.005, 0.004), rows), inputs


def _flow_map_loss(draw: Draw) -> Call:
    pred = draw(3, 5, 2, 3, 7)
    uncond, latents, noise = (draw(*pred.shape).detach() for _ in range(3))
    plus, minus = (draw(2, *pred.shape[1:]).detach() for _ in range(2))
    t, weight, rows = (
        torch.linspace(0.1, 0.9, 3),
        torch.linspace(0.5, 1.5, 3),
        torch.tensor([2, -3]),
    )

    def loss(
        p: Tensor, u: Tensor, a: Tensor, b: Tensor, x: Tensor, e: Tensor, *constants: Tensor
    ) -> Tensor:
        t, weight, rows = constants
        return ops.flow_map_loss(p, u, a, b, x, e, t, t * 0.5, weight, 3.0, 0.01, picked=rows)

    return loss, [pred, uncond, plus, minus, latents, noise, t, weight, rows]


def _gelu(draw: Draw) -> Call:
    return ops.gelu, [draw(3, 7, _DIM)]


def _linear(draw: Draw) -> Call:
    return ops.linear, [draw(2, 300, _DIM), draw(96, _DIM), draw(96)]  # enough of them for oneDNN


def _attention(draw: Draw) -> Call:
    return ops.attention, [draw(2, 13, 3, 24), draw(2, 9, 3, 24), draw(2, 9, 3, 24)]


# Small, with odd numbers of everything else; each makes a function and its inputs from draws in the
# dtype under check.
CASES: dict[str, tuple[Build, ...]] = {
    "attention": (_attention,),
    "dual_timestep_embedding": tuple(map(_dual_timestep_embedding, ("gated", "additive"))),
    "flow_map_inputs": (_flow_map_inputs,),
    "flow_map_loss": (_flow_map_loss,),
    "gated_residual": (_gated_residual,),
    "gelu": (_gelu,),
    "layer_norm_modulate": (_layer_norm_modulate,),
    "linear": (_linear,),
    "residual_layer_norm": (_residual_affine, _residual_modulated),
    "rms_norm_rope": (_rms_norm_rope,),
}
