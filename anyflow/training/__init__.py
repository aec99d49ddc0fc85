"""Training building blocks. The engine that runs recipes on many GPUs is not here yet."""

from anyflow.training.ema import EMA

__all__ = ["EMA"]
