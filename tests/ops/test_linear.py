"""linear: ranks, the gradients that are wanted, the choice of the operator, any strides."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE, assert_gradients, assert_matches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow.models.linear import apply_linear
from anyflow.ops import linear, use_backend
from anyflow.ops.backend import LEFT_TO_TORCH


class OperatorNames(TorchDispatchMode):
    """Keep the names of the operators of anyflow that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "anyflow":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def calls(function: Callable[[], object]) -> list[str]:
    with OperatorNames() as seen:
        function()
    return seen.names


@pytest.fixture
def automatic() -> Iterator[None]:
    if DEVICE.type != "cpu" or "linear" in LEFT_TO_TORCH:
        pytest.skip(LEFT_TO_TORCH.get("linear", "the native kernel is for the CPU"))
    with use_backend(None):
        yield


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("shape", "n"), [((7,), 3), ((3, 1, 2, 33), 1), ((1, 1), 1)], ids=str)
def test_any_rank(shape, n, with_bias, backend, dtype, draw) -> None:
    shapes = (shape, (n, shape[-1]), *([(n,)] * with_bias))
    inputs = [draw(*sizes, dtype=dtype) for sizes in shapes]
    exact = doubled(*inputs)
    out, expected = linear(*inputs), F.linear(*exact)
    assert out.dtype == dtype and out.shape == (*shape[:-1], n)
    assert_matches(out, expected)
    assert_gradients("linear", ([out], inputs), ([expected], exact))


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 2), (0, 1)], ids=str)
def test_only_the_gradients_that_are_wanted(frozen, backend, draw) -> None:
    """Compare the gradients of the function and of the operator, whose backward is told which."""
    inputs = [draw(3, 17), draw(5, 17), draw(5)]
    for i in frozen:
        inputs[i].requires_grad_(False)
    exact = doubled(*inputs)
    wanted, wanted64 = ([t for t in tensors if t.requires_grad] for tensors in (inputs, exact))
    for function in (linear, torch.ops.anyflow.linear):
        out = function(*inputs)
        assert_gradients("linear", ([out], wanted), ([F.linear(*exact)], wanted64))
    flags = [i not in frozen for i in range(3)]
    args = (out.detach(), inputs[0].detach(), inputs[1].detach(), *flags)
    torch.library.opcheck(torch.ops.anyflow.linear_backward.default, args)


def test_the_operator_runs_where_it_is_faster(automatic, generator) -> None:
    """The operator runs large fp32 products; any other call is ``F.linear`` itself."""
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
    """Run an ``nn.Linear`` as the model does, with parameters in a larger buffer."""
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
