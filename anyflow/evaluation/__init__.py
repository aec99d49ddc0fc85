"""Metrics, plots and the HTML report, as small functions that work on any videos.

Plotting and report dependencies (matplotlib, pillow, jinja2) are imported by the functions that need them.
"""

from anyflow.evaluation.findings import findings, takeaway
from anyflow.evaluation.metrics import (
    Evaluator,
    Metrics,
    RandomConv3dFeatures,
    coverage_tv,
    frechet_distance,
    nearest_template,
    nearest_template_mse,
    per_class_frechet_distance,
)
from anyflow.evaluation.plots import (
    any_step_figure,
    encode_animation,
    figure_svg,
    save_animation,
    save_figure,
    tile_videos,
)
from anyflow.evaluation.report import RecipeStage, ReportData, write_report
from anyflow.evaluation.results import EvaluationResults

__all__ = [
    "EvaluationResults",
    "Evaluator",
    "Metrics",
    "RandomConv3dFeatures",
    "RecipeStage",
    "ReportData",
    "any_step_figure",
    "coverage_tv",
    "encode_animation",
    "figure_svg",
    "findings",
    "frechet_distance",
    "nearest_template",
    "nearest_template_mse",
    "per_class_frechet_distance",
    "save_animation",
    "save_figure",
    "takeaway",
    "tile_videos",
    "write_report",
]
