"""Measures videos: similarity to text and to references, motion, flicker, distance between sets.

Videos are ``[N, F, C, H, W]`` throughout, floating-point in [0, 1] or uint8 in 0..255, with 1 or 3
channels; results are per video, ``[N]``, unless a function says otherwise.
"""

from anyflow.evaluation.video_metrics.flow import dynamic_degree, flow_peaks, is_dynamic, optical_flow
from anyflow.evaluation.video_metrics.lucas_kanade import motion
from anyflow.evaluation.video_metrics.pixels import flicker, psnr

__all__ = ["dynamic_degree", "flicker", "flow_peaks", "is_dynamic", "motion", "optical_flow", "psnr"]
