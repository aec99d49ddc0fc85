"""Let tests find the package as the runner does: ``pytest -p gpu.pytest_plugin``.

The workers of pytest-xdist do so too.
"""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from gpu import build, without_diffusers

# a run in the background of a script ignores the interrupt that ends the tests
with contextlib.suppress(ValueError):
    signal.signal(signal.SIGINT, signal.default_int_handler)
build.find_package(os.environ.get("ANYFLOW_TEST_DEVICE", "cpu"))
without_diffusers.install()
build.load_operators()


def pytest_configure(config: pytest.Config) -> None:
    """Name the project's mark, whose settings this run does not read."""
    config.addinivalue_line("markers", "slow: takes more than 10 seconds, or downloads something")
