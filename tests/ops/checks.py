"""Compare operators with their formulas: tolerances by dtype, values, gradients, layouts."""

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from formulas import expected
from torch import Tensor

from anyflow.ops.backend import OPERATORS, missing
from anyflow.ops.examples import Arguments, OperatorCall, as_tuple, moved, public_call

DEVICE = torch.device(os.environ.get("ANYFLOW_TEST_DEVICE", "cpu"))

# (relative to the element, relative to the largest element). Results are rounded once from an fp32
# accumulation, so one unit in the last place of the dtype; gradients of half-precision inputs may
# be rounded once more on their way.
TOLERANCES = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (2e-6, 1e-6),
    torch.float16: (2**-10, 2**-12),
    torch.bfloat16: (2**-7, 2**-9),
}
GRADIENT_SLACK = 3.0
# of attention, relative to the largest element: of the result, and of the gradients, which start
# from the rounded result
ATTENTION_TOLERANCES = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (2e-6, 3e-6),
    torch.float16: (2**-11, 2**-9),
    torch.bfloat16: (2**-8, 2**-6),
}
# of rms_norm_rope, relative to the length of a rotated pair
PAIRS = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 2**-10, torch.bfloat16: 2**-8}
# What fp32 functions of a GPU may be off by, relative to the result (PTX ISA 9.1, section 9.7.3):
# 2^-22.9 of rsqrt.approx.f32, two units in the last place, 2^-22, of ex2.approx.f32 and of
# div.full.f32. A CPU rounds its root and its division once, and fusing a product and a sum only
# removes a rounding. The fp32 row above, 33 roundings, has room for them; a test with a tighter
# bound adds on a GPU those that its formula has.
APPROXIMATIONS = {"rsqrt": 2**-22.9, "exp": 2**-22, "division": 2**-22}

Layout = Callable[[Tensor], Tensor]


def approximation(name: str) -> float:
    """Return what a function of this device is off by, beyond its rounding."""
    return APPROXIMATIONS[name] if DEVICE.type == "cuda" else 0.0


def backends(op: str) -> list[str]:
    """List the reference and the backends with kernels of an operator; of any, without a name."""
    with_kernels = OPERATORS.get(op, ("triton", "native"))
    if importlib.util.find_spec("triton") is None:
        with_kernels = tuple(name for name in with_kernels if name != "triton")
    return ["eager", *with_kernels]


def dtypes(op: str, backend: str) -> list[torch.dtype]:
    """List the dtypes that a backend takes."""
    if backend == "eager":
        return list(TOLERANCES)
    kernels = [torch.float32, torch.float16, torch.bfloat16]
    return [d for d in kernels if op != "attention" or d != torch.float16]


def runs(op: str, backend: str) -> bool:
    """Tell whether a kernel must be there; attention's is not offered without AVX2."""
    if DEVICE.type == "cpu":
        return op != "attention" or missing(backend, DEVICE, op) is None
    return missing(backend, DEVICE, op) is None


def assert_matches(
    actual: Tensor, exact: Tensor, tolerance: torch.dtype | None = None, slack: float = 1.0
) -> None:
    """Compare with a result in fp64, by the row of the table for a dtype (that of ``actual``)."""
    rtol, atol = TOLERANCES[actual.dtype if tolerance is None else tolerance]
    scale = exact.abs().nan_to_num().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), exact, rtol=slack * rtol, atol=slack * atol * scale, equal_nan=True
    )


def largest_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest error, relative to the largest element of each tensor.

    Where one vanishes, as the gradients of q and k do for a single key, it is relative to the
    largest of all.
    """
    sizes = [e.abs().max().item() if e.numel() else 0.0 for e in exact]
    sizes = [size if size > 1e-9 * max(sizes) else max(sizes) for size in sizes]
    errors = [
        ((a.double() - e).abs().max() / size).item()
        for a, e, size in zip(actual, exact, sizes, strict=True)
        if e.numel() and size
    ]
    return max(errors, default=0.0)


def check(
    op: str,
    arguments: Arguments,
    function: Callable[..., Any] | None = None,
    layout: Layout | None = None,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Compare an operator with its formula: dtypes, shapes, values, gradients; return the results.

    Args:
        op: name of the operator.
        arguments: of the registered operator, by name.
        function: takes the tensors among them; by default the public function.
        layout: puts the gradients that arrive into another layout.
        seed: of the gradients that arrive.
    """
    call = public_call(op, arguments)
    outputs = as_tuple((call.function if function is None else function)(*call.inputs))
    arguments64 = moved(arguments, DEVICE, torch.float64)
    exact = expected(op, arguments64, returned=outputs)
    outputs = outputs[: len(exact)]
    kinds = result_dtypes(op, arguments)
    for o, e, kind in zip(outputs, exact, kinds, strict=False):
        assert o.shape == e.shape and o.dtype == kind
        if op == "attention":
            assert largest_error([o], [e]) <= ATTENTION_TOLERANCES[kind][0]
        else:
            assert_matches(o, e)
        if op == "rms_norm_rope":
            assert_pairs_match(o, e)
    used = [i for i, e in enumerate(exact) if e.requires_grad]
    if used:
        of = ([outputs[i] for i in used], call.wanted)
        of64 = ([exact[i] for i in used], public_call(op, arguments64).wanted)
        assert_gradients(op, of, of64, layout, seed)
    return outputs


