"""Test numbers as users give them, and the search for the first tensor that is not finite."""

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from anyflow.utils.validation import FiniteCheck, brief, finite_number, numbered, whole_number


@pytest.mark.parametrize(
    "value",
    [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3])],
    ids=repr,
)
def test_whole_numbers_become_ints(value: Any) -> None:
    assert whole_number("n", value) == 3 and type(whole_number("n", value)) is int


@pytest.mark.parametrize(
    "value",
    [0, -1, 11, 3.0, np.float64(3), "3", b"3", None, True, np.bool_(True), torch.tensor(True),
     torch.tensor(3.0),
     torch.tensor([3, 3]), np.array([3, 3]), [3], 10**5000, math.nan],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_other_values_are_no_whole_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^n must be a whole number from 1 to 10, got ") as error:
        whole_number("n", value, 1, 10)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.array(2.0), torch.tensor(2.0), Decimal(2)], ids=repr
)
def test_numbers_become_floats(value: Any) -> None:
    assert finite_number("x", value) == 2.0 and type(finite_number("x", value)) is float


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, "2", b"2", None, True, 1j, [2.0], 10**400, torch.ones(2)],
    ids=lambda v: type(v).__name__,
)
def test_other_values_are_no_finite_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match="x must be a finite number, got "):
        finite_number("x", value)


def test_the_first_tensor_that_is_not_finite_is_found_with_its_rows() -> None:
    check = FiniteCheck()
    check.note("half", torch.full((2, 3), 65504.0, dtype=torch.float16))
    check.note("large", torch.full((1, 2, 2), 3e38))
    assert check.first() is None
    check.note("bad", torch.tensor([[0.0, 1.0], [math.nan, 1.0], [2.0, -math.inf]]))
    check.note("later", torch.tensor([[math.nan]]))
    assert check.first() == ("bad", [1, 2], 3)
    assert numbered([1, 2], 3) == "videos 2, 3 of 3" and numbered([0], 1) == "video 1 of 1"


def test_tensors_without_values_are_finite() -> None:
    check = FiniteCheck()
    check.note("meta", torch.empty(2, 3, device="meta"))
    assert check.first() is None


def test_what_a_message_quotes_is_short() -> None:
    assert brief([1, 2]) == "[1, 2]" and brief("a\nb") == "'a\\nb'"
    assert len(brief("x" * 10**6)) < 110 and "bits" in brief(10**5000)
