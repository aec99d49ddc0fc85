"""Provide the schedulers of flow-map sampling and training."""

from anyflow.schedulers.config import SchedulerConfig
from anyflow.schedulers.flow_map_euler import (
    FlowMapEulerDiscreteScheduler,
    FlowMapEulerDiscreteSchedulerOutput,
)
from anyflow.schedulers.schedule import MAX_STEPS
from anyflow.schedulers.shift import invert_shift, shift_times

__all__ = [
    "MAX_STEPS",
    "FlowMapEulerDiscreteScheduler",
    "FlowMapEulerDiscreteSchedulerOutput",
    "SchedulerConfig",
    "invert_shift",
    "shift_times",
]
