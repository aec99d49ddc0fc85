"""Lets tests, and the workers of pytest-xdist, find the package as the runner does: ``pytest -p gpu.pytest_plugin``.

What a backend does not have on the device is skipped: forced onto it, an operator refuses, which is no wrong kernel.
"""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import torch

from gpu import build, without_diffusers
from gpu.state import die_with_parent

_DEVICE = os.environ.get("ANYFLOW_TEST_DEVICE", "cpu")
die_with_parent()
with contextlib.suppress(ValueError):  # a run in the background of a script ignores the interrupt that ends the tests
    signal.signal(signal.SIGINT, signal.default_int_handler)
build.find_package(_DEVICE)
without_diffusers.install()
build.load_operators()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of kernels that do not exist here."""
    from anyflow.ops.backend import OPERATORS, missing

    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        op, backend = item.path.stem.removeprefix("test_"), parameters.get("backend", parameters.get("kernel"))
        if backend in OPERATORS.get(op, ()):
            reason = missing(backend, torch.device(_DEVICE), op)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
