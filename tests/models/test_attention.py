"""Compare every backend of attention that runs here with the formula, and check the errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.models import attention_report, use_attention_backend
from anyflow.models.attention import ATTENTION_BACKENDS, attention
from anyflow.ops import use_backend
from anyflow.ops.native import EXTENSION

NATIVE = EXTENSION is not None and EXTENSION.cpu_instruction_set() != "generic"
ON_CPU = ("native", "flash", "math") if NATIVE else ("flash", "math")
FP32 = torch.float32
NOT_ON_CPU = tuple(name for name in ATTENTION_BACKENDS if name not in ("native", *ON_CPU))
needs_native = pytest.mark.skipif(not NATIVE, reason="needs the native kernel, and AVX2 for it")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = {  # B, L, S, H, Dh
    "self": (2, 37, 37, 3, 64),
    "cross": (2, 37, 7, 3, 64),
    "one query": (1, 1, 5, 2, 24),
    "one key": (2, 5, 1, 2, 24),
    "one head": (1, 9, 9, 1, 128),
    "odd width": (1, 9, 4, 2, 18),
}


def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute the textbook formula in fp64."""
    query, key, value = (t.double() for t in (query, key, value))
    weights = (
        torch.einsum("blhd,bshd->bhls", query, key).div(math.sqrt(query.shape[-1])).softmax(-1)
    )
    return torch.einsum("bhls,bshd->blhd", weights, value).flatten(2)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run torch's attention by its own choice."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return out.transpose(1, 2).flatten(2)


# ---- values


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", [None, *ON_CPU])
def test_values_and_gradients(backend, shape, dtype, qkv, generator, relative) -> None:
    tensors = qkv(shape, dtype, grad=True)
    if backend == "native" and (dtype not in NATIVE_DTYPES or shape[4] % 8):
        pytest.skip(
            "the native kernel does not take them, and says so: "
            "test_forced_native_kernel_does_not_take_these"
        )
    out = attention(*tensors, attention_backend=backend)
    assert out.shape == (shape[0], shape[1], shape[3] * shape[4]) and out.dtype == dtype
    expected = reference(*tensors)
    assert relative(out, expected) < TOLERANCE[dtype]
    weights = torch.randn(out.shape, generator=generator).to(dtype)
    ours = torch.autograd.grad((out * weights).sum(), tensors)
    theirs = torch.autograd.grad((expected * weights).sum(), tensors)
    largest = max(want.double().norm().item() for want in theirs)
    for name, got, want in zip(("query", "key", "value"), ours, theirs, strict=True):
        # of one key, the gradients of query and key vanish
        scale = max(want.double().norm().item(), 0.1 * largest)
        assert (got.double() - want.double()).norm().item() / scale < 2 * TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_automatic_choice_on_the_cpu(dtype, grad, qkv, kernel_of, automatic) -> None:
    """Run the native kernel where it takes the tensors, else torch's choice bit for bit."""
    for shape in SHAPES.values():
        tensors = qkv(shape, dtype, grad)
        native = dtype in NATIVE_DTYPES and shape[4] % 8 == 0 and automatic == "native"
        assert kernel_of(attention, *tensors) == ("native" if native else "flash")
        with use_backend(None if not native else "eager"):
            assert torch.equal(attention(*tensors), plain(*tensors))
            assert kernel_of(attention, *tensors) == kernel_of(plain, *tensors) == "flash"


@pytest.mark.parametrize("backend", [None, *ON_CPU])
@pytest.mark.parametrize(
    "shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 0, 2, 8), (2, 4, 4, 0, 8), (0, 0, 0, 2, 8)]
)
def test_empty(shape, backend, qkv) -> None:
    tensors = qkv(shape, grad=True)
    out = attention(*tensors, attention_backend=backend)
    assert out.shape == (shape[0], shape[1], shape[3] * shape[4])
    # also without keys, where no value can be averaged
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert all(t.grad is not None and torch.equal(t.grad, torch.zeros_like(t)) for t in tensors)


