"""What the operator tests share: backends, devices, the tolerance table, and the comparisons that
use it.

A test that takes ``backend`` runs on the eager reference, on the Triton kernels and on the native
ones: on a GPU with ``ANYFLOW_TEST_DEVICE=cuda``, else on the CPU, where Triton's are interpreted.
One that takes ``dtype`` too runs for every dtype of each. A test that takes ``kernel`` gets the
names of all but the eager one, to force them itself. On a GPU, tests of a kernel that the operator
does not have there are skipped: not every operator has a native CUDA kernel.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from anyflow.ops import use_backend
from anyflow.ops.backend import OPERATORS, missing

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
# What fp32 functions of a GPU may be off by, relative to the result (PTX ISA 9.1, section 9.7.3):
# 2^-22.9 of rsqrt.approx.f32, two units in the last place, 2^-22, of ex2.approx.f32 and of
# div.full.f32. A CPU rounds its root and its division once, and fusing a product and a sum only
# removes a rounding. The fp32 row above, 33 roundings, has room for them; a test with a tighter
# bound adds on a GPU those that its formula has.
APPROXIMATIONS = {"rsqrt": 2**-22.9, "exp": 2**-22, "division": 2**-22}
DTYPES = {
    "eager": [torch.float64, torch.float32, torch.float16, torch.bfloat16],
    "triton": [torch.float32, torch.float16, torch.bfloat16],
    "native": [torch.float32, torch.float16, torch.bfloat16],
}

AssertClose = Callable[..., None]
CheckGradients = Callable[..., None]
Draw = Callable[..., Tensor]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every backend that runs here, times the dtypes that it takes; a test's own parameters come on
    top.
    """
    backends = (
        ["eager", "triton", "native"] if importlib.util.find_spec("triton") else ["eager", "native"]
    )
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", backends[1:])
    takes_backend, takes_dtype = (
        "backend" in metafunc.fixturenames,
        "dtype" in metafunc.fixturenames,
    )
    if takes_backend and takes_dtype:
        pairs = [(b, d) for b in backends for d in DTYPES[b]]
        ids = [f"{b}-{str(d).removeprefix('torch.')}" for b, d in pairs]
        metafunc.parametrize(("backend", "dtype"), pairs, ids=ids, indirect=["backend"])
    elif takes_backend:
        metafunc.parametrize("backend", backends, indirect=True)
    elif takes_dtype:
        metafunc.parametrize("dtype", DTYPES["eager"], ids=lambda d: str(d).removeprefix("torch."))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what a device other than the CPU has no kernel for; on a CPU all
    kernels must be there.
    """
    where = torch.device(os.environ.get("ANYFLOW_TEST_DEVICE", "cpu"))
    if where.type == "cpu":
        return
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent) or not hasattr(item, "callspec"):
            continue
        parameters, op = item.callspec.params, item.path.stem.removeprefix("test_")
        name = parameters.get("backend", parameters.get("kernel"))
        reason = missing(name, where, op) if name in OPERATORS.get(op, ()) else None
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force a backend. In deterministic mode, what the kernels allocate reads NaN until it is
    written.
    """
    with use_backend(request.param):
        torch.use_deterministic_algorithms(request.param != "eager", warn_only=True)
        try:
            yield request.param
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """``ANYFLOW_TEST_DEVICE``, the CPU unless told otherwise."""
    return torch.device(os.environ.get("ANYFLOW_TEST_DEVICE", "cpu"))


@pytest.fixture
def approximation(device: torch.device) -> Callable[[str], float]:
    """``approximation("rsqrt")``: what that function is off by on this device, beyond its
    rounding.
    """
    return lambda name: APPROXIMATIONS[name] if device.type == "cuda" else 0.0


@pytest.fixture
def draw(generator: torch.Generator, device: torch.device) -> Draw:
    """``draw(*shape, dtype=torch.float32)``: a normal leaf that requires a gradient, the same
    numbers on any device.
    """

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .to(device, dtype)
            .requires_grad_()
        )

    return normal


def _compare(actual: Tensor, expected: Tensor, tolerance: torch.dtype | None, slack: float) -> None:
    rtol, atol = TOLERANCES[actual.dtype if tolerance is None else tolerance]
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected, rtol=slack * rtol, atol=slack * atol * scale
    )


@pytest.fixture
def assert_matches() -> AssertClose:
    """``assert_matches(actual, expected_fp64, tolerance=dtype)``: by the row of the table for
    actual's dtype.
    """

    def check(actual: Tensor, expected: Tensor, tolerance: torch.dtype | None = None) -> None:
        _compare(actual, expected, tolerance, 1.0)

    return check


@pytest.fixture
def assert_gradients(generator: torch.Generator) -> CheckGradients:
    """``assert_gradients(outputs, inputs, outputs_fp64, inputs_fp64)`` under one random cotangent,
    taken twice.

    The second backward pass must give the same bits (sums have one order) and neither may write
    what it reads.
    """

    def check(
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        outputs64: Sequence[Tensor],
        inputs64: Sequence[Tensor],
    ) -> None:
        cotangents = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs
        ]
        cotangents = [c.to(o.device, o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
        read = [*outputs, *inputs, *cotangents]
        before = [r.detach().clone() for r in read]
        actual = torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)
        again = torch.autograd.grad(outputs, inputs, cotangents)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
        assert all(torch.equal(r.detach(), b) for r, b in zip(read, before, strict=True))
        expected = torch.autograd.grad(outputs64, inputs64, [c.double() for c in cotangents])
        half = [i.dtype for i in inputs if i.dtype.itemsize == 2]
        for a, e, i in zip(actual, expected, inputs, strict=True):
            assert a.dtype == i.dtype and a.shape == i.shape
            _compare(a, e, half[0] if half else None, GRADIENT_SLACK)

    return check
