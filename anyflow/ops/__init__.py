"""Provide the fused operators of a flow-map transformer, each with an eager reference.

The references accumulate in fp32. Each operator is a function and, where it stands for a layer, a
module. Import both from here; :mod:`anyflow.ops.backend` decides which implementation runs.
"""

from anyflow.ops.attention import attention
from anyflow.ops.backend import BackendChoice, backend_report, use_backend
from anyflow.ops.dual_timestep_embedding import dual_timestep_embedding
from anyflow.ops.flow_map_inputs import flow_map_batch, flow_map_inputs
from anyflow.ops.flow_map_loss import flow_map_loss
from anyflow.ops.gated_residual import gated_residual
from anyflow.ops.gelu import gelu
from anyflow.ops.layer_norm_modulate import layer_norm_modulate
from anyflow.ops.linear import linear
from anyflow.ops.modules import (
    DotProductAttention,
    GatedResidual,
    GELUTanh,
    LayerNormModulate,
    Linear,
    ResidualLayerNorm,
    RMSNormRope,
)
from anyflow.ops.residual_layer_norm import residual_layer_norm
from anyflow.ops.rms_norm_rope import rms_norm_rope

__all__ = [
    "BackendChoice",
    "DotProductAttention",
    "GELUTanh",
    "GatedResidual",
    "LayerNormModulate",
    "Linear",
    "RMSNormRope",
    "ResidualLayerNorm",
    "attention",
    "backend_report",
    "dual_timestep_embedding",
    "flow_map_batch",
    "flow_map_inputs",
    "flow_map_loss",
    "gated_residual",
    "gelu",
    "layer_norm_modulate",
    "linear",
    "residual_layer_norm",
    "rms_norm_rope",
    "use_backend",
]
