"""Lists the sections of a run, and the order in which each plan runs them."""

from __future__ import annotations

from functools import partial

from gpu import checks, external, kernels, models, operator_tests, training
from gpu.context import Section

# The operators that the networks run on kernels (proven by tests/benchmarks/test_run_gpu_parts.py).
FORWARD = (
    *("attention", "dual_timestep_embedding", "gated_residual", "gelu", "layer_norm_modulate", "linear"),
    *("residual_layer_norm", "rms_norm_rope"),
)
PRETRAIN = (*FORWARD, "flow_map_inputs", "flow_map_loss")

_forward, _sampling = models.run_forward, models.run_sampling
# Seconds on an H100 or H200 with its software read once, compilation included.
SECTIONS = (
    Section("checks", "is what runs on this device right?", 45, checks.run_checks, resumes=True),
    Section("limits", "bf16 matrix products and a copy", 5, kernels.run_limits),
    Section("forward_1.3b", "one forward at 1.3B, 480x832x81", 80, partial(_forward, name="1.3B"), FORWARD),
    Section("attention", "every attention backend", 5, kernels.run_attention),
    Section("sampling_1.3b", "samples at 1.3B", 12, partial(_sampling, name="1.3B"), FORWARD),
    Section("sampling_14b", "samples at 14B", 60, partial(_sampling, name="14B"), FORWARD),
    Section("forward_14b", "one forward at 14B, 480x832x81", 55, partial(_forward, name="14B"), FORWARD),
    Section("pretrain_1.3b", "a pretrain step at 1.3B", 85, training.run_pretrain, PRETRAIN),
    Section("on_policy_1.3b", "a generator and a critic step at 1.3B", 120, training.run_on_policy, FORWARD),
    Section("ops", "every operator", 45, kernels.run_operators, resumes=True),
    Section("profile_1.3b", "where the time of a forward at 1.3B goes", 15, models.run_profile, FORWARD),
    Section("native", "native CUDA kernels against Triton's", 10, kernels.run_native),
    Section("tune_rows", "launch options of the row kernels", 40, external.run_tuner, resumes=True),
    Section("probes", "single questions to the device", 40, external.run_probes),
    Section("tests", "the operators' tests on this device", 30, operator_tests.run_tests),
)
