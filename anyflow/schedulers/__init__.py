"""Schedulers for flow-map sampling and training."""

from anyflow.schedulers.flow_map_euler import (
    MAX_STEPS,
    FlowMapEulerDiscreteScheduler,
    FlowMapEulerDiscreteSchedulerOutput,
)
from anyflow.schedulers.shift import invert_shift, shift_times

__all__ = [
    "MAX_STEPS",
    "FlowMapEulerDiscreteScheduler",
    "FlowMapEulerDiscreteSchedulerOutput",
    "invert_shift",
    "shift_times",
]
