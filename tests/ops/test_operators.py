"""Every operator on every backend against its formula in fp64, on examples of the catalog."""

from collections.abc import Sequence
from itertools import product

import forms
import pytest
import torch
from checks import DEVICE, LAYOUTS, VECTORS, backends, bound, check, relaid
from formulas import expected
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.ops import examples as catalog
from anyflow.ops import use_backend
from anyflow.ops.backend import OPERATORS
from anyflow.ops.examples import Example, as_tuple, moved, public_call, registered_calls

TWO_RESULTS = ("residual_layer_norm", "dual_timestep_embedding", "flow_map_inputs")


@forms.over(forms.FORMS, [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(example, backend, dtype) -> None:
    check(example.op, example.arguments(DEVICE, dtype))


@forms.over(forms.KINDS, [torch.float16])
def test_fp16(example, backend, dtype) -> None:
    check(example.op, example.arguments(DEVICE, dtype))


@forms.over(forms.SIZES, [torch.bfloat16], slow_interpreted=True)
def test_sizes(example, backend, dtype) -> None:
    check(example.op, example.arguments(DEVICE, dtype))


@pytest.mark.slow
@forms.over(forms.SLOW, [torch.bfloat16])
def test_many_tokens(example, backend, dtype) -> None:
    check(example.op, example.arguments(DEVICE, dtype))


@forms.over(forms.EMPTY, widest=True)
def test_empty(example, backend, dtype) -> None:
    """Results and gradients of nothing: zeros, and NaN for the mean of nothing."""
    check(example.op, example.arguments(DEVICE, dtype))


@forms.over(forms.NARROW, [torch.bfloat16, torch.float16])
def test_every_operand_in_half_precision(example, backend, dtype) -> None:
    check(example.op, moved(example.arguments(DEVICE, dtype), DEVICE, dtype))


@pytest.mark.parametrize(
    ("example", "backend", "mixed", "dtype"),
    [
        pytest.param(example, name, mixed, dtype, id=f"{forms.label(example)}-{name}-{index}")
        for index, (example, mixed, dtype) in enumerate(forms.MIXED)
        for name in backends(example.op)
    ],
    indirect=["backend"],
)
def test_every_operand_keeps_its_dtype(example, backend, mixed, dtype) -> None:
    arguments = example.arguments(DEVICE, dtype)
    for name, kind in mixed.items():
        value = arguments[name]
        arguments[name] = kind
        if isinstance(value, Tensor) and kind is not None:
            arguments[name] = value.detach().to(kind).requires_grad_(value.requires_grad)
    check(example.op, arguments)


@forms.over(forms.EPS, widest=True)
def test_eps_is_used(example, backend, dtype) -> None:
    arguments = example.arguments(DEVICE, dtype)
    out = check(example.op, arguments | {"eps": 0.5})
    assert not torch.allclose(out[-1], public_call(example.op, arguments).outputs()[-1])


@forms.over(forms.KINDS, widest=True, slow_interpreted=True)
def test_registered_operator(example, backend, dtype) -> None:
    """On the eager backend too, ``torch.ops.anyflow.<op>`` has a backward formula of its own."""
    arguments = example.arguments(DEVICE, dtype)
    check(example.op, arguments, bound(example.op, arguments).function)
    calls = registered_calls(example.op, example.arguments(DEVICE, dtype))
    assert set(calls) == {example.op, f"{example.op}_backward"}
    for name, args in calls.items():
        if name != example.op:  # a backward has no derivative
            args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        tests = ["test_schema", "test_faketensor"]
        if backend != "triton":  # the interpreter is slow, and no kernel is part of what is traced
            tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(getattr(torch.ops.anyflow, name).default, args, test_utils=tests)


RANKS = [
    (op, arguments)
    for shape in ((7,), (3, 1, 2, 33))
    for op, arguments in (
        ("gelu", {"x": shape}),
        ("linear", {"x": shape, "weight": (3, shape[-1]), "bias": (3,)}),
        ("linear", {"x": shape, "weight": (1, shape[-1]), "bias": None}),
    )
]
RANKS += [("gelu", {"x": ()}), ("gelu", {"x": (40001,)})]


@pytest.mark.parametrize(
    ("op", "backend", "shapes"),
    [(op, name, shapes) for op, shapes in RANKS for name in backends(op)],
    indirect=["backend"],
)
def test_any_rank(op, backend, shapes, draw) -> None:
    check(op, {name: shape if shape is None else draw(*shape) for name, shape in shapes.items()})


@forms.over(forms.KINDS, widest=True, slow_interpreted=True)
def test_gradients_of_some_operands(example, backend, dtype) -> None:
    """Ask the operator for the gradient of one operand alone, and of all others."""
    arguments = example.arguments(DEVICE, dtype)
    names = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad]
    kinds = (True,) if backend == "triton" else (True, False)  # the interpreter is slow
    for name, alone in product(names, kinds if len(names) > 1 else ()):
        frozen = [n for n in names if (n == name) != alone]
        some = arguments | {n: arguments[n].detach() for n in frozen}
        check(example.op, some, bound(example.op, some).function)


@forms.over([e for e in forms.KINDS if e.op.startswith(("rms", "flow"))], widest=True)
def test_other_operands_are_constants(example, backend, dtype) -> None:
    """Tables, times and neighbors get no gradient, through the function or the operator."""
    arguments = example.arguments(DEVICE, dtype)
    floats = [v for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    wanted = [v for v in floats if v.requires_grad]
    for value in floats:
        value.requires_grad_(value is not arguments.get("uncond"))
    for function in (None, bound(example.op, arguments).function):
        call = public_call(example.op, arguments)
        outputs = as_tuple((function or call.function)(*call.inputs))
        sum(o.sum() for o in outputs if o.requires_grad).backward()
    for value in floats:
        assert (value.grad is not None) == any(value is w for w in wanted)
    for value in wanted:
        value.requires_grad_(False)
    assert not any(o.requires_grad for o in public_call(example.op, arguments).outputs())


@forms.over(forms.LAID_OUT, widest=True, slow_interpreted=True)
def test_layouts(example, backend, dtype) -> None:
    """Operands and incoming gradients with any strides; the results of kernels are contiguous."""
    for name, layout in LAYOUTS.items():
        if backend == "triton" and name in ("misaligned", "negative"):
            continue  # copied before any kernel is chosen
        fits = name in VECTORS or example.op != "flow_map_loss"  # which has a number per sample
        arguments = example.arguments(DEVICE, dtype)
        if name != "misaligned" or not example.op.startswith("flow_map"):  # refused in words
            arguments = relaid(arguments, name)
        # of another seed than the operands: along x itself, the gradient of a norm vanishes
        out = check(example.op, arguments, layout=layout if fits else None, seed=1)
        assert backend == "eager" or all(o.is_contiguous() for o in out), name
    arguments = example.arguments(DEVICE, dtype)
    check(example.op, arguments, layout=lambda c: c.flatten()[:1].expand(c.numel()).view(c.shape))


@forms.over([e for e in forms.KINDS if e.op in TWO_RESULTS], widest=True)
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


@forms.over(forms.KINDS, widest=True)
def test_compiles_in_one_graph(example, backend, dtype) -> None:
    torch.compiler.reset()  # each case is compiled once, not recompiled
    call = example.call(DEVICE, dtype)
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    outputs = [as_tuple(function(*call.inputs)) for function in (compiled, call.function)]
    sums = [sum(o.square().sum() for o in out) for out in outputs]
    gradients = [torch.autograd.grad(total, call.wanted) for total in sums]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def penalized(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the derivative of the squares of gradients."""
    total = sum(o.square().sum() for o in outputs)
    gradients = torch.autograd.grad(total, wanted, create_graph=True)
    penalty = sum(g.square().sum() for g in gradients)
    return torch.autograd.grad(penalty, wanted, materialize_grads=True)


@forms.over(forms.KINDS, widest=True)
def test_second_derivative(example, backend, dtype) -> None:
    """The reference has one; a kernel says that it has none, instead of a wrong one."""
    arguments = example.arguments(DEVICE, dtype)
    call = public_call(example.op, arguments)
    if backend != "eager":
        refusal = f"{example.op}: a fused kernel has no second derivative"
        with pytest.raises(RuntimeError, match=refusal):
            penalized(call.outputs(), call.wanted)
        return
    exact = moved(arguments, DEVICE)
    outputs = expected(example.op, exact)
    wanted = penalized(outputs, public_call(example.op, exact).wanted)
    torch.testing.assert_close(penalized(call.outputs(), call.wanted), wanted)


@forms.over(forms.KINDS, widest=True)
def test_forward_mode_derivative(example, backend, dtype) -> None:
    """The reference has one, which the automatic choice takes: torch would drop a kernel's."""
    call = example.call(DEVICE, dtype)

    def tangents(chosen: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the derivative along some of the operands."""

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(map(id, chosen), values, strict=True))
            return as_tuple(call.function(*(given.get(id(x), x.detach()) for x in call.inputs)))

        values = tuple(x.detach() for x in chosen)
        return torch.func.jvp(function, values, tuple(x.sin() for x in values))[1]

    if backend != "eager":
        for x in call.wanted:
            with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*use_backend"):
                tangents([x])
        return
    found = tangents(call.wanted)
    assert all(t.abs().max() > 0 and t.isfinite().all() for t in found)
    with use_backend(None):
        assert all(torch.equal(a, b) for a, b in zip(tangents(call.wanted), found, strict=True))


# Random sizes -------------------------------------------------------------------------------------


def examples_of(op: str, data: st.DataObject) -> Example:
    """Draw an example of any size that the kernels take."""

    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    make = getattr(catalog, op)
    if op == "gelu":  # around blocks of 1024 elements and the shares of threads
        return make(number(0, 2000), number(0, 20))
    if op == "linear":  # on both sides of the sizes from which oneDNN takes over
        bias = data.draw(st.booleans())
        return make(number(0, 2000), number(0, 300), number(0, 300), bias=bias)
    if op == "attention":
        head_dim, heads, keys = 8 * number(1, 32), number(1, 3), number(0, 150)
        return make(number(0, 60), head_dim * heads, head_dim, keys, batch=number(1, 2))
    if op == "dual_timestep_embedding":
        fusion, learned = data.draw(st.sampled_from(forms.FUSIONS)), data.draw(st.booleans())
        return make(number(0, 9), number(0, 700), fusion, learned)
    if op.startswith("flow_map"):
        shape = (number(1, 4), number(1, 3), number(1, 3), number(1, 700))
        indices = st.lists(st.integers(-shape[0], shape[0] - 1), max_size=6)
        picked, times = data.draw(st.none() | indices), catalog.FrameTimes(data.draw(st.booleans()))
        if op == "flow_map_inputs":
            return make(shape, picked, times, data.draw(st.booleans()))
        return make(shape, picked, times, data.draw(st.sampled_from([1.0, 2.5])))
    if op == "rms_norm_rope":
        heads, half = data.draw(st.sampled_from([(4, 1), (8, 5), (1, 4), (4, 7), (2, 6), (5, 20)]))
        rotary = data.draw(st.booleans())
        return make(number(0, 40), 2 * heads * half, 1, heads, number(0, 3), rotary)
    rows, ratio, batch, dim = number(1, 3), number(1, 2), number(0, 2), 8 * number(1, 20)
    length = rows * ratio * number(0, 14)
    if op == "residual_layer_norm":
        variant = data.draw(st.sampled_from(list(catalog.RESIDUAL_VARIANTS)))
        return make(variant, length, dim, rows, batch, gate_rows=rows * ratio)
    return make(length, dim, rows, batch)


RANDOM_SIZES = [
    pytest.param(op, name, marks=[pytest.mark.slow] if name == "triton" else [])
    for op in sorted(OPERATORS)
    for name in backends(op)[1:]
]


@pytest.mark.parametrize(("op", "kernel"), RANDOM_SIZES)
@settings(max_examples=20)
@given(data=st.data())
def test_random_sizes(op, kernel, data: st.DataObject) -> None:
    example, seed = examples_of(op, data), data.draw(st.integers(0, 99))
    with use_backend(kernel):
        check(op, example.arguments(DEVICE, torch.float32, seed))


def test_forms_are_of_every_operator() -> None:
    for examples in (forms.FORMS, forms.KINDS, forms.EMPTY):
        assert {example.op for example in examples} == set(OPERATORS)
