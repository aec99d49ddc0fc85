"""Offsets of the Triton kernels are 64-bit, though Triton passes sizes and strides as 32-bit."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "offsets.py"
TOKENS_PER_PROGRAM = 256  # at most; a number of tokens, or of slots, is below 2^31


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_no_offset_is_a_product_of_32_bit_numbers(run_python) -> None:
    """Numbers of tokens and slots may be: a small constant times the number of a program."""
    report = json.loads(run_python(SCRIPT.read_text()).splitlines()[-1])
    assert len(report) >= 14 and all(addresses for addresses, _ in report.values())
    for kernel, (_, products) in report.items():
        for product in products:
            constants = [int(c) for c in re.findall(r"(?:^|\* )(\d+)", product)]
            assert constants and constants[0] <= TOKENS_PER_PROGRAM, f"{kernel}: {product}"
