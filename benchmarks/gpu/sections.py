"""The sections of a run, in order of importance."""

from __future__ import annotations

from functools import partial

from gpu import checks, kernels, models, training
from gpu.context import Section

# Seconds on an H200, by the roofline's times at two thirds of the limits, compilation included.
SECTIONS = (
    Section("tests", "the operators against their references on this device", 20, checks.run_checks),
    Section("limits", "bf16 matrix products and a copy", 5, kernels.run_limits),
    Section("forward_1.3b", "one forward at 1.3B, 480x832x81", 20, partial(models.run_forward, name="1.3B")),
    Section("attention", "every attention backend", 8, kernels.run_attention),
    Section("ops", "every operator", 15, kernels.run_operators),
    Section("forward_14b", "one forward at 14B, 480x832x81", 40, partial(models.run_forward, name="14B")),
    Section("sampling_1.3b", "samples at 1.3B", 12, partial(models.run_sampling, name="1.3B")),
    Section("sampling_14b", "samples at 14B", 35, partial(models.run_sampling, name="14B")),
    Section("pretrain_1.3b", "a pretrain step at 1.3B", 50, training.run_pretrain),
    Section("on_policy_1.3b", "a generator and a critic step at 1.3B", 60, training.run_on_policy),
    Section("profile_1.3b", "where the time of a forward at 1.3B goes", 15, models.run_profile),
    Section("native", "native CUDA kernels against Triton's", 15, kernels.run_native),
)
