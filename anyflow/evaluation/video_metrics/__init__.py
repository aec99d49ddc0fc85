"""Measure videos: similarity to text and references, motion, flicker, distance between sets.

Videos are ``[N, F, C, H, W]`` throughout, floating-point in [0, 1] or uint8 in 0..255, with 1 or 3
channels; results are per video, ``[N]``, unless a function says otherwise. Packages that a base
installation does not have are imported by what needs them.
"""

from anyflow.evaluation.video_metrics.clip import Clip
from anyflow.evaluation.video_metrics.flow import (
    dynamic_degree,
    flow_peaks,
    is_dynamic,
    optical_flow,
)
from anyflow.evaluation.video_metrics.fvd import I3DFeatures, frechet_video_distance
from anyflow.evaluation.video_metrics.lpips import Lpips, video_reference_metrics
from anyflow.evaluation.video_metrics.lucas_kanade import motion, relative_motion
from anyflow.evaluation.video_metrics.models import (
    VIDEO_METRICS,
    VideoMetric,
    available_metrics,
    load_network,
    model_path,
    models_folder,
)
from anyflow.evaluation.video_metrics.pixels import MAX_PSNR, flicker, psnr

__all__ = [
    "MAX_PSNR",
    "VIDEO_METRICS",
    "Clip",
    "I3DFeatures",
    "Lpips",
    "VideoMetric",
    "available_metrics",
    "dynamic_degree",
    "flicker",
    "flow_peaks",
    "frechet_video_distance",
    "is_dynamic",
    "load_network",
    "model_path",
    "models_folder",
    "motion",
    "optical_flow",
    "psnr",
    "relative_motion",
    "video_reference_metrics",
]
