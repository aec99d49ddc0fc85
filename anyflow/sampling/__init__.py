"""Sample by the any-step flow map: whole videos, or chunk by chunk with the causal model."""

from anyflow.sampling.any_step import sample, sample_consistency
from anyflow.sampling.causal import ChunkSampler, sample_causal
from anyflow.sampling.network import Callback, Schedule

__all__ = [
    "Callback",
    "ChunkSampler",
    "Schedule",
    "sample",
    "sample_causal",
    "sample_consistency",
]
