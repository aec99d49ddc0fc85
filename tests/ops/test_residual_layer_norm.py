"""residual_layer_norm against the textbook formula in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.ops import layer_norm_modulate, residual_layer_norm, use_backend

SHAPES = {
    "x": "BLD",
    "y": "BLD",
    "gate": "BRD",
    "weight": "D",
    "bias": "D",
    "shift": "BRD",
    "scale": "BRD",
}
VARIANTS = {
    "plain": (),
    "gate": ("gate",),
    "affine": ("weight", "bias"),
    "weight-only": ("gate", "weight"),
    "gate-affine": ("gate", "weight", "bias"),
    "modulation": ("shift", "scale"),
    "gate-modulation": ("gate", "shift", "scale"),
}
# what a block of the model calls
MODEL = {"norm2": VARIANTS["gate-affine"], "norm3": VARIANTS["modulation"]}
every_variant = pytest.mark.parametrize("names", VARIANTS.values(), ids=VARIANTS)
model_variants = pytest.mark.parametrize("names", MODEL.values(), ids=MODEL)


def per_token(rows: Tensor, length: int) -> Tensor:
    """Token l reads row l // (L // R)."""
    return rows[:, torch.arange(length, device=rows.device) // max(length // rows.shape[1], 1)]


def formula(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    returned: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """h, and the norm of the h that was returned, rounded, with the gradient of the unrounded
    one.
    """
    h = x + y * (1 if gate is None else per_token(gate, x.shape[1]))
    rounded = h if returned is None else h + (returned.detach().double() - h).detach()
    centered = rounded - rounded.mean(-1, keepdim=True)
    n = centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + eps)
    n = n if weight is None else n * weight
    n = n if bias is None else n + bias
    if shift is not None and scale is not None:
        n = n * (1 + per_token(scale, x.shape[1])) + per_token(shift, x.shape[1])
    return h, n


def inputs(
    draw,
    names: tuple[str, ...],
    b: int,
    length: int,
    d: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    **other,
) -> dict[str, Tensor]:
    """x, y and what is named; ``other`` gives a tensor another dtype, by its name, or the gate its
    ``gate_rows``.
    """
    rows = {"gate": other.get("gate_rows", r)}
    return {
        name: draw(
            *({"B": b, "L": length, "D": d, "R": rows.get(name, r)}[k] for k in SHAPES[name]),
            dtype=other.get(name, dtype),
        )
        for name in ("x", "y", *names)
    }


def doubled(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().double().requires_grad_() for k, v in named.items()}


def positional(named: dict[str, Tensor]) -> list[Tensor | None]:
    """As the registered operator takes them."""
    return [named.get(name) for name in SHAPES]


def spread(t: Tensor, factor: int) -> Tensor:
    """The same rows of D, ``factor`` times as far apart: no two tensors of a call share their
    strides.
    """
    return torch.stack([t] * factor, dim=2)[:, :, 0]


@pytest.fixture
def check(assert_matches, assert_gradients):
    """Values, dtypes and gradients of a call."""

    def checked(named: dict[str, Tensor], call=lambda named: residual_layer_norm(**named)) -> None:
        out = call(named)
        named64 = doubled(named)
        expected = formula(**named64, returned=out[0])
        for o, e in zip(out, expected, strict=True):
            assert o.dtype == named["x"].dtype and o.shape == named["x"].shape
            assert_matches(o, e)
        assert_gradients(out, list(named.values()), expected, list(named64.values()))

    return checked


@every_variant
@pytest.mark.parametrize(("b", "length", "d", "r"), [(1, 5, 24, 1), (1, 6, 16, 3), (2, 1, 8, 1)])
def test_values_and_gradients(names, b, length, d, r, backend, dtype, draw, check) -> None:
    check(inputs(draw, names, b, length, d, r, dtype))


@pytest.mark.parametrize(
    ("variant", "length", "d", "r"),
    [
        ("norm2", 74, 40, 2),
        ("norm2", 6, 1536, 2),
        ("norm3", 7, 1536, 1),
        ("norm3", 7, 2048, 7),
        ("norm2", 3, 3072, 1),
        ("norm2", 4, 5120, 2),
        ("norm3", 1, 8192, 1),
    ],
)
def test_real_sizes(variant, length, d, r, backend, draw, check) -> None:
    """The widths of the models and beyond, and lengths that no run of tokens divides, as the model
    calls it in bf16.
    """
    check(inputs(draw, MODEL[variant], 1, length, d, r, x=torch.bfloat16, y=torch.bfloat16))


@pytest.mark.slow
def test_many_tokens(backend, draw, assert_matches) -> None:
    named = inputs(draw, VARIANTS["gate-modulation"], 1, 1023, 16, 31)
    named64 = doubled(named)
    out = residual_layer_norm(**named)
    expected = formula(**named64, returned=out[0])
    cotangents = [draw(1, 1023, 16).detach() for _ in out]
    actual = torch.autograd.grad(out, list(named.values()), cotangents)
    wanted = torch.autograd.grad(expected, list(named64.values()), [c.double() for c in cotangents])
    for a, e in zip((*out, *actual), (*expected, *wanted), strict=True):
        assert_matches(a, e)


@every_variant
def test_tokens_in_bf16_parameters_in_fp32(names, backend, draw, check) -> None:
    check(inputs(draw, names, 2, 6, 8, 2, x=torch.bfloat16, y=torch.bfloat16))


@pytest.mark.parametrize("names", [VARIANTS[v] for v in ("plain", "affine", "gate-modulation")])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
)
def test_branch_keeps_its_own_dtype(x, y, names, backend, draw, check) -> None:
    check(inputs(draw, names, 2, 6, 8, 2, x=x, y=y))


