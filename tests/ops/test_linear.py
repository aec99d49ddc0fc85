"""linear against the same product in fp64, and when the model's linear layers go through it."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow.models.linear import apply_linear
from anyflow.ops import backend_report, linear, use_backend
from anyflow.ops.backend import LEFT_TO_TORCH

# x, N; the last ones are large enough for oneDNN, with odd sizes, and for its product of the
# weight's gradient.
SHAPES = [
    ((2, 5, 16), 24),
    ((7,), 3),
    ((3, 1, 2, 33), 1),
    ((1, 1), 1),
    ((2, 193, 130), 101),
    ((1, 1031, 184), 190),
]


class Calls(TorchDispatchMode):
    """The names of the operators of anyflow that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "anyflow":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def calls(function: Callable[[], object]) -> list[str]:
    with Calls() as seen:
        function()
    return seen.names


@pytest.fixture
def automatic(device: torch.device) -> Iterator[None]:
    if device.type != "cpu" or "linear" in LEFT_TO_TORCH:
        pytest.skip(LEFT_TO_TORCH.get("linear", "the native kernel is for the CPU"))
    with use_backend(None):
        yield


@pytest.fixture
def native(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the native kernel is for the CPU")


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("shape", "n"), SHAPES, ids=str)
def test_values_and_gradients(
    shape, n, with_bias, backend, dtype, draw, assert_matches, assert_gradients
) -> None:
    inputs = [
        draw(*shape, dtype=dtype),
        draw(n, shape[-1], dtype=dtype),
        *([draw(n, dtype=dtype)] * with_bias),
    ]
    exact = doubled(*inputs)
    out, expected = linear(*inputs), F.linear(*exact)
    assert out.dtype == dtype and out.shape == (*shape[:-1], n)
    assert_matches(out, expected)
    assert_gradients([out], inputs, [expected], exact)


def test_registered_operator(backend, draw, assert_matches, assert_gradients) -> None:
    """``torch.ops.anyflow.linear``: on the eager backend too it has a backward formula of its
    own.
    """
    operator, backward = torch.ops.anyflow.linear, torch.ops.anyflow.linear_backward
    inputs = [draw(3, 2, 17), draw(5, 17), draw(5)]
    exact = doubled(*inputs)
    out, expected = operator(*inputs), F.linear(*exact)
    assert_matches(out, expected)
    assert_gradients([out], inputs, [expected], exact)
    for bias in (inputs[2], None):
        torch.library.opcheck(operator.default, (*inputs[:2], bias))
    grad, x, weight = (t.detach() for t in (out, *inputs[:2]))
    for wanted in (
        (True, True, True),
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ):
        torch.library.opcheck(backward.default, (grad, x, weight, *wanted))


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 2), (0, 1)], ids=str)
def test_only_the_gradients_that_are_wanted(frozen, backend, draw, assert_gradients) -> None:
    inputs = [draw(3, 17), draw(5, 17), draw(5)]
    for i in frozen:
        inputs[i].requires_grad_(False)
    exact = doubled(*inputs)
    wanted = [i for i in range(3) if i not in frozen]
    out, expected = linear(*inputs), F.linear(*exact)
    assert_gradients([out], [inputs[i] for i in wanted], [expected], [exact[i] for i in wanted])


