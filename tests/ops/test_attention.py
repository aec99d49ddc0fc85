"""attention against the textbook formula in fp64: values, gradients, bits, and what it refuses."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops import attention, backend_report, use_backend
from anyflow.ops.attention import attention_backward_reference, attention_reference
from anyflow.ops.native import EXTENSION

# Of the largest element, for the result and for gradients, which start from the rounded result.
TOLERANCES = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (2e-6, 3e-6),
    torch.float16: (2**-11, 2**-9),
    torch.bfloat16: (2**-8, 2**-6),
}
SHAPES = {  # B, L, S, H, Dh
    "self": (1, 300, 300, 2, 64),
    "cross": (2, 257, 32, 3, 64),
    "many keys": (1, 33, 1000, 1, 64),
    "many queries": (1, 1000, 33, 1, 64),
    "one query": (2, 1, 7, 3, 16),
    "one key": (2, 7, 1, 3, 24),
    "one of each": (1, 1, 1, 1, 8),
    "odd": (1, 65, 130, 2, 72),
    "blocks and one": (1, 97, 121, 2, 128),
    "widest": (1, 50, 129, 1, 256),
    "uneven width": (2, 50, 119, 2, 104),
}
KERNEL_DTYPES = {"eager": tuple(TOLERANCES), "native": (torch.float32, torch.bfloat16)}
RUNS = [(name, dtype, 1.0) for name, dtypes in KERNEL_DTYPES.items() for dtype in dtypes]
QKV = list[Tensor]


@pytest.fixture
def native(device: torch.device) -> None:
    """The kernel, or a skipped test where there is none."""
    if device.type != "cpu":
        pytest.skip("the native kernel is for the CPU")
    if EXTENSION is None or EXTENSION.cpu_instruction_set() == "generic":
        pytest.skip("without AVX2 the native kernel is not offered")


@pytest.fixture
def on(request: pytest.FixtureRequest) -> str:
    """Name of a backend; its test is skipped where there is none."""
    if request.param == "native":
        request.getfixturevalue("native")
    return request.param


both = pytest.mark.parametrize("on", ["eager", "native"], indirect=True)


@pytest.fixture
def qkv(draw) -> Callable[..., QKV]:
    def make(
        b: int, length: int, keys: int, heads: int, head_dim: int, kind: torch.dtype = torch.float32
    ) -> QKV:
        return [draw(b, n, heads, head_dim, dtype=kind) for n in (length, keys, keys)]

    return make


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhls,bshd->blhd", weights, v)


def doubled(tensors: Sequence[Tensor]) -> QKV:
    return [t.detach().double().requires_grad_() for t in tensors]


def errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Of the largest element of each; of all where one vanishes, as the gradients of q and k do for
    a single key.
    """
    sizes = [e.abs().max().item() for e in expected]
    sizes = [size if size > 1e-9 * max(sizes) else max(sizes) for size in sizes]
    return [
        ((a.double() - e).abs().max() / size).item()
        for a, e, size in zip(actual, expected, sizes, strict=True)
    ]


# ---- values and gradients


@pytest.mark.parametrize(
    ("on", "kind", "spread"), [*RUNS, ("native", torch.float32, 3.0)], indirect=["on"]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, spread, on, kind, qkv, generator) -> None:
    q, k, v = qkv(*shape, kind)
    tensors = [(q.detach() * spread).requires_grad_(), k, v]
    wide = doubled(tensors)
    with use_backend(on):
        out, expected = attention(*tensors), formula(*wide)
        cotangent = torch.randn(expected.shape, generator=generator).to(kind)
        ours = torch.autograd.grad(out, tensors, cotangent)
    theirs = torch.autograd.grad(expected, wide, cotangent.double())
    # larger logits have larger errors
    values, gradients = (spread**0.5 * bound for bound in TOLERANCES[kind])
    assert out.dtype == kind and out.shape == q.shape
    assert max(errors([out], [expected])) <= values
    assert [(g.dtype, g.shape) for g in ours] == [(t.dtype, t.shape) for t in tensors]
    assert max(errors(ours, theirs)) <= gradients