@pytest.mark.parametrize(("gate_rows", "r"), [(1, 3), (3, 1), (2, 3), (6, 2), (1, 1)])
def test_gate_and_modulation_differ_in_rows(gate_rows, r, backend, draw, check) -> None:
    check(inputs(draw, VARIANTS["gate-modulation"], 2, 6, 8, r, gate_rows=gate_rows))


@every_variant
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_unused(used, names, backend, draw) -> None:
    """The gradient of the other result is no tensor of zeros: what does not depend on it gets
    none.
    """
    named = inputs(draw, names, 2, 6, 8, 2)
    named64 = doubled(named)
    out, expected = residual_layer_norm(**named)[used], formula(**named64)[used]
    cotangent = draw(2, 6, 8).detach()
    actual = torch.autograd.grad(out, list(named.values()), cotangent, allow_unused=True)
    wanted = torch.autograd.grad(
        expected, list(named64.values()), cotangent.double(), allow_unused=True
    )
    for name, a, w in zip(named, actual, wanted, strict=True):
        assert (a is None) == (w is None), name
        if a is not None:
            torch.testing.assert_close(a.double(), w, rtol=1e-5, atol=1e-5)


@every_variant
def test_kernel_saves_no_more_than_it_needs(kernel, names, draw) -> None:
    """h instead of x, and y only where there is a gate. (Through the eager reference autograd saves
    what it likes.)
    """
    named = inputs(draw, names, 2, 6, 8, 2)
    saved: list[int] = []
    with (
        use_backend(kernel),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.data_ptr()) or t, lambda t: t
        ),
    ):
        h, n = residual_layer_norm(**named)
    assert (
        h.data_ptr() in saved and n.data_ptr() not in saved and named["x"].data_ptr() not in saved
    )
    assert (named["y"].data_ptr() in saved) == ("gate" in names)