@pytest.mark.parametrize("backend", [None, *ON_CPU])
def test_strided_inputs(backend, qkv, kernel_of) -> None:
    tensors = qkv(SHAPES["self"])
    expected = attention(*tensors, attention_backend=backend)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    columns = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in tensors]
    packed = list(torch.stack(tensors, 2).unbind(2))
    assert columns[0].stride(-1) != 1
    for strided in (heads_first, columns, packed):
        assert not strided[0].is_contiguous()
        torch.testing.assert_close(
            attention(*strided, attention_backend=backend), expected, rtol=1e-5, atol=1e-6
        )
    if backend is not None:
        assert kernel_of(attention, *columns, attention_backend=backend) == backend
    shared = [t[:1].expand(3, -1, -1, -1) for t in tensors]
    out = attention(*shared, attention_backend=backend)
    torch.testing.assert_close(out, expected[:1].expand(3, -1, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [None, *ON_CPU])
def test_autocast_casts_as_torch_does(backend, qkv) -> None:
    query, key, value = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(query, key.bfloat16(), value, attention_backend=backend)
        expected = attention(
            query.bfloat16(), key.bfloat16(), value.bfloat16(), attention_backend=backend
        )
        assert attention(query.double(), key.double(), value.double()).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_meta_device(qkv) -> None:
    query, key, value = (t.to("meta") for t in qkv())
    assert attention(query, key, value).shape == (2, 37, 192)


# ---- errors


@pytest.mark.parametrize("name", ["sdpa", "FLASH", "_native", "_native_math", ""])
def test_unknown_names(name, qkv, monkeypatch, kernel_of, automatic) -> None:
    listed = "expected one of flash_attn_3, flash_attn_2, native, cudnn, flash, efficient, math"
    with pytest.raises(
        ValueError, match=f"attention_backend: unknown attention backend '{name}'; {listed}"
    ):
        attention(*qkv(), attention_backend=name)
    with pytest.raises(ValueError, match=listed):
        use_attention_backend(name)
    assert kernel_of(attention, *qkv()) == automatic
    monkeypatch.setenv("ANYFLOW_ATTENTION", name)
    if name:  # an empty variable is an unset one
        with pytest.raises(
            ValueError, match=f"ANYFLOW_ATTENTION: unknown attention backend '{name}'"
        ):
            attention(*qkv())


@pytest.mark.parametrize("backend", NOT_ON_CPU)
def test_forced_but_missing(backend, qkv, monkeypatch) -> None:
    why = "not installed|runs on CUDA devices only, not on cpu"
    for shape in (SHAPES["self"], (0, 4, 4, 2, 8)):
        tensors = qkv(shape)
        message = f"'{backend}' \\(forced by attention_backend=\\) is not available: ({why})"
        with pytest.raises(RuntimeError, match=message):
            attention(*tensors, attention_backend=backend)
        with (
            use_attention_backend(backend),
            pytest.raises(RuntimeError, match=f"'{backend}' .*use_attention_backend"),
        ):
            attention(*tensors)
        with (
            monkeypatch.context() as m,
            pytest.raises(RuntimeError, match=f"'{backend}' .*ANYFLOW_ATTENTION"),
        ):
            m.setenv("ANYFLOW_ATTENTION", backend)
            attention(*tensors)


def test_missing_packages_say_how_to_install_them(qkv) -> None:
    report = attention_report("cpu")
    if not report["flash_attn_2"].reason.startswith("not installed"):
        pytest.skip("flash-attn is installed")
    with pytest.raises(RuntimeError, match="pip install --no-build-isolation flash-attn "):
        attention(*qkv(), attention_backend="flash_attn_2")


def test_forced_but_not_for_these_tensors() -> None:
    x = torch.zeros(1, 4, 2, 8).to(torch.float8_e4m3fn)
    message = (
        "'flash' \\(forced by attention_backend=\\) does not support query of dtype "
        "torch.float8_e4m3fn with head_dim 8"
    )
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, attention_backend="flash")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "why"),
    [
        (torch.float64, 64, "float64"),
        (torch.float16, 64, "float16"),
        (FP32, 12, "Dh=12"),
        (FP32, 264, "Dh=264"),
    ],
)
def test_forced_native_kernel_does_not_take_these(dtype, head_dim, why, qkv) -> None:
    message = (
        rf"'native' \(forced by .*\) does not support query of dtype {dtype} with head_dim "
        rf"{head_dim}: {why} \("
    )
    with pytest.raises(ValueError, match=message):
        attention(*qkv((1, 5, 3, 2, head_dim), dtype), attention_backend="native")
    assert attention(*qkv((1, 5, 3, 2, head_dim), dtype)).shape == (1, 5, 2 * head_dim)