@both
def test_registered_operator(on, qkv, generator) -> None:
    """``torch.ops.anyflow.attention`` returns the log-sum-exp too, and has a backward formula on
    the eager backend.
    """
    tensors = qkv(2, 37, 21, 3, 24)
    wide = doubled(tensors)
    with use_backend(on):
        out, logsumexp = torch.ops.anyflow.attention(*tensors)
        ours = torch.autograd.grad(out, tensors, torch.ones_like(out))
        torch.library.opcheck(torch.ops.anyflow.attention.default, tuple(tensors))
        saved = [t.detach() for t in (out, *tensors, out, logsumexp)]
        torch.library.opcheck(torch.ops.anyflow.attention_backward.default, tuple(saved))
    expected = formula(*wide)
    scores = torch.einsum("blhd,bshd->bhls", *wide[:2]) / math.sqrt(24)
    assert not logsumexp.requires_grad and logsumexp.dtype == torch.float32
    assert max(errors([out], [expected])) <= 2e-6
    assert max(errors([logsumexp], [scores.logsumexp(-1)])) <= 2e-6
    assert max(errors(ours, torch.autograd.grad(expected, wide, torch.ones_like(expected)))) <= 3e-6


def test_backward_reference_in_fp64(qkv) -> None:
    tensors = qkv(2, 5, 7, 3, 8, torch.float64)
    out, logsumexp = attention_reference(*tensors)
    expected = torch.autograd.grad(out, tensors, out.detach())
    ours = attention_backward_reference(*[t.detach() for t in (out, *tensors, out, logsumexp)])
    assert max(errors(ours, expected)) <= 1e-13


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@both
def test_some_gradients(needed, on, qkv) -> None:
    tensors = qkv(1, 40, 30, 2, 16)
    with use_backend(on):
        expected = torch.autograd.grad(attention(*tensors).square().sum(), tensors)
        some = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        attention(*some).square().sum().backward()
    for i, (t, g) in enumerate(zip(some, expected, strict=True)):
        assert (t.grad is not None) == (i in needed)
        assert t.grad is None or torch.equal(t.grad, g)


@both
def test_one_key_is_a_copy(on, qkv) -> None:
    q, k, v = qkv(2, 70, 1, 3, 16)
    with use_backend(on):
        torch.testing.assert_close(attention(q, k, v), v.expand_as(q), rtol=1e-6, atol=0)


# ---- layouts


@both
def test_strides(on, qkv, generator) -> None:
    tensors = [t.detach() for t in qkv(2, 70, 70, 3, 24)]
    cotangent = torch.randn(tensors[0].shape, generator=generator)
    packed = torch.stack(tensors, 2)
    layouts = {
        "packed": lambda t: list(packed.unbind(2)),
        "heads first": lambda t: [x.transpose(1, 2).contiguous().transpose(1, 2) for x in t],
        "columns": lambda t: [x.transpose(1, 3).contiguous().transpose(1, 3) for x in t],
        "every second": lambda t: [
            torch.stack([x, x * math.nan], 3).flatten(2, 3)[:, :, ::2] for x in t
        ],
    }
    with use_backend(on):
        plain = [t.clone().requires_grad_() for t in tensors]
        out = attention(*plain)
        expected = torch.autograd.grad(out, plain, cotangent)
        for name, layout in layouts.items():
            views = [t.requires_grad_() for t in layout(tensors)]
            assert not views[0].is_contiguous(), name
            strided = attention(*views)
            torch.testing.assert_close(strided, out, rtol=1e-6, atol=1e-6)
            gradients = torch.autograd.grad(
                strided, views, cotangent.transpose(0, 3).contiguous().transpose(0, 3)
            )
            torch.testing.assert_close(gradients, expected, rtol=2e-6, atol=3e-6)
            raw = torch.ops.anyflow.attention(*[t.detach() for t in views])[0]
            assert raw.is_contiguous() and torch.equal(raw, strided)


