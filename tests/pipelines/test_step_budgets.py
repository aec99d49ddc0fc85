"""Test the numbers of steps of a video: parsing, names, and the steps of each chunk."""

import pytest

from anyflow.pipelines.results import file_name, partial_name
from anyflow.pipelines.step_budgets import (
    budget_label,
    budget_text,
    checked_budget,
    parse_steps,
    steps_of_chunks,
)


def test_budgets_are_sorted_and_each_is_kept_once_in_its_shortest_form() -> None:
    assert parse_steps("8+2, 1,4,2,8 + 2+2,4+4") == (1, 2, 4, (8, 2))
    assert parse_steps("16,8+4+2,8,8+2") == (8, (8, 2), (8, 4, 2), 16)
    assert checked_budget([3]) == 3 and checked_budget((3, 1, 3, 3)) == (3, 1, 3)


@pytest.mark.parametrize("wrong", ["", "0", "8+", "+2", "8+0", "8-2", "8++2", "1,,2", "٣", "a"])
def test_other_texts_are_no_budgets(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"steps must be whole numbers >= 1.*as 1,8\+2; got"):
        parse_steps(wrong)


def test_a_number_of_steps_has_a_limit_in_a_budget_too() -> None:
    with pytest.raises(ValueError, match="steps of a chunk must be a whole number from 1 to"):
        parse_steps(f"1,2+{10**9}")


def test_the_last_number_is_that_of_all_later_chunks() -> None:
    assert steps_of_chunks(4, 3) == [4, 4, 4]
    assert steps_of_chunks((8, 2), 4) == [8, 2, 2, 2]
    assert steps_of_chunks((8, 4, 2), 3) == [8, 4, 2]
    with pytest.raises(
        ValueError, match=r"steps 8\+4\+2 are for 3 chunks or more, .* has 2 chunks to sample"
    ):
        steps_of_chunks((8, 4, 2), 2)


def test_files_and_labels_name_a_budget() -> None:
    assert file_name((8, 2), 0) == "steps-08+02-seed-0.mp4"
    assert partial_name(4, 7) == "steps-04-seed-7.partial.mp4"
    assert [budget_label(budget) for budget in (1, 4, (8, 2))] == ["1 step", "4 steps", "8+2 steps"]
    assert parse_steps(budget_text((16, 8, 2))) == ((16, 8, 2),)