@needs_native
@pytest.mark.parametrize("operators", ["eager", "triton"])
def test_no_native_kernel_where_the_operators_are_forced_elsewhere(
    operators, qkv, monkeypatch, kernel_of
) -> None:
    tensors = qkv()
    with use_backend(operators):
        assert kernel_of(attention, *tensors) == "flash"
        assert not attention_report("cpu", dtype=FP32)["native"].available
        message = (
            f"'native' .* is not available: anyflow.ops runs on '{operators}', forced by "
            "use_backend"
        )
        with pytest.raises(RuntimeError, match=message):
            attention(*tensors, attention_backend="native")
    monkeypatch.setenv("ANYFLOW_BACKEND", operators)
    assert kernel_of(attention, *tensors) == "flash"
    with use_backend("native"):
        assert kernel_of(attention, *tensors) == "native"


@needs_native
def test_derivatives_that_the_native_kernel_does_not_have(qkv) -> None:
    tensors = qkv(grad=True)
    out = attention(*tensors, attention_backend="native")
    gradient = torch.autograd.grad(out.sum(), tensors, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="a fused kernel has no second derivative"):
        torch.autograd.grad(gradient.sum(), tensors[0])
    values = tuple(t.detach() for t in tensors)
    with (
        use_attention_backend("native"),
        pytest.raises(
            RuntimeError, match=r"no forward-mode derivative.*use_attention_backend\('math'\)"
        ),
    ):
        torch.func.jvp(attention, values, values)
    with use_attention_backend("math"):
        expected = torch.func.jvp(attention, values, values)[1]
    # not the kernel's choice
    torch.testing.assert_close(torch.func.jvp(attention, values, values)[1], expected)


Q, K = (2, 5, 3, 8), (2, 7, 3, 8)


@pytest.mark.parametrize("backend", [None, "math"])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((Q[1:], K, K), r"query must be \[B, L, H, Dh\], got \(5, 3, 8\)"),
        ((Q, (1, *K), K), r"key must be \[B, S, H, Dh\], got \(1, 2, 7, 3, 8\)"),
        ((Q, K, K[:3]), r"value must be \[B, S, H, Dh\], got \(2, 7, 3\)"),
        (
            (Q, (1, 7, 3, 8), (1, 7, 3, 8)),
            r"key must be \[B=2, S, H=3, Dh=8\] to fit query, got \(1, 7, 3, 8\)",
        ),
        ((Q, (2, 7, 1, 8), (2, 7, 1, 8)), r"key must be .*got \(2, 7, 1, 8\)"),
        ((Q, (2, 7, 3, 4), (2, 7, 3, 4)), r"key must be .*got \(2, 7, 3, 4\)"),
        ((Q, K, (2, 6, 3, 8)), r"value \(2, 6, 3, 8\) must have the shape of key \(2, 7, 3, 8\)"),
        ((Q, K, (2, 7, 3, 4)), r"value \(2, 7, 3, 4\) must have the shape of key"),
    ],
)
def test_bad_shapes(shapes, message, backend) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes), attention_backend=backend)


