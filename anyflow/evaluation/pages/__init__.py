"""Write the page of an evaluation: videos, curves, compared checkpoints and all numbers."""

from anyflow.evaluation.pages.page import write_evaluation_report

__all__ = ["write_evaluation_report"]
