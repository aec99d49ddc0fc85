"""The tolerance table of the operators, and the two comparisons that use it."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

# (relative to the element, relative to the largest element). Results are rounded once from an fp32 accumulation, so
# one unit in the last place of the dtype; gradients of half-precision inputs may be rounded once more on their way.
TOLERANCES = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (2e-6, 1e-6),
    torch.float16: (2**-10, 2**-12),
    torch.bfloat16: (2**-7, 2**-9),
}
GRADIENT_SLACK = 3.0

AssertClose = Callable[..., None]
CheckGradients = Callable[..., None]


@pytest.fixture(params=list(TOLERANCES), ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every floating dtype the operators accept."""
    return request.param


def _compare(actual: Tensor, expected: Tensor, tolerance: torch.dtype | None, slack: float) -> None:
    rtol, atol = TOLERANCES[actual.dtype if tolerance is None else tolerance]
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=slack * rtol, atol=slack * atol * scale)


@pytest.fixture
def assert_matches() -> AssertClose:
    """``assert_matches(actual, expected_fp64, tolerance=dtype)``: by the row of the table for actual's dtype."""

    def check(actual: Tensor, expected: Tensor, tolerance: torch.dtype | None = None) -> None:
        _compare(actual, expected, tolerance, 1.0)

    return check


@pytest.fixture
def assert_gradients(generator: torch.Generator) -> CheckGradients:
    """``assert_gradients(outputs, inputs, outputs_fp64, inputs_fp64)`` under one random cotangent."""

    def check(
        outputs: Sequence[Tensor], inputs: Sequence[Tensor], outputs64: Sequence[Tensor], inputs64: Sequence[Tensor]
    ) -> None:
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
        cotangents = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
        actual = torch.autograd.grad(outputs, inputs, cotangents)
        expected = torch.autograd.grad(outputs64, inputs64, [c.double() for c in cotangents])
        half = [i.dtype for i in inputs if i.dtype.itemsize == 2]
        for a, e, i in zip(actual, expected, inputs, strict=True):
            assert a.dtype == i.dtype
            _compare(a, e, half[0] if half else None, GRADIENT_SLACK)

    return check
