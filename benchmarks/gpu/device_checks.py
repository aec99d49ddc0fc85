"""Checks that what runs on a device is right; each check names the operators and backends that its
failure accuses.

Operators are compared with their references in fp64: small ones as ``anyflow doctor`` does, then at
the models' sizes, forward and backward, where what a kernel allocates reads NaN until it is written
and a second call must give the same bits. Then more than 2^31 elements, a stream of its own, every
attention backend, GELU in the epilogue of a product, and a small network on the kernels against the
same on the references.

``run_gpu.py`` runs parts of them in processes beside each other (:mod:`gpu.checks`), because most
of the time is a compiler's. By themselves: ``PYTHONPATH=benchmarks python -m gpu.child
gpu.device_checks [--device cpu --tiny]``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import op_cases
import torch
import torch.nn.functional as F
from op_cases import Case
from torch import Tensor

from anyflow import ops
from anyflow.doctor.self_check import CASES, TOLERANCE, Check, self_check, tolerance
from anyflow.models.attention import attention, attention_report
from anyflow.ops import backend_report, use_backend
from anyflow.ops.backend import BACKENDS, missing
from gpu import small_network
from gpu.context import last_line

# Of ||a - e|| / ||e||. One rounding to bf16 is 2^-9 of an element at most, and results have up to
# three on their way; in fp32 they have their own sums and a GPU's approximate functions, for which
# the self-check's bound stands.
LIMITS = {torch.bfloat16: 3 * 2.0**-9, torch.float32: 3 * TOLERANCE[torch.float32]}
SAME = 1e-6  # of what the same kernels compute in another order of launches

NETWORKS, OPERATOR, RECORD = "networks", "operator", "record"

Backends = dict[str, list[str]]  # by operator


@dataclass(frozen=True)
class DeviceCheck:
    """Describes a check.

    Attributes:
        name: unique.
        limit: the largest error that passes.
        run: gives the error, or raises.
        accuses: backends by operator that are wrong if it fails; empty for a check of a whole
            network.
        stops: what is not timed after a failure: ``"networks"`` that run the operator, and the
            operator itself; ``"operator"``, that alone; ``"record"``, nothing.
    """

    name: str
    limit: float
    run: Callable[[], float]
    accuses: Backends = field(default_factory=dict)
    stops: str = RECORD


@dataclass(frozen=True)
class Outcome:
    """Holds what a check found.

    Attributes:
        ok: whether it passed.
        error: that was measured; None where the check raised.
        limit: the largest one that passes.
        problem: why it failed, or None.
        numbers: whether it failed by wrong numbers, and not by an exception.
        seconds: that it took.
        accuses, stops: of the check.
    """

    name: str
    ok: bool
    error: float | None
    limit: float
    problem: str | None
    numbers: bool
    seconds: float
    accuses: Backends
    stops: str


class WrongNumbers(Exception):
    """Says that a result is wrong in another way than by a size of its error."""


def catalogue(device: torch.device, tiny: bool) -> list[DeviceCheck]:
    """List the checks for a device; nothing is allocated."""
    found = [DeviceCheck(*check) for check in small_network.checks(device, tiny)]
    found += _operators(device, tiny)
    found += [*_self_checks(device), *_attention(device, tiny), *_launches(device, tiny)]
    assert len({check.name for check in found}) == len(found), "two checks have the same name"
    return found


def evaluate(check: DeviceCheck) -> Outcome:
    """Run a check; an exception is its outcome."""
    started, error, problem, numbers = time.monotonic(), None, None, False
    try:
        error = check.run()
        if not error <= check.limit:  # NaN too
            problem, numbers = f"the error is {error:.1e}, allowed are {check.limit:.1e}", True
    except WrongNumbers as wrong:
        problem, numbers = str(wrong), True
    except Exception as exception:
        problem = last_line(exception)
    seconds = round(time.monotonic() - started, 2)
    accused = (check.accuses, check.stops)
    return Outcome(
        check.name, problem is None, error, check.limit, problem, numbers, seconds, *accused
    )


# Operators ----------------------------------------------------------------------------------------


def _self_checks(device: torch.device) -> Iterator[DeviceCheck]:
    """Compare small inputs of every dtype with fp64, operator by operator and backend by
    backend.
    """
    for op in sorted(CASES):
        for backend in _kernels(op, device):
            run = partial(_self_check, op, backend, device)
            # the widest one; the self-check has one for each dtype
            limit = tolerance(torch.bfloat16, backward=True)
            yield DeviceCheck(f"{op}, small: {backend}", limit, run, {op: [backend]}, NETWORKS)


def _self_check(op: str, backend: str, device: torch.device) -> float:
    found = [check for check in self_check(device, (op,), (backend,)) if isinstance(check, Check)]
    bad = [check for check in found if check.problem is not None]
    if bad:
        problem = "; ".join(f"{check.dtype}: {check.problem}" for check in bad)
        numbers = all((check.problem or "").startswith(("values", "gradients")) for check in bad)
        raise (WrongNumbers if numbers else RuntimeError)(problem)
    errors = [error for check in found for error in (check.forward_error, check.backward_error)]
    return max((error for error in errors if error is not None), default=0.0)


def _kernels(op: str, device: torch.device) -> list[str]:
    """Return the backends with kernels of an operator that run on a device, interpreted ones left
    out.
    """
    names = [name for name in BACKENDS if name != "eager" and missing(name, device, op) is None]
    return [name for name in names if device.type == "cuda" or name != "triton"]


def _operators(device: torch.device, tiny: bool) -> Iterator[DeviceCheck]:
    """Check every operator at the models' sizes on each backend, and at one whose sizes are no
    powers of two.
    """
    for case in _cases(tiny):
        for backend in _kernels(case.op, device):
            run = partial(_compare, case, backend, device)
            limit = LIMITS[torch.bfloat16 if case.dtype == torch.bfloat16 else torch.float32]
            yield DeviceCheck(f"{case.name}: {backend}", limit, run, {case.op: [backend]}, NETWORKS)


def _cases(tiny: bool) -> list[Case]:
    if tiny:
        rows = [*op_cases.row_cases(42, 256, 1), *op_cases.row_cases(42, 128, 21)]
        return [*rows, op_cases.embedding_case(3, 64), *op_cases.flow_map_cases(2, (2, 4, 4, 4))]
    rows = [
        case
        for tokens, dim, r in (
            (op_cases.TOKENS, 1536, 1),
            (op_cases.TOKENS, 5120, 1),
            (op_cases.TOKENS, 1536, 21),
        )
        for case in op_cases.row_cases(tokens, dim, r)
    ]
    rows += op_cases.row_cases(33, 3072, 3)
    return [*rows, op_cases.embedding_case(21, 5120), *op_cases.flow_map_cases(8, op_cases.LATENTS)]


def _compare(case: Case, backend: str, device: torch.device) -> float:
    """Measure the largest error of a result or a gradient, against the reference in fp64 on the
    same numbers.
    """
    call = case.build(device, case.dtype)
    evaluation = _Evaluation(
        call.function,
        [
            i
            for i, tensor in enumerate(call.inputs)
            if any(tensor is wanted for wanted in call.wanted)
        ],
        # native CUDA kernels run forward only
        backward=backend != "native" or device.type != "cuda",
        training=call.training,
    )
    with poisoned():
        cotangents = evaluation.cotangents(call.inputs, backend)
        found, again = (evaluation.results(call.inputs, cotangents, backend) for _ in range(2))
        if not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
            raise WrongNumbers(
                "not the same bits twice, or NaN: an element is not written, or there is a race"
            )
    del again
    return _largest_error(case, evaluation, call.inputs, cotangents, found)


@dataclass(frozen=True)
class _Evaluation:
    """Calls an operator.

    Attributes:
        function: of the inputs.
        wanted: positions of the inputs whose gradient is taken.
        backward: whether gradients are taken.
        training: whether its forward computes the gradient too, so that without gradients it is
            another kernel.
    """

    function: Callable[..., object]
    wanted: list[int]
    backward: bool
    training: bool

    def outputs(self, inputs: Sequence[Tensor], backend: str, grad: bool) -> tuple[Tensor, ...]:
        """Run forward."""
        with use_backend(backend), torch.set_grad_enabled(grad or self.training):
            out = self.function(*inputs)
        return out if isinstance(out, tuple) else (out,)  # type: ignore[return-value]

    def cotangents(self, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        """Draw gradients of the results."""
        results = self.outputs([t.detach() for t in inputs], backend, grad=False)
        generator = torch.Generator(inputs[0].device).manual_seed(1)
        draws = (torch.randn(o.shape, generator=generator, device=o.device) for o in results)
        return [draw.to(o.dtype) for draw, o in zip(draws, results, strict=True)]

    def results(
        self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], backend: str
    ) -> list[Tensor]:
        """Return the outputs and the gradients of the wanted inputs."""
        leaves = [
            t.detach().requires_grad_(i in self.wanted and self.backward)
            for i, t in enumerate(inputs)
        ]
        outputs = self.outputs(leaves, backend, self.backward)
        gradients: tuple[Tensor, ...] = ()
        if self.backward:
            with use_backend(backend):
                gradients = torch.autograd.grad(
                    outputs, [leaves[i] for i in self.wanted], cotangents
                )
        return [*(o.detach() for o in outputs), *gradients]


def _largest_error(
    case: Case,
    evaluation: _Evaluation,
    inputs: Sequence[Tensor],
    cotangents: list[Tensor],
    found: list[Tensor],
) -> float:
    """Evaluate the reference in fp64, some tokens at a time: all of them would not fit the memory
    of six processes.
    """
    parts = 1 if inputs[0].ndim != 3 else case.rows if case.rows > 1 else min(8, case.tokens)
    sums: dict[int, Tensor] = {}  # expected gradients of what all tokens share
    # of the error, of the expected
    squares = torch.zeros(2, len(found), device=inputs[0].device, dtype=torch.float64)
    for number in range(parts):
        first, last = (n * case.tokens // parts for n in (number, number + 1))

        def part(t: Tensor, number: int = number, first: int = first, last: int = last) -> Tensor:
            if t.ndim >= 3 and t.shape[1] == case.tokens:
                return t[:, first:last]
            if t.ndim == 3 and t.shape[1] == case.rows > 1:
                return t[:, number : number + 1]
            return t[first:last] if t.ndim == 2 and t.shape[0] == case.tokens else t

        arguments = ([_wide(part(t)) for t in tensors] for tensors in (inputs, cotangents))
        for index, (actual, expected) in enumerate(
            zip(found, evaluation.results(*arguments, "eager"), strict=True)
        ):
            if (piece := part(actual)) is actual:
                sums[index] = expected + sums[index] if index in sums else expected
            else:
                squares[0, index] += (piece.double() - expected).square().sum()
                squares[1, index] += expected.square().sum()
    for index, expected in sums.items():
        squares[0, index] = (found[index].double() - expected).square().sum()
        squares[1, index] = expected.square().sum()
    return (squares[0] / squares[1]).sqrt().max().item()


def _wide(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t


@contextmanager
def poisoned() -> Iterator[None]:
    """Let what is allocated read NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return ``||a - e|| / ||e||``, NaN where the result has one."""
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()


# Sizes, streams, products -------------------------------------------------------------------------


def _launches(device: torch.device, tiny: bool) -> Iterator[DeviceCheck]:
    chosen = backend_report(device)["layer_norm_modulate"].backend
    accused = {"layer_norm_modulate": [chosen]}
    yield DeviceCheck(
        "more than 2^31 elements", SAME, partial(_beyond_32_bits, device, tiny), accused, RECORD
    )
    if device.type != "cuda":
        return
    for backend in _kernels("layer_norm_modulate", device):
        run, accused = partial(_another_stream, device, backend), {"layer_norm_modulate": [backend]}
        yield DeviceCheck(
            f"a stream of its own: {backend}", LIMITS[torch.float32], run, accused, OPERATOR
        )
    yield DeviceCheck(
        "GELU in the epilogue of a product", LIMITS[torch.bfloat16], partial(_gelu_epilogue, device)
    )


def _draw(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, device=device, dtype=dtype, generator=generator)


def _beyond_32_bits(device: torch.device, tiny: bool) -> float:
    """Compare the last sample of a batch whose elements need 33 bits to count with that sample
    alone.
    """
    batch, tokens, dim = (2, 42, 64) if tiny else (14, op_cases.TOKENS, 5120)
    x, shift, scale = (
        _draw(device, batch, tokens, dim),
        *(_draw(device, batch, 21, dim) for _ in range(2)),
    )
    with torch.no_grad():
        whole = ops.layer_norm_modulate(x, shift, scale)[-1:]
        alone = ops.layer_norm_modulate(x[-1:].clone(), shift[-1:].clone(), scale[-1:].clone())
    return relative(whole, alone)


def _another_stream(device: torch.device, backend: str) -> float:
    """Run an operator on a side stream, behind a copy that is late: it must wait for that stream
    and no other one.
    """
    x, shift, scale = (_draw(device, 1, n, 1536, dtype=torch.float32) for n in (4096, 1, 1))
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), use_backend(backend), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        out = ops.layer_norm_modulate(late, shift, scale)
    side.synchronize()
    with use_backend("eager"):
        return relative(out, ops.layer_norm_modulate(x.double(), shift.double(), scale.double()))


def _gelu_epilogue(device: torch.device) -> float:
    from anyflow.models.linear import linear_gelu

    x, weight, bias = (
        _draw(device, 1, 777, 1536),
        _draw(device, 8960, 1536) / 39,
        _draw(device, 8960),
    )
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()), approximate="tanh")
    return relative(linear_gelu(x, weight, bias), expected)


# Attention ----------------------------------------------------------------------------------------


def _attention(device: torch.device, tiny: bool) -> Iterator[DeviceCheck]:
    """Check every backend that runs here: the weights, the result and, backward, the scores'
    gradient are rounded.
    """
    for backward in (False, True):
        report = attention_report(
            device, dtype=torch.bfloat16, head_dim=128, requires_grad=backward
        )
        for name, choice in report.items():
            if choice.available:
                what = (
                    "attention "
                    f"{name}{', backward' if backward else ''}{' (chosen)' if choice.chosen else ''}"
                )
                run = partial(_attention_error, device, name, 33 if tiny else 777, backward)
                yield DeviceCheck(what, 5 * 2.0**-9, run, {"attention": [name]}, OPERATOR)


def _attention_error(device: torch.device, backend: str, length: int, backward: bool) -> float:
    q, k, v = (_draw(device, 2, n, 4, 128).requires_grad_(backward) for n in (length, 130, 131))
    v = v[:, :130].detach().requires_grad_(backward)  # other numbers than the keys
    wide = [t.detach().double().requires_grad_(backward) for t in (q, k, v)]
    with torch.set_grad_enabled(backward):
        out = attention(q, k, v, attention_backend=backend)
        expected = (
            F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in wide))
            .transpose(1, 2)
            .flatten(2)
        )
        errors = [relative(out, expected)]
        if backward:
            cotangent = _draw(device, *out.shape)
            gradients = torch.autograd.grad(out, (q, k, v), cotangent)
            expected_gradients = torch.autograd.grad(expected, wide, cotangent.double())
            errors += [relative(a, e) for a, e in zip(gradients, expected_gradients, strict=True)]
    return max(errors)


# A part, in a process of its own ------------------------------------------------------------------


def run_part(
    names: list[str], device: torch.device, tiny: bool, deadline: float, out: Path | None
) -> int:
    """Run checks by name; each one is noted in ``out`` before and after, a line of JSON. Returns
    how many failed.
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
        print(
            f"{'ok  ' if outcome.ok else 'FAIL'} {outcome.seconds:5.1f} s  {check.name}: {shown}",
            flush=True,
        )
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
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes in place of the models'")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="after which no check is started"
    )
    parser.add_argument("--names", type=Path, help="a JSON list of the checks to run; default all")
    parser.add_argument("--out", type=Path, help="file for the outcomes, a line of JSON for each")
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
