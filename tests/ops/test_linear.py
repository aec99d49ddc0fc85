"""linear: which calls are the operator's, and which torch's."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from checks import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

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
        expected = F.linear(large, weight)
        torch.testing.assert_close(linear(large, weight), expected, rtol=1e-5, atol=1e-4)
    _, tangent = torch.func.jvp(lambda x: linear(x, weight), (large,), (large.sin(),))
    torch.testing.assert_close(tangent, F.linear(large.sin(), weight), rtol=1e-5, atol=1e-4)