@both
def test_shared_over_the_batch(on, qkv) -> None:
    tensors = qkv(1, 9, 5, 2, 16)
    with use_backend(on):
        out = attention(*tensors)
        shared = attention(*[t.expand(3, -1, -1, -1) for t in tensors])
        torch.testing.assert_close(shared, out.expand(3, -1, -1, -1), rtol=1e-6, atol=1e-6)
        gradients = (
            torch.autograd.grad(out.sum(), tensors),
            torch.autograd.grad(shared.sum(), tensors),
        )
    for one, three in zip(*gradients, strict=True):
        torch.testing.assert_close(3 * one, three, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 0, 2, 8), (2, 4, 4, 0, 8), (0, 0, 0, 0, 8)]
)
@both
def test_empty(shape, on, qkv) -> None:
    """Without keys there is nothing to average: 0, as from torch."""
    tensors = qkv(*shape)
    with use_backend(on):
        out, logsumexp = torch.ops.anyflow.attention(*tensors)
        assert torch.equal(attention(*tensors), out) and torch.equal(
            out, torch.zeros_like(tensors[0])
        )
        gradients = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert logsumexp.shape == (shape[0], shape[3], shape[1])
    assert shape[2] > 0 or torch.equal(logsumexp, torch.full_like(logsumexp, -math.inf))
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, tensors, strict=True))


# ---- extremes


@pytest.mark.parametrize("size", [1e2, 1e4])
@both
def test_large_logits(size, on, qkv) -> None:
    """Scores have an error of their size times 2^-24. For the largest, the gradients of q and k are
    nothing else.
    """
    q, k, v = (t.detach() for t in qkv(1, 70, 150, 2, 64))
    tensors = [(q * size / 5).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    wide = doubled(tensors)
    with use_backend(on):
        out, expected = attention(*tensors), formula(*wide)
        ours = torch.autograd.grad(out.sum(), tensors)
    wrong = errors(ours, torch.autograd.grad(expected.sum(), wide))
    bound = 2e-6 + 4 * size * 2**-24
    assert max(errors([out], [expected])) <= bound and wrong[2] <= bound
    assert max(wrong) <= 3 * bound or size > 1e3
    assert all(g.isfinite().all() for g in ours)


@pytest.mark.parametrize("keys", [120, 128, 150, 257])
@both
def test_equal_logits_average(keys, on, draw) -> None:
    """Padding of the last block of keys must not count, whatever is largest."""
    v = draw(1, keys, 1, 8).detach()
    expected = v.double().mean(1, keepdim=True).expand(1, 5, 1, 8)
    for logit in (-3600.0, 3600.0):
        q, k = torch.full((1, 5, 1, 8), 100.0), torch.full((1, keys, 1, 8), logit / 283)
        with use_backend(on):
            assert max(errors([attention(q.to(v.device), k.to(v.device), v)], [expected])) <= 2e-6


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["q", "k", "v", "grad"])
@both
def test_nan_goes_where_it_must(which, on, qkv, draw) -> None:
    tensors = [*qkv(1, 30, 150, 1, 16), draw(1, 30, 1, 16)]
    tensors[which].detach()[0, 11, 0, 3] = math.nan
    *inputs, cotangent = tensors
    wide = doubled(inputs)
    with use_backend(on):
        out, expected = attention(*inputs), formula(*wide)
        ours = torch.autograd.grad(out, inputs, cotangent)
    theirs = torch.autograd.grad(expected, wide, cotangent.double())
    assert any(t.isnan().any() for t in (out, *ours))
    for actual, want in zip((out, *ours), (expected, *theirs), strict=True):
        assert torch.equal(actual.isnan(), want.isnan())


