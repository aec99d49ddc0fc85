"""Measure, draw and describe sets of videos: metrics, plots, animations and the HTML report.

Plotting and report dependencies (matplotlib, pillow, jinja2) are imported by the functions that
need them.
"""

from anyflow.evaluation.animations import (
    any_step_animation,
    encode_animation,
    save_animation,
    tile_videos,
)
from anyflow.evaluation.findings import findings
from anyflow.evaluation.frechet import frechet_distance
from anyflow.evaluation.metrics import (
    Evaluator,
    Metrics,
    RandomConv3dFeatures,
    coverage_tv,
    nearest_template,
    nearest_template_mse,
    per_class_frechet_distance,
)
from anyflow.evaluation.plots import any_step_figure, figure_svg, save_figure
from anyflow.evaluation.report import RecipeStage, ReportData, write_report
from anyflow.evaluation.results import EvaluationResults
from anyflow.evaluation.seeds import SeedResults
from anyflow.evaluation.summary import figure_sentences, main_methods, takeaway

__all__ = [
    "EvaluationResults",
    "Evaluator",
    "Metrics",
    "RandomConv3dFeatures",
    "RecipeStage",
    "ReportData",
    "SeedResults",
    "any_step_animation",
    "any_step_figure",
    "coverage_tv",
    "encode_animation",
    "figure_sentences",
    "figure_svg",
    "findings",
    "frechet_distance",
    "main_methods",
    "nearest_template",
    "nearest_template_mse",
    "per_class_frechet_distance",
    "save_animation",
    "save_figure",
    "takeaway",
    "tile_videos",
    "write_report",
]
