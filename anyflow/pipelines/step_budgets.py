"""Read and name the network evaluations of a video: one number, or numbers for its chunks."""

from __future__ import annotations

from collections.abc import Sequence

from anyflow.models.chunks import MAX_CHUNKS
from anyflow.schedulers import MAX_STEPS
from anyflow.utils.progress import counted
from anyflow.utils.validation import brief, whole_number

# Evaluations of every chunk that is sampled; or a number for each of them, whose last one is that
# of all later chunks.
StepBudget = int | tuple[int, ...]


def parse_steps(text: str) -> tuple[StepBudget, ...]:
    """Parse budgets such as ``"1,2,8+2"``, in ascending order, each once.

    ``8+2`` is 8 evaluations of the first chunk that is sampled and 2 of each later one.

    Raises:
        ValueError: the text is something else.
    """
    words = [[number.strip() for number in word.split("+")] for word in text.split(",")]
    if not all(
        number.isascii() and number.isdecimal() and len(number) < 20 and int(number) > 0
        for word in words
        for number in word
    ):
        raise ValueError(
            "steps must be whole numbers >= 1 with commas between them, as 1,2,4, or numbers for "
            f"the chunks of a causal model, as 1,8+2; got {brief(text)}"
        )
    budgets = {checked_budget([int(number) for number in word]) for word in words}
    return tuple(sorted(budgets, key=budget_numbers))


def checked_budget(steps: int | Sequence[int]) -> StepBudget:
    """Return a budget in its shortest form: ``8+2+2`` is ``8+2``, and ``4+4`` is 4.

    Raises:
        ValueError: it holds something else than possible numbers of steps.
    """
    several = isinstance(steps, (list, tuple))
    given = list(steps) if isinstance(steps, (list, tuple)) else [steps]
    if not 0 < len(given) <= MAX_CHUNKS:
        raise ValueError(f"steps must be 1 to {MAX_CHUNKS} numbers, got {len(given)}")
    name = "steps of a chunk" if several else "num_inference_steps"
    numbers = [whole_number(name, number, high=MAX_STEPS) for number in given]
    while len(numbers) > 1 and numbers[-1] == numbers[-2]:
        numbers.pop()
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def budget_numbers(budget: StepBudget) -> tuple[int, ...]:
    """Return the numbers of a budget, by which budgets are sorted."""
    return (budget,) if isinstance(budget, int) else budget


def budget_text(budget: StepBudget) -> str:
    """Return a budget as it is given: ``8``, ``8+2``."""
    return "+".join(map(str, budget_numbers(budget)))


def budget_label(budget: StepBudget) -> str:
    """Return a budget with its noun: ``1 step``, ``8+2 steps``."""
    if isinstance(budget, int):
        return counted(budget, "step")
    return f"{budget_text(budget)} steps"


def steps_of_chunks(budget: StepBudget, chunks: int) -> list[int]:
    """Return the number of evaluations of each of the chunks that are sampled.

    Raises:
        ValueError: the budget has more numbers than there are chunks.
    """
    numbers = budget_numbers(budget)
    if len(numbers) > chunks:
        raise ValueError(
            f"steps {budget_text(budget)} are for {len(numbers)} chunks or more, and the video has "
            f"{counted(chunks, 'chunk')} to sample"
        )
    return [*numbers, *[numbers[-1]] * (chunks - len(numbers))]
