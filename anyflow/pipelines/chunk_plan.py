"""Plan the chunks of the videos of `anyflow sample`, and the steps of each."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow.models.chunks import ChunkPartition
from anyflow.pipelines.causal_request import CausalVideoRequest
from anyflow.pipelines.layout import ModelLayout
from anyflow.pipelines.step_budgets import StepBudget, steps_of_chunks


@dataclass(frozen=True)
class ChunkPlan:
    """Hold how a causal model takes the videos of a folder apart.

    Args:
        partition: latent frames of each chunk.
        given: number of chunks that first frames fill, which are not sampled.
        first_frame_counts: numbers of first frames that end with a chunk, ascending.
    """

    partition: ChunkPartition
    given: int
    first_frame_counts: tuple[int, ...]

    @classmethod
    def of(cls, request: CausalVideoRequest, layout: ModelLayout) -> ChunkPlan:
        """Plan a request, or raise a ValueError if its chunks or first frames do not fit."""
        partition, factor = request.partition(layout), layout.temporal_factor
        ends = tuple(factor * (end - 1) + 1 for end in partition.ends[1:-1])
        return cls(partition, request.first_chunk(layout), ends)

    def most_first_frames(self, available: int) -> int:
        """Return the most first frames, out of those available, that end with a chunk.

        Raises:
            ValueError: there are none.
        """
        fitting = [count for count in self.first_frame_counts if count <= available]
        if not fitting:
            numbers = ", ".join(map(str, self.first_frame_counts))
            raise ValueError(
                f"first frames must end with a chunk before the last one: {available} can be "
                f"taken, and chunk_partition {self.partition.sizes} allows "
                f"{numbers or 'none, as it is one chunk'}"
            )
        return fitting[-1]

    def steps(self, budget: StepBudget) -> list[int]:
        """Return the evaluations of each chunk; those of chunks that are given are not read.

        Raises:
            ValueError: the budget is of more chunks than are sampled.
        """
        steps = steps_of_chunks(budget, len(self.partition) - self.given)
        return [steps[0]] * self.given + steps

    def num_evaluations(self, budget: StepBudget) -> int:
        """Return the evaluations of all chunks that are sampled."""
        return sum(self.steps(budget)[self.given :])
