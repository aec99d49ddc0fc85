"""What every test has: two threads, a seeded generator, no network, the same random examples each time."""

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub when it is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # by OpenMP: idle threads of one worker leave the cores to another
if os.environ.get("ANYFLOW_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a kernel is defined

import hypothesis
import pytest
import torch

SEED = 20260513

torch.set_num_threads(2)
hypothesis.settings.register_profile("anyflow", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("anyflow")


def pytest_report_header() -> str:
    """Which build is tested: an installed one, this checkout's, or the one of ``make sanitize``."""
    spec = importlib.util.find_spec("anyflow._C")
    return f"anyflow._C: {'not built' if spec is None else spec.origin}"


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator in the same state at the start of every test."""
    return torch.Generator().manual_seed(SEED)


@pytest.fixture(autouse=True)
def _seed_weights() -> None:
    """PyTorch initializes weights from its global generator; nothing else may draw from it."""
    torch.manual_seed(SEED)
