"""Data: the procedural video set of the quickstart and the space-time packing that stands in for a VAE there."""

from anyflow.data.moving_shapes import MovingShapes, MovingShapesConfig
from anyflow.data.space_time import pixel_shuffle_3d, pixel_unshuffle_3d

__all__ = ["MovingShapes", "MovingShapesConfig", "pixel_shuffle_3d", "pixel_unshuffle_3d"]
