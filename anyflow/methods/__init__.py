"""Compute the losses and rollouts of training, without files, optimizer or global randomness."""

from anyflow.methods.balance import DiffusionBalance
from anyflow.methods.causal import CausalConfig
from anyflow.methods.dmd2 import DMD2Config, DMD2Method, RolloutDraw, dmd_gradient
from anyflow.methods.on_policy import AnyFlowOnPolicyMethod, OnPolicyConfig
from anyflow.methods.output import LossOutput
from anyflow.methods.pretrain import AnyFlowPretrainMethod
from anyflow.methods.pretrain_config import PretrainConfig
from anyflow.methods.time_pairs import TimePairs, sample_time_pairs

__all__ = [
    "AnyFlowOnPolicyMethod",
    "AnyFlowPretrainMethod",
    "CausalConfig",
    "DMD2Config",
    "DMD2Method",
    "DiffusionBalance",
    "LossOutput",
    "OnPolicyConfig",
    "PretrainConfig",
    "RolloutDraw",
    "TimePairs",
    "dmd_gradient",
    "sample_time_pairs",
]
