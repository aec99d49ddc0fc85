"""Test progress without a terminal: the lines, how often they come, and what they say."""

import io

import pytest
from rich.console import Console

from anyflow.utils.progress import LoggedProgress


def lines(line_seconds: float, *, terminal: bool = False) -> list[str]:
    """Return what is printed while a task of 4 steps runs, before rich's bars at the end."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200)
    with LoggedProgress(line_seconds=line_seconds, console=console) as progress:
        everything = progress.add_task("[bold]everything", total=8.0)
        task = progress.add_task("stage", total=4, note="")
        for _ in range(4):
            progress.update(everything, advance=0.5)
            progress.update(task, advance=1, note="loss 0.5")
        return file.getvalue().splitlines()


def test_a_line_says_stage_step_per_cent_and_time_left() -> None:
    found = lines(0.0)
    assert len(found) == 8  # one for each update
    assert (
        found[3].startswith("everything: 12 %, 0:00:0")
        and "stage: step 2 of 4, 50 %, 0:00:0" in found[3]
    )
    assert found[3].count(" left") == 2 and found[3].endswith("loss 0.5")
    assert "stage" not in found[-1]  # it has ended


@pytest.mark.parametrize(("line_seconds", "terminal"), [(30.0, False), (0.0, True)])
def test_no_line_before_its_time_and_none_in_a_terminal(
    line_seconds: float, terminal: bool
) -> None:
    assert not any("step 2 of 4" in line for line in lines(line_seconds, terminal=terminal))
