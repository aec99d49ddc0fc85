"""Every operator on every backend against its formula in fp64, on examples of the catalog."""

from collections.abc import Sequence

import pytest
import torch
from checks import DEVICE, LAYOUTS, backends, bound, check, dtypes, relaid
from forms import EMPTY, EPS, FORMS, FUSIONS, KINDS, MIXED, NARROW, SIZES, SLOW
from formulas import expected
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.ops import use_backend
from anyflow.ops.backend import OPERATORS
from anyflow.ops.examples import (
    RESIDUAL_VARIANTS,
    Example,
    FrameTimes,
    as_tuple,
    attention,
    dual_timestep_embedding,
    flow_map_inputs,
    flow_map_loss,
    gated_residual,
    gelu,
    layer_norm_modulate,
    linear,
    moved,
    public_call,
    registered_calls,
    residual_layer_norm,
    rms_norm_rope,
)

TWO_RESULTS = ("residual_layer_norm", "dual_timestep_embedding", "flow_map_inputs")


def label(example: Example) -> str:
    """Name an example in the id of a test."""
    parts = (example.op, example.variant, f"{example.tokens}x{example.dim}x{example.rows}")
    return "-".join(part.replace(" ", "_") for part in parts if part)


def over(
    examples: Sequence[Example], kinds: Sequence[torch.dtype] | None = None, kernels: bool = False
) -> pytest.MarkDecorator:
    """Parametrize by the examples, the backends of their operators, and dtypes that these take."""
    found = []
    for example in examples:
        for name in backends(example.op)[kernels:]:
            taken = dtypes(example.op, name)
            for dtype in taken if kinds is None else [kind for kind in kinds if kind in taken]:
                kind = str(dtype).removeprefix("torch.")
                found.append(
                    pytest.param(example, name, dtype, id=f"{label(example)}-{name}-{kind}")
                )
    return pytest.mark.parametrize(("example", "backend", "dtype"), found, indirect=["backend"])


@over(FORMS)
def test_values_and_gradients(example, backend, dtype) -> None:
    check(example.op, example.arguments(DEVICE, dtype))


@over(SIZES, [torch.bfloat16])
def test_sizes(example, backend, dtype) -> None:
    check(example.op, example.arguments(DEVICE, dtype))


@pytest.mark.slow
@over(SLOW, [torch.bfloat16])
def test_many_tokens(example, backend, dtype) -> None:
    check(example.op, example.arguments(DEVICE, dtype))


@over(EMPTY, [torch.float32])
def test_empty(example, backend, dtype) -> None:
    """Results and gradients of nothing: zeros, and NaN for the mean of nothing."""
    check(example.op, example.arguments(DEVICE, dtype))


@over(NARROW, [torch.bfloat16, torch.float16])
def test_every_operand_in_half_precision(example, backend, dtype) -> None:
    check(example.op, moved(example.arguments(DEVICE, dtype), DEVICE, dtype))


@pytest.mark.parametrize(
    ("example", "backend", "mixed", "dtype"),
    [
        pytest.param(example, name, mixed, dtype, id=f"{label(example)}-{name}-{index}")
        for index, (example, mixed, dtype) in enumerate(MIXED)
        for name in backends(example.op)
    ],
    indirect=["backend"],
)
def test_every_operand_keeps_its_dtype(example, backend, mixed, dtype) -> None:
    arguments = example.arguments(DEVICE, dtype)
    for name, kind in mixed.items():
        value = arguments[name]
        arguments[name] = kind
        if isinstance(value, Tensor):
            arguments[name] = value.detach().to(kind).requires_grad_(value.requires_grad)
    check(example.op, arguments)


@over(EPS, [torch.float32])
def test_eps_is_used(example, backend, dtype) -> None:
    arguments = example.arguments(DEVICE, dtype)
    out = check(example.op, arguments | {"eps": 0.5})
    assert not torch.allclose(out[-1], public_call(example.op, arguments).outputs()[-1])


@over(KINDS, [torch.float32])
def test_registered_operator(example, backend, dtype) -> None:
    """On the eager backend too, ``torch.ops.anyflow.<op>`` has a backward formula of its own."""
    arguments = example.arguments(DEVICE, dtype)
    check(example.op, arguments, bound(example.op, arguments).function)
    calls = registered_calls(example.op, example.arguments(DEVICE, dtype))
    assert set(calls) == {example.op, f"{example.op}_backward"}
    for name, args in calls.items():
        if name != example.op:  # a backward has no derivative
            args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(getattr(torch.ops.anyflow, name).default, args)


@over(KINDS, [torch.float32])
def test_layouts(example, backend, dtype) -> None:
    """Operands with any strides, gaps of NaN between; the results of kernels are contiguous."""
    for name in LAYOUTS:
        arguments = relaid(example.arguments(DEVICE, dtype), name)
        out = check(example.op, arguments)
        assert backend == "eager" or all(o.is_contiguous() for o in out), name


@over(KINDS, [torch.float32])
def test_layouts_of_the_gradients_that_arrive(example, backend, dtype) -> None:
    arguments = example.arguments(DEVICE, dtype)
    for name, layout in LAYOUTS.items():
        if name != "every second" and example.op == "flow_map_loss":
            continue  # one number for each sample
        check(example.op, arguments, layout=layout)
    check(example.op, arguments, layout=lambda c: c.flatten()[:1].expand(c.numel()).view(c.shape))