# ---- the same bits, every order of derivatives, compilers


@pytest.mark.parametrize("kind", KERNEL_DTYPES["native"], ids=str)
def test_same_bits_in_every_call_and_for_every_number_of_threads(kind, native, qkv) -> None:
    tensors = qkv(2, 600, 333, 3, 40, kind)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out = attention(*tensors)
        return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]

    before = torch.get_num_threads()
    try:
        with use_backend("native"):
            first = run(2)
            assert all(
                torch.equal(a, b) for n in (1, 2, 3, 2) for a, b in zip(run(n), first, strict=True)
            )
    finally:
        torch.set_num_threads(before)


def test_writes_all_that_it_allocates_and_nothing_else(native, qkv) -> None:
    tensors = qkv(1, 70, 50, 2, 24)
    before = [t.detach().clone() for t in tensors]
    torch.use_deterministic_algorithms(True)  # what is allocated reads NaN until it is written
    try:
        with use_backend("native"):
            out = attention(*tensors)
            saved = out.detach().clone()
            gradients = torch.autograd.grad(out, tensors, torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in (out, *gradients))
    assert torch.equal(out, saved) and all(
        torch.equal(t, b) for t, b in zip(tensors, before, strict=True)
    )


@pytest.mark.parametrize("dynamic", [False, True])
@both
def test_compiles_in_one_graph(dynamic, on, qkv) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use_backend(on):
        for shape in ((2, 37, 7, 3, 64), (2, 41, 41, 3, 64)):
            tensors = qkv(*shape)
            outputs = compiled(*tensors), attention(*tensors)
            gradients = [torch.autograd.grad(o.square().sum(), tensors) for o in outputs]
            torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_gradcheck(qkv) -> None:
    with use_backend("eager"):
        tensors = qkv(1, 3, 4, 2, 3, torch.float64)
        assert torch.autograd.gradcheck(attention, tensors) and torch.autograd.gradgradcheck(
            attention, tensors
        )


@both
def test_second_and_forward_derivatives(on, qkv) -> None:
    """The reference has them; the kernel says that it has none."""
    tensors = qkv(1, 4, 5, 2, 8)
    with use_backend(on):
        (gradient, *_) = torch.autograd.grad(attention(*tensors).sum(), tensors, create_graph=True)
        directions = tuple(torch.ones_like(t) for t in tensors)
        values = tuple(t.detach() for t in tensors)
        if on == "eager":
            assert torch.autograd.grad(gradient.square().sum(), tensors[0])[0].isfinite().all()
            assert torch.func.jvp(attention, values, directions)[1].isfinite().all()
        else:
            with pytest.raises(
                RuntimeError, match="attention: a fused kernel has no second derivative"
            ):
                torch.autograd.grad(gradient.square().sum(), tensors[0])
            for some in (directions, (directions[0] * 0, directions[1], directions[2] * 0)):
                with pytest.raises(RuntimeError, match="no forward-mode derivative.*use_backend"):
                    torch.func.jvp(attention, values, some)
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(values[0], directions[0])
                with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                    attention(dual, *values[1:])
                # of what has no tangent nobody asks for a derivative
                assert attention(*values).isfinite().all()


# ---- the choice


def test_what_the_kernel_does_not_take_runs_on_torchs(native, qkv) -> None:
    for shape, kind in (((1, 5, 7, 2, 12), torch.float32), ((1, 5, 7, 2, 8), torch.float64)):
        tensors = qkv(*shape, kind)
        expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors)).transpose(
            1, 2
        )
        with use_backend(None):
            assert torch.equal(attention(*tensors), expected)
            fallbacks = backend_report("cpu")["attention"].fallbacks
        assert any("Dh=12" in reason for reason in fallbacks)
    assert any(reason.startswith("float64") for reason in fallbacks)