def test_compiles_in_one_graph(backend, draw) -> None:
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    inputs = [draw(3, 17), draw(5, 17), draw(5)]
    outputs = compiled(*inputs), linear(*inputs)
    gradients = [torch.autograd.grad(o.square().sum(), inputs) for o in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@settings(max_examples=20)
@given(data=st.data())
def test_random_shapes(device, data: st.DataObject) -> None:
    """Sizes on both sides of those from which oneDNN takes over, down to none, and views of larger
    tensors.
    """
    m, k, n = (data.draw(st.integers(0, high)) for high in (2000, 300, 300))
    offset, seed, transposed = (
        data.draw(st.integers(0, 9)),
        data.draw(st.integers(0, 99)),
        data.draw(st.booleans()),
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((k, m + offset) if transposed else (m + offset, k), generator=generator).to(
        device
    )
    x = x.t()[offset:] if transposed else x[offset:]
    weight, bias = (torch.randn(*s, generator=generator).to(device) for s in ((n, k), (n,)))
    inputs = [t.requires_grad_() for t in (x.detach(), weight, bias)]
    exact = doubled(*inputs)
    with use_backend("native" if device.type == "cpu" else "eager"):
        out, expected = linear(*inputs), F.linear(*exact)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
        cotangent = torch.randn(m, n, generator=generator).to(device)
        actual = torch.autograd.grad(out, inputs, cotangent)
    for a, e in zip(actual, torch.autograd.grad(expected, exact, cotangent.double()), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "n"), [((0, 4), 3), ((2, 0, 4), 3), ((2, 4), 0), ((2, 0), 3)], ids=str
)
def test_empty(shape, n, backend, device) -> None:
    x, weight = torch.empty(shape, device=device), torch.empty(n, shape[-1], device=device)
    inputs = [
        x.requires_grad_(),
        weight.requires_grad_(),
        torch.ones(n, device=device, requires_grad=True),
    ]
    out = linear(*inputs)
    out.sum().backward()
    assert torch.equal(out, torch.ones(*shape[:-1], n, device=device))
    assert [i.grad.shape for i in inputs] == [i.shape for i in inputs]


def test_non_contiguous(backend, draw, assert_matches, assert_gradients) -> None:
    x, weight = draw(6, 5, 8), draw(8, 7)
    x64, weight64 = doubled(x, weight)
    for view in (
        lambda t: t.transpose(0, 1),
        lambda t: t[:, ::2],
        lambda t: t[:1].expand(4, -1, -1),
    ):
        out, expected = linear(view(x), weight.t()), F.linear(view(x64), weight64.t())
        assert_matches(out, expected)
        assert_gradients(
            [out.transpose(0, 1)], [x, weight], [expected.transpose(0, 1)], [x64, weight64]
        )
        assert torch.ops.anyflow.linear(view(x), weight.t(), None).is_contiguous()


def test_gradcheck(draw) -> None:
    inputs = [
        draw(3, 5, dtype=torch.float64),
        draw(2, 5, dtype=torch.float64),
        draw(2, dtype=torch.float64),
    ]
    assert torch.autograd.gradcheck(linear, inputs)


def test_second_derivative(backend, draw) -> None:
    """torch's has one; the kernel says that it has none."""
    x, weight = draw(2, 3), draw(4, 3)
    (gradient,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    if backend != "native":
        assert torch.autograd.grad(gradient.sum(), weight)[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="linear: a fused kernel has no second derivative"):
            torch.autograd.grad(gradient.sum(), x)


def test_the_operator_runs_where_it_is_faster(automatic, generator) -> None:
    """Large fp32 products. For others the call is ``F.linear`` itself, with all that torch gives
    it.
    """
    large, small, weight = (torch.randn(n, 256, generator=generator) for n in (256, 8, 128))
    assert calls(lambda: linear(large, weight)) == ["linear"]
    assert calls(lambda: linear(small, weight)) == []
    assert calls(lambda: linear(large.double(), weight.double())) == []
    assert calls(lambda: linear(large.bfloat16(), weight.bfloat16())) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(lambda: linear(large, weight)) == []
        assert linear(large, weight).dtype == torch.bfloat16
    with use_backend("eager"):
        assert calls(lambda: linear(large, weight)) == []
    with torch.no_grad():
        torch.testing.assert_close(
            linear(large, weight), F.linear(large, weight), rtol=1e-5, atol=1e-4
        )


def test_a_forward_mode_derivative_is_torchs(automatic, generator) -> None:
    x, weight = (torch.randn(n, 256, generator=generator) for n in (256, 128))
    _, tangent = torch.func.jvp(lambda x: linear(x, weight), (x,), (x.sin(),))
    torch.testing.assert_close(tangent, F.linear(x.sin(), weight), rtol=1e-5, atol=1e-4)


def test_without_a_triton_kernel_torch_runs(draw) -> None:
    x, weight = draw(3, 5).detach(), draw(2, 5).detach()
    with use_backend("triton"):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        choice = backend_report(x.device)["linear"]
    assert choice.backend == "eager" and "linear has no Triton kernel" in choice.reason


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (
            torch.ones(2, 3, dtype=torch.long),
            torch.ones(4, 3),
            None,
            "x must be a floating-point .* int64",
        ),
        (
            torch.ones(()),
            torch.ones(4, 3),
            None,
            r"x must be a floating-point \[\.\.\., K\] tensor",
        ),
        (
            torch.ones(2, 3),
            torch.ones(3, 4),
            None,
            r"weight must be \[N, K=3\] .*for x \(2, 3\), got \(3, 4\)",
        ),
        (torch.ones(2, 3), torch.ones(3), None, r"weight must be \[N, K=3\]"),
        (
            torch.ones(2, 3),
            torch.ones(4, 3).bfloat16(),
            None,
            "of x's dtype torch.float32.* got .* bfloat16",
        ),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), r"bias must be \[N=4\] .*got \(3,\)"),
        (
            torch.ones(2, 3),
            torch.ones(4, 3),
            torch.ones(4).double(),
            r"bias must be .* got \(4,\) float64",
        ),
        (torch.ones(2, 3), torch.ones(4, 3, device="meta"), None, "weight.*meta"),
    ],
)
def test_bad_input(x, weight, bias, message) -> None:
    with use_backend("native"), pytest.raises(ValueError, match=f"linear: .*{message}"):
        linear(x, weight, bias)