def test_bad_dtypes_and_devices(qkv) -> None:
    query, key, value = qkv()
    with pytest.raises(
        ValueError, match="key is torch.float64 on cpu, query is torch.float32 on cpu"
    ):
        attention(query, key.double(), value)
    with pytest.raises(ValueError, match="value is torch.bfloat16 on cpu"):
        attention(query, key, value.bfloat16())
    with pytest.raises(
        ValueError, match="value is torch.float32 on meta, query is torch.float32 on cpu"
    ):
        attention(query, key, value.to("meta"))
    with pytest.raises(
        ValueError, match="query must be of a floating-point dtype, got torch.int64"
    ):
        attention(query.long(), key.long(), value.long())


# ---- a CUDA device

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@cuda
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [24, 64, 128, 192])
def test_every_backend_of_the_report_on_cuda(head_dim, dtype, grad, qkv, relative) -> None:
    report = attention_report("cuda", dtype=dtype, head_dim=head_dim, requires_grad=grad)
    assert sum(row.chosen for row in report.values()) == 1
    tolerance = max(TOLERANCE[dtype], 1e-3)  # TF32 is allowed
    for shape in ((2, 333, 333, 3, head_dim), (2, 333, 77, 3, head_dim)):
        tensors = [t.detach().cuda().requires_grad_(grad) for t in qkv(shape, dtype)]
        for name in (None, *ATTENTION_BACKENDS):
            if name is not None and not report[name].available:
                with pytest.raises((RuntimeError, ValueError), match=f"'{name}'"):
                    attention(*tensors, attention_backend=name)
                continue
            out, expected = attention(*tensors, attention_backend=name), reference(*tensors)
            assert relative(out, expected) < 2 * tolerance, name
            if grad:
                ours, theirs = (
                    torch.autograd.grad(x.double().square().sum(), tensors) for x in (out, expected)
                )
                assert all(
                    relative(a, b) < 4 * tolerance for a, b in zip(ours, theirs, strict=True)
                ), name


@cuda
@pytest.mark.parametrize("backend", [None, *ATTENTION_BACKENDS])
@pytest.mark.parametrize(
    "shape", [(0, 4, 4, 2, 64), (2, 0, 4, 2, 64), (2, 4, 0, 2, 64), (2, 4, 1, 2, 64)]
)
def test_degenerate_lengths_on_cuda(shape, backend, qkv) -> None:
    tensors = [t.cuda() for t in qkv(shape, torch.bfloat16)]
    try:
        out = attention(*tensors, attention_backend=backend)
    except (
        RuntimeError,
        ValueError,
    ) as error:  # a missing backend, or cuDNN, which refuses a single key
        assert f"attention: backend '{backend}' (forced by attention_backend=)" in str(error)
        assert not attention_report("cuda", head_dim=64)[backend].available or shape[2] == 1
    else:
        torch.testing.assert_close(out.double(), reference(*tensors), rtol=2e-2, atol=2e-2)


@cuda
@pytest.mark.parametrize(
    ("backend", "dtype"), [("flash", FP32), ("cudnn", FP32), ("efficient", torch.float64)]
)
def test_unsupported_arguments_on_cuda(backend, dtype) -> None:
    if not attention_report("cuda")[backend].available:
        pytest.skip(f"{backend} is not available")
    x = torch.zeros(1, 8, 2, 64, device="cuda", dtype=dtype)
    with pytest.raises(
        ValueError, match=f"'{backend}' .* does not support query of dtype {dtype} with head_dim 64"
    ):
        attention(x, x, x, attention_backend=backend)
    x = torch.zeros(1, 8, 2, 268, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"'{backend}' .* with head_dim 268"):
        attention(x, x, x, attention_backend=backend)