def test_norm_reads_the_rounded_sum(backend, draw) -> None:
    """n is the norm of the h that is returned, so that h can be handed on without a second
    tensor.
    """
    named = inputs(draw, VARIANTS["gate-modulation"], 2, 6, 8, 2, torch.bfloat16)
    h, n = residual_layer_norm(**named)
    assert torch.equal(n, layer_norm_modulate(h, named["shift"], named["scale"]))


@every_variant
def test_eps_is_used(names, backend, draw, assert_matches) -> None:
    named = {k: v.detach() for k, v in inputs(draw, names, 1, 4, 8, 1).items()}
    h, n = residual_layer_norm(**named, eps=0.5)
    assert_matches(n, formula(**{k: v.double() for k, v in named.items()}, returned=h, eps=0.5)[1])
    assert not torch.allclose(n, residual_layer_norm(**named)[1])


@pytest.mark.parametrize(
    "names", [VARIANTS[v] for v in ("plain", "weight-only", "gate-affine", "modulation")]
)
def test_registered_operator(names, backend, draw, check) -> None:
    """``torch.ops.anyflow.residual_layer_norm``: on the eager backend too it has a backward formula
    of its own.
    """
    named = inputs(draw, names, 2, 4, 8, 2)
    check(named, lambda named: torch.ops.anyflow.residual_layer_norm(*positional(named), 1e-6))
    detached = {k: v.detach() for k, v in named.items()}
    torch.library.opcheck(torch.ops.anyflow.residual_layer_norm.default, (*positional(named), 1e-6))
    gradient = torch.ops.anyflow.residual_layer_norm_backward.default
    x, y, gate, *others = positional(detached)
    for dh in (x, None):
        torch.library.opcheck(
            gradient, (dh, x, y if "gate" in names else None, x, gate, *others, 1e-6)
        )


def test_registered_operator_when_rows_and_dtypes_differ(backend, draw, check) -> None:
    for names, other in (
        (VARIANTS["gate-modulation"], {"gate_rows": 2}),
        ((), {"y": torch.float64}),
    ):
        if backend != "eager" and "y" in other:
            other["y"] = torch.bfloat16
        named = inputs(draw, names, 2, 12, 16, 3, **other)
        check(named, lambda named: torch.ops.anyflow.residual_layer_norm(*positional(named)))