@over(
    [
        e
        for e in KINDS
        if e.op in ("residual_layer_norm", "dual_timestep_embedding", "flow_map_inputs")
    ],
    [torch.float32],
)
def test_one_result_unused(example, backend, dtype) -> None:
    """The gradient of the other result is no tensor of zeros: what feeds that alone gets none."""
    arguments = example.arguments(DEVICE, dtype)
    call, exact = public_call(example.op, arguments), moved(arguments, DEVICE, torch.float64)
    wanted64 = public_call(example.op, exact).wanted
    for used in (0, 1):
        out, out64 = call.outputs()[used], expected(example.op, exact)[used]
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        gradients = torch.autograd.grad(out, call.wanted, cotangent, allow_unused=True)
        wanted = torch.autograd.grad(out64, wanted64, cotangent.double(), allow_unused=True)
        for g, w in zip(gradients, wanted, strict=True):
            assert (g is None) == (w is None)
            if g is not None and w is not None:
                torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)


@over(KINDS, [torch.float32])
def test_compiles_in_one_graph(example, backend, dtype) -> None:
    torch.compiler.reset()  # each case is compiled once, not recompiled
    call = example.call(DEVICE, dtype)
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    outputs = [as_tuple(function(*call.inputs)) for function in (compiled, call.function)]
    sums = [sum(o.square().sum() for o in out) for out in outputs]
    gradients = [torch.autograd.grad(total, call.wanted) for total in sums]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


@over(KINDS, [torch.float32])
def test_second_derivative(example, backend, dtype) -> None:
    """The reference has one; a kernel says that it has none, instead of a wrong one."""
    call = example.call(DEVICE, dtype)
    total = sum(o.square().sum() for o in call.outputs())
    gradients = torch.autograd.grad(total, call.wanted, create_graph=True)
    penalty = sum(g.square().sum() for g in gradients)
    if backend == "eager":
        second = torch.autograd.grad(penalty, call.wanted, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in second)
        return
    with pytest.raises(
        RuntimeError, match=f"{example.op}: a fused kernel has no second derivative"
    ):
        torch.autograd.grad(penalty, call.wanted, allow_unused=True)


@over(KINDS, [torch.float32])
def test_forward_mode_derivative(example, backend, dtype) -> None:
    """The reference has one, which the automatic choice takes: torch would drop a kernel's."""
    call = example.call(DEVICE, dtype)
    others = [x for x in call.inputs if not x.requires_grad]
    values = tuple(x.detach() for x in call.wanted)

    def function(*wanted: Tensor) -> tuple[Tensor, ...]:
        left, rest = iter(wanted), iter(others)
        return as_tuple(
            call.function(*(next(left if x.requires_grad else rest) for x in call.inputs))
        )

    def tangents() -> tuple[Tensor, ...]:
        return torch.func.jvp(function, values, tuple(x.sin() for x in values))[1]

    if backend != "eager":
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*use_backend"):
            tangents()
        return
    found = tangents()
    assert all(t.abs().max() > 0 and t.isfinite().all() for t in found)
    with use_backend(None):
        assert all(torch.equal(a, b) for a, b in zip(tangents(), found, strict=True))


# Random sizes -------------------------------------------------------------------------------------


def examples_of(op: str, data: st.DataObject) -> Example:
    """Draw an example of any size that the kernels take."""

    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    if op == "gelu":  # around blocks of 1024 elements and the shares of threads
        return gelu(number(0, 2000), number(0, 20))
    if op == "linear":  # on both sides of the sizes from which oneDNN takes over
        bias = data.draw(st.booleans())
        return linear(number(0, 2000), number(0, 300), number(0, 300), bias=bias)
    if op == "attention":
        head_dim, heads, keys = 8 * number(1, 32), number(1, 3), number(0, 150)
        return attention(number(0, 60), head_dim * heads, head_dim, keys, batch=number(1, 2))
    if op == "dual_timestep_embedding":
        fusion, learned = data.draw(st.sampled_from(FUSIONS)), data.draw(st.booleans())
        return dual_timestep_embedding(number(0, 9), number(0, 700), fusion, learned)
    if op.startswith("flow_map"):
        shape = (number(1, 4), number(1, 3), number(1, 3), number(1, 700))
        indices = st.lists(st.integers(-shape[0], shape[0] - 1), max_size=6)
        picked, times = data.draw(st.none() | indices), FrameTimes(data.draw(st.booleans()))
        if op == "flow_map_inputs":
            return flow_map_inputs(shape, picked, times, data.draw(st.booleans()))
        return flow_map_loss(shape, picked, times, data.draw(st.sampled_from([1.0, 2.5])))
    if op == "rms_norm_rope":
        heads, half = data.draw(st.sampled_from([(4, 1), (8, 5), (1, 4), (4, 7), (2, 6), (5, 20)]))
        rotary = data.draw(st.booleans())
        return rms_norm_rope(number(0, 40), 2 * heads * half, 1, heads, number(0, 3), rotary)
    rows, ratio, batch, dim = number(1, 3), number(1, 2), number(0, 2), 8 * number(1, 20)
    length = rows * ratio * number(0, 14)
    if op == "residual_layer_norm":
        variant = data.draw(st.sampled_from(list(RESIDUAL_VARIANTS)))
        return residual_layer_norm(variant, length, dim, rows, batch, gate_rows=rows * ratio)
    make = layer_norm_modulate if op == "layer_norm_modulate" else gated_residual
    return make(length, dim, rows, batch)


@pytest.mark.parametrize(
    ("op", "kernel"), [(op, name) for op in sorted(OPERATORS) for name in backends(op)[1:]]
)
@settings(max_examples=20)
@given(data=st.data())
def test_random_sizes(op, kernel, data: st.DataObject) -> None:
    example, seed = examples_of(op, data), data.draw(st.integers(0, 99))
    with use_backend(kernel):
        check(op, example.arguments(DEVICE, torch.float32, seed))


def test_forms_are_of_every_operator() -> None:
    for examples in (FORMS, KINDS, EMPTY):
        assert {example.op for example in examples} == set(OPERATORS)