def test_forced_kernel_refuses_fp64(native, draw) -> None:
    x, weight = draw(2, 3, dtype=torch.float64), draw(4, 3, dtype=torch.float64)
    with (
        use_backend("native"),
        pytest.raises(ValueError, match=r"linear: .* does not support \(2, 3\) float64"),
    ):
        linear(x, weight)


STRIDED = {
    "every other": lambda n: torch.randn(2 * n)[::2],
    "column": lambda n: torch.randn(n, 3)[:, 0],
    "expanded": lambda n: torch.ones(1).expand(n),
    "flipped copy": lambda n: torch.randn(n).flip(0),
    "offset": lambda n: torch.randn(n + 3)[3:],
    "negative bit": lambda n: torch.complex(torch.zeros(n), torch.randn(n)).conj().imag,
    "misaligned": lambda n: torch.frombuffer(
        bytearray(4 * n + 1), dtype=torch.float32, count=n, offset=1
    ).add_(torch.randn(n)),
}


@pytest.mark.parametrize("bias", STRIDED.values(), ids=STRIDED)
def test_bias_by_any_stride(native, bias) -> None:
    """oneDNN reads a bias as contiguous memory; large enough for it to be chosen."""
    x, weight, view = torch.randn(64, 512), torch.randn(512, 512), bias(512)
    expected = F.linear(x.double(), weight.double(), view.double())
    with use_backend("native"), torch.no_grad():
        for left, right in (
            (x, weight),
            (x.t().contiguous().t(), weight),
            (x, weight.t().contiguous().t()),
        ):
            torch.testing.assert_close(
                linear(left, right, view).double(), expected, rtol=1e-4, atol=1e-3
            )


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (1, 1), (3, 1)], ids=str)
def test_weight_with_overlapping_rows(native, strides) -> None:
    x, weight = torch.randn(64, 512), torch.randn(512 * 4).as_strided((512, 512), strides)
    with use_backend("native"), torch.no_grad():
        torch.testing.assert_close(
            linear(x, weight), F.linear(x, weight.contiguous()), rtol=1e-4, atol=1e-3
        )
        out = torch.ops.anyflow.linear_backward(x, x, weight, True, True, True)
    torch.testing.assert_close(out[0], x @ weight.contiguous(), rtol=1e-4, atol=1e-3)


def test_layer_whose_parameters_are_views(native) -> None:
    """As the model runs an ``nn.Linear``, whose parameters may lie in a larger buffer."""
    layer = torch.nn.Linear(512, 512)
    buffer = torch.randn(512, 1024)
    layer.weight = torch.nn.Parameter(buffer[:, ::2])
    layer.bias = torch.nn.Parameter(buffer[:, 1])
    x = torch.randn(2, 32, 512)
    with use_backend("native"):
        out = apply_linear(layer, x)
        expected = F.linear(x, layer.weight.contiguous(), layer.bias.contiguous())
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
        gradients = torch.autograd.grad(out.sum(), list(layer.parameters()))
    for a, e in zip(
        gradients, torch.autograd.grad(expected.sum(), list(layer.parameters())), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-2)


def test_no_rows_of_no_elements(backend) -> None:
    assert torch.equal(
        torch.ops.anyflow.linear(torch.ones(2, 3, 0), torch.ones(4, 0), torch.ones(4)),
        torch.ones(2, 3, 4),
    )