@pytest.mark.parametrize(
    ("head_dim", "kind", "message"),
    [
        (12, torch.float32, r"Dh=12 \(the kernel takes multiples of 8 up to 256\)"),
        (264, torch.float32, "Dh=264"),
        (0, torch.float32, "Dh=0"),
        (8, torch.float64, r"float64 \(the kernel takes float32 and bfloat16\)"),
        (8, torch.float16, "float16"),
    ],
)
def test_forced_kernel_says_what_it_does_not_take(head_dim, kind, message, native, qkv) -> None:
    with (
        use_backend("native"),
        pytest.raises(ValueError, match=f"attention: backend 'native' .* support {message}"),
    ):
        attention(*qkv(1, 3, 4, 2, head_dim, kind))


def test_without_a_triton_kernel_the_reference_runs(qkv) -> None:
    tensors = qkv(1, 5, 7, 2, 8)
    with use_backend("triton"):
        assert torch.equal(attention(*tensors), attention_reference(*tensors)[0])


Q, K = (2, 5, 3, 8), (2, 7, 3, 8)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((Q[1:], K, K), r"q must be a floating-point \[B, L, H, Dh\], got \(5, 3, 8\) float32"),
        ((Q, K[1:], K), r"k must be \[B=2, S, H=3, Dh=8\] for q \(2, 5, 3, 8\), got \(7, 3, 8\)"),
        ((Q, (1, 7, 3, 8), (1, 7, 3, 8)), "k must be"),
        ((Q, (2, 7, 1, 8), (2, 7, 1, 8)), "k must be"),
        ((Q, (2, 7, 3, 16), (2, 7, 3, 16)), "k must be"),
        ((Q, K, (2, 6, 3, 8)), r"v must have the shape of k \(2, 7, 3, 8\)"),
        ((Q, K, (2, 7, 3, 16)), "v must have the shape of k"),
    ],
)
def test_bad_shapes(shapes, message) -> None:
    with pytest.raises(ValueError, match=f"attention: {message}"):
        attention(*(torch.zeros(shape) for shape in shapes))


def test_bad_dtypes_and_devices() -> None:
    q, k = torch.zeros(Q), torch.zeros(K)
    with pytest.raises(ValueError, match="q must be a floating-point .*int64"):
        attention(q.long(), k.long(), k.long())
    with pytest.raises(
        ValueError, match="k and v must have the dtype of q, torch.float32, got torch.float64"
    ):
        attention(q, k.double(), k)
    with pytest.raises(ValueError, match="v is on meta, expected cpu"):
        attention(q, k, k.to("meta"))
    with pytest.raises(ValueError, match="k is on meta, expected cpu"):
        attention(q, k.to("meta"), k.to("meta"))


@pytest.mark.slow
def test_every_instruction_set(run_python) -> None:
    """Also those that are not the choice here; the generic kernels are compiled, if not offered."""
    code = (
        "import torch, anyflow.ops as ops\n"
        "torch.manual_seed(0); torch.set_num_threads(2)\n"
        "q, k, v, g = (torch.randn(1, n, 2, 72) for n in (65, 130, 130, 65))\n"
        "new = torch.ops.anyflow\n"
        "out, total = new.attention_native(q, k, v)\n"
        "ours = out, *new.attention_backward_native(g, q, k, v, out, total)\n"
        "wide = [t.double().requires_grad_() for t in (q, k, v)]\n"
        "with ops.use_backend('eager'): expected = ops.attention(*wide)\n"
        "theirs = expected.detach(), *torch.autograd.grad(expected, wide, g.double())\n"
        "print(max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs)))\n"
    )
    if EXTENSION is None:
        pytest.skip("the native extension is not built")
    names = EXTENSION.build_info()["cpu_instruction_sets"].split(",")
    for name in names[: names.index(EXTENSION.cpu_instruction_set()) + 1]:
        assert float(run_python(code, ANYFLOW_CPU_ISA=name).split()[-1]) <= 3e-6, name
