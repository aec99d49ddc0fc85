"""Schedulers for flow-map sampling and training."""

from anyflow.schedulers.flow_map_euler import FlowMapEulerDiscreteScheduler, FlowMapEulerDiscreteSchedulerOutput
from anyflow.schedulers.shift import invert_shift, shift_times

__all__ = [
    "FlowMapEulerDiscreteScheduler",
    "FlowMapEulerDiscreteSchedulerOutput",
    "invert_shift",
    "shift_times",
]
