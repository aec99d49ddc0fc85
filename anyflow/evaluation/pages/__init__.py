"""Writes the page of an evaluation: videos, curves with intervals, checkpoints compared, and all
the numbers.
"""

from anyflow.evaluation.pages.page import write_evaluation_report

__all__ = ["write_evaluation_report"]