def assert_pairs_match(actual: Tensor, exact: Tensor) -> None:
    """Bound the error of a rotation, which mixes two numbers, by the length of each pair."""
    error, pairs = ((x.flatten(2).unflatten(-1, (-1, 2))) for x in (actual.double() - exact, exact))
    limit = PAIRS[actual.dtype]
    if actual.dtype != torch.float64:  # the root of a mean halves what its division is off by
        limit += approximation("rsqrt") + approximation("division") / 2
    assert (error.norm(dim=-1) <= limit * pairs.norm(dim=-1)).all()


def result_dtypes(op: str, arguments: Arguments) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes that results have: that of the first operand, or the accumulator's."""
    kinds = [v.dtype for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    wide = torch.float64 if torch.float64 in kinds[: 2 if "flow" in op else 1] else torch.float32
    if op == "flow_map_inputs":
        return arguments["dtype"], wide
    return (wide, wide) if op == "flow_map_loss" else (kinds[0], kinds[0])


Evaluated = tuple[Sequence[Tensor], Sequence[Tensor]]


def assert_gradients(
    op: str, actual: Evaluated, exact: Evaluated, layout: Layout | None = None, seed: int = 0
) -> None:
    """Compare the gradients of results and operands under one random cotangent, taken twice.

    The second backward pass must give the same bits (sums have one order) and neither may write
    what it reads.
    """
    (outputs, inputs), (outputs64, inputs64) = actual, exact
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    cotangents = [c.to(o.device, o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    if layout is not None:
        cotangents = [layout(c) for c in cotangents]
    read = [*outputs, *inputs, *cotangents]
    before = [r.detach().clone() for r in read]
    gradients = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
    again = torch.autograd.grad(outputs, inputs, cotangents)
    for pairs in (zip(gradients, again, strict=True), zip(read, before, strict=True)):
        assert all(torch.equal(a.detach().nan_to_num(), b.nan_to_num()) for a, b in pairs)
    wanted = torch.autograd.grad(outputs64, inputs64, [c.double() for c in cotangents])
    half = [i.dtype for i in inputs if i.dtype.itemsize == 2]
    for a, i in zip(gradients, inputs, strict=True):
        assert a.dtype == i.dtype and a.shape == i.shape
    if op == "attention":
        assert largest_error(gradients, wanted) <= ATTENTION_TOLERANCES[inputs[0].dtype][1]
        return
    for a, e in zip(gradients, wanted, strict=True):
        assert_matches(a, e, half[0] if half else None, GRADIENT_SLACK)


# Layouts ------------------------------------------------------------------------------------------


def garbage(x: Tensor) -> Tensor:
    """Fill the gaps of a layout with what no result may show."""
    return torch.full_like(x, math.nan if x.is_floating_point() else 10**6)


def swapped(x: Tensor, first: int, second: int) -> Tensor:
    """Store two dimensions in the other order."""
    return x.transpose(first, second).contiguous().transpose(first, second)


def apart(x: Tensor, factor: int = 2) -> Tensor:
    """Put the rows of D further apart."""
    return torch.stack([*[garbage(x)] * (factor - 1), x], dim=-2)[..., -1, :]


def negative(x: Tensor) -> Tensor:
    """Return a view that stands for the negative of what its memory holds."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag if x.is_floating_point() else x


def misaligned(x: Tensor) -> Tensor:
    """Put the numbers at an address that is no multiple of their size."""
    data = bytearray(x.numel() * x.element_size() + 1)
    return torch.frombuffer(data, dtype=x.dtype, count=x.numel(), offset=1).view(x.shape).copy_(x)


VECTORS: dict[str, Layout] = {
    "every second": lambda x: torch.stack([garbage(x), x], dim=-1)[..., 1],
    "shared": lambda x: x[:1].expand_as(x),
    "negative": negative,
}
if DEVICE.type == "cpu":
    VECTORS["misaligned"] = misaligned
LAYOUTS: dict[str, Layout] = VECTORS | {  # of two dimensions or more
    "transposed": lambda x: swapped(x, -1, 0),
    "apart": apart,
    "samples inside": lambda x: swapped(x, 0, 1),
    "heads first": lambda x: swapped(x, 1, 2) if x.ndim == 4 else x,
    "overlapping": lambda x: x.flatten().as_strided(x.shape, (1,) * x.ndim),
}


def relaid(arguments: Arguments, name: str) -> Arguments:
    """Put every tensor that has enough dimensions into another layout, as a leaf.

    Rows that are apart are so by another distance in each tensor: none may read the strides of
    another one.
    """
    changed = dict(arguments)
    for index, (key, value) in enumerate(arguments.items()):
        if not isinstance(value, Tensor) or value.ndim < (1 if name in VECTORS else 2):
            continue
        with torch.no_grad():
            view = apart(value, 2 + index) if name == "apart" else LAYOUTS[name](value)
        changed[key] = view.detach().requires_grad_(value.requires_grad)
    return changed


def bound(op: str, arguments: Arguments) -> OperatorCall:
    """Bind the registered operator, in place of the public function, to its arguments."""
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

    def function(*tensors: Tensor) -> Any:
        given = {**arguments, **dict(zip(names, tensors, strict=True))}
        return getattr(torch.ops.anyflow, op)(*given.values())

    return OperatorCall(function, [arguments[name] for name in names])