@model_variants
@pytest.mark.parametrize("used", [[0], [1], [0, 1]])
def test_compiles_in_one_graph(used, names, backend, draw) -> None:
    def loss(named: dict[str, Tensor]) -> Tensor:
        results = residual_layer_norm(**named)
        return sum((results[i] ** 3).sum() for i in used)

    torch.compiler.reset()  # each case is compiled once, not recompiled
    named = inputs(draw, names, 2, 6, 16, 3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    outputs = compiled(named), loss(named)
    gradients = [torch.autograd.grad(o, list(named.values()), allow_unused=True) for o in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    # compiled code may write zeros for what is unused
    for a, b, v in zip(*gradients, named.values(), strict=True):
        a, b = (torch.zeros_like(v) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("d", "r"), [(7, 5), (33, 1)])
@every_variant
def test_any_width_runs_eagerly(names, d, r, draw, check) -> None:
    check(inputs(draw, names, 2, 5, d, r, torch.float64))


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(kernel, device, data: st.DataObject) -> None:
    b, r, ratio, tokens = (
        data.draw(st.integers(*bounds)) for bounds in ((0, 2), (1, 2), (1, 2), (0, 20))
    )
    d, names = (
        8 * data.draw(st.integers(1, 20)),
        data.draw(st.sampled_from(list(VARIANTS.values()))),
    )
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype).to(device).requires_grad_()

    named = inputs(normal, names, b, r * ratio * tokens, d, r, gate_rows=r * ratio)
    named64 = doubled(named)
    with use_backend(kernel):
        out = residual_layer_norm(**named)
        actual = torch.autograd.grad(sum(o.sin().sum() for o in out), list(named.values()))
    expected = formula(**named64)
    wanted = torch.autograd.grad(sum(e.sin().sum() for e in expected), list(named64.values()))
    torch.testing.assert_close([o.double() for o in out], list(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close([a.double() for a in actual], list(wanted), rtol=1e-4, atol=1e-4)


@model_variants
def test_large_offset_does_not_cancel(names, backend, draw) -> None:
    """mean(x^2) - mean(x)^2 would be off by 100 % here; a centered variance is good to fp32's
    resolution at 1e4.
    """
    named = {k: v.detach() for k, v in inputs(draw, names, 2, 6, 64, 1).items()}
    named["x"] = (1e4 + draw(2, 6, 64, dtype=torch.float64)).float().detach()
    h, n = residual_layer_norm(**named)
    expected = formula(**{k: v.double() for k, v in named.items()}, returned=h)
    assert (h.double() - expected[0]).abs().max() < 1e-3  # one fp32 step at 1e4
    assert (n.double() - expected[1]).abs().max() < 5e-3


@every_variant
def test_constant_tokens_give_the_offset(names, backend, draw) -> None:
    named = inputs(draw, tuple(name for name in names if name != "gate"), 2, 4, 8, 2)
    h, n = residual_layer_norm(
        **named | {"x": torch.full_like(named["x"], 3.0), "y": torch.zeros_like(named["y"])}
    )
    expected = torch.zeros_like(n)
    if "bias" in named:
        expected = named["bias"].expand_as(n)
    if "shift" in named:
        expected = named["shift"].repeat_interleave(2, dim=1)
    assert (h == 3).all()
    torch.testing.assert_close(n, expected)


@every_variant
@pytest.mark.parametrize(("b", "length"), [(0, 6), (2, 0)])
def test_empty(b, length, names, backend, draw) -> None:
    named = inputs(draw, names, b, length, 8, 2)
    h, n = residual_layer_norm(**named)
    assert h.shape == n.shape == (b, length, 8)
    gradients = torch.autograd.grad(h.sum() + n.sum(), list(named.values()), allow_unused=True)
    for g, (name, t) in zip(gradients, named.items(), strict=True):
        assert name == "scale" or g is not None
        assert g is None or (g.shape == t.shape and not g.any())


@every_variant
def test_non_contiguous(names, backend, draw, assert_gradients) -> None:
    named = inputs(draw, names, 2, 6, 8, 3)
    plain = residual_layer_norm(**named)
    strided = {k: v.transpose(-1, 0).contiguous().transpose(-1, 0) for k, v in named.items()}
    assert not strided["x"].is_contiguous()
    # stride 2 in D
    every_second = {k: torch.stack([v, v], dim=-1)[..., 0] for k, v in named.items()}
    modulation = torch.stack(
        [named[k] if k in named else draw(2, 3, 8) for k in ("gate", "shift", "scale")], dim=2
    )
    # as the model passes them
    views = dict(zip(("gate", "shift", "scale"), modulation.unbind(2), strict=True))
    views = named | {k: v for k, v in views.items() if k in named}
    padded = named | {"x": spread(named["x"], 2), "y": spread(named["y"], 3)}
    for other in (strided, every_second, views, padded):
        out = residual_layer_norm(**other)
        assert backend == "eager" or all(o.is_contiguous() for o in out)
        torch.testing.assert_close(out, plain)
    named64 = doubled(named)
    for other in (views, padded):
        out = residual_layer_norm(**other)
        expected = formula(**named64, returned=out[0])
        assert_gradients(out, list(named.values()), expected, list(named64.values()))


@every_variant
def test_non_contiguous_gradients(names, backend, draw) -> None:
    """The cotangents of h and n come with any strides: of a slice, of a transpose, of an expanded
    scalar.
    """
    named = inputs(draw, names, 2, 6, 8, 3)
    named64 = doubled(named)
    token, transposed = draw(2, 6, 8).detach(), draw(2, 8, 6).detach().transpose(1, 2)
    named["y"] = spread(named["y"], 4).detach().requires_grad_()
    for dh, dn in ((spread(token, 2), spread(-token, 3)), (transposed, token.new_ones(()))):
        out = residual_layer_norm(**named)
        cotangents = [c.expand(2, 6, 8) for c in (dh, dn)]
        actual = torch.autograd.grad(out, list(named.values()), cotangents)
        expected = formula(**named64, returned=out[0])
        wanted = torch.autograd.grad(
            expected, list(named64.values()), [c.double() for c in cotangents]
        )
        torch.testing.assert_close([a.double() for a in actual], list(wanted), rtol=1e-5, atol=1e-5)


@every_variant
def test_gradcheck(names, draw) -> None:
    named = inputs(draw, names, 2, 4, 3, 2, torch.float64)
    keys = list(named)
    assert torch.autograd.gradcheck(
        lambda *values: residual_layer_norm(**dict(zip(keys, values, strict=True))),
        tuple(named.values()),
    )


X, ROW, VECTOR = torch.zeros(2, 6, 4), torch.zeros(2, 1, 4), torch.zeros(4)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"x": X[0], "y": X[0]}, "x must be"),
        ({"x": X.long()}, "x must be"),
        ({"y": X[:, :3]}, "y must have the shape of x"),
        ({"y": X[:, :1]}, "y must have the shape of x"),
        ({"y": X.long()}, "y must have the shape of x"),
        ({"y": X.to("meta")}, "y is on meta"),
        ({"gate": VECTOR}, "gate must be"),
        ({"gate": ROW.long()}, "gate must be"),
        ({"gate": ROW[:1]}, "gate must be"),
        ({"gate": torch.zeros(2, 4, 4)}, "must divide the L=6"),
        ({"gate": torch.zeros(2, 0, 4)}, "must divide the L=6"),
        ({"gate": ROW.to("meta")}, "gate is on meta"),
        ({"weight": torch.zeros(3)}, "weight must be"),
        ({"weight": VECTOR.long()}, "weight must be"),
        ({"weight": VECTOR.to("meta")}, "weight is on meta"),
        ({"weight": VECTOR, "bias": torch.zeros(1)}, "bias must be"),
        ({"weight": VECTOR, "bias": VECTOR.long()}, "bias must be"),
        ({"weight": VECTOR, "bias": VECTOR.to("meta")}, "bias is on meta"),
        ({"bias": VECTOR}, "bias needs weight"),
        ({"shift": ROW}, "given together"),
        ({"scale": ROW}, "given together"),
        ({"shift": ROW, "scale": torch.zeros(2, 3, 4)}, "one shape"),
        ({"shift": ROW[..., :2], "scale": ROW}, "shift must be"),
        ({"shift": ROW, "scale": ROW.long()}, "scale must be"),
        ({"shift": ROW, "scale": ROW.to("meta")}, "scale is on meta"),
        ({"weight": VECTOR, "shift": ROW, "scale": ROW}, "not both"),
    ],
)
def test_bad_input(named, message) -> None:
    with pytest.raises(ValueError, match=f"residual_layer_norm: .*{message}"):
        residual_layer_norm(**{"x": X, "y": X, **named})


@pytest.mark.parametrize("wide", ["x", "y", "gate", "weight", "bias", "shift", "scale"])
def test_forced_kernel_says_what_it_does_not_take(kernel, wide, draw) -> None:
    names = VARIANTS["gate-affine"] if wide in ("weight", "bias") else VARIANTS["gate-modulation"]
    unsupported = {
        "float64": inputs(draw, names, 2, 6, 8, 2, **{wide: torch.float64}),
        "D=4": inputs(draw, names, 2, 6, 4, 2),
    }
    for message, named in unsupported.items():
        expected = f"residual_layer_norm: .*does not support .*{message}"
        with use_backend(kernel), pytest.raises(ValueError, match=expected):
            residual_layer_norm(**named)
