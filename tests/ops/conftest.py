"""Choose the backends and the device of the operators' tests.

A test that takes ``backend`` runs on the eager reference, on the Triton kernels and on the native
ones: on a GPU with ``ANYFLOW_TEST_DEVICE=cuda``, else on the CPU, where Triton's are interpreted.
In ``test_<op>.py`` these are the backends of that operator; ``forms.over`` takes those of its
examples. On a GPU, tests of a kernel that the operator does not have there are skipped: not every
operator has a native CUDA kernel.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))  # for checks and formulas

from checks import DEVICE, backends, runs

from anyflow.ops import use_backend
from anyflow.ops.backend import OPERATORS, missing


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests that take a backend and do not choose it, by the name of their file."""
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "backend" in metafunc.fixturenames and not any("backend" in names for names in chosen):
        op = metafunc.definition.path.stem.removeprefix("test_")
        metafunc.parametrize("backend", backends(op), indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, tests of a kernel that the operator does not have on the device."""
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent) or not hasattr(item, "callspec"):
            continue
        parameters = item.callspec.params
        op = parameters.get("op", item.path.stem.removeprefix("test_"))
        op = parameters["example"].op if "example" in parameters else op
        name = parameters.get("backend", parameters.get("kernel"))
        reason = missing(name, DEVICE, op) if name in OPERATORS.get(op, ()) else None
        if reason is not None and not runs(op, name):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force a backend; what its kernels allocate reads NaN until it is written."""
    with use_backend(request.param):
        torch.use_deterministic_algorithms(request.param != "eager", warn_only=True)
        try:
            yield request.param
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.fixture
def native() -> None:
    """Skip where the native kernels are not the CPU's."""
    if DEVICE.type != "cpu":
        pytest.skip("the native kernel is for the CPU")


@pytest.fixture
def draw(generator: torch.Generator) -> Callable[..., Tensor]:
    """Draw normal leaves that require a gradient, the same numbers on any device."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(DEVICE, dtype).requires_grad_()

    return normal
