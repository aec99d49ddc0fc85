"""Read training data: encoded latents in a resumable order, and the quickstart's videos.

The readers and writers of files are imported from their modules (``latent_dataset``,
``preprocess``): they need pyarrow and PyAV.
"""

from anyflow.data.loader import TrainingData, open_dataset
from anyflow.data.moving_shapes import MovingShapes, MovingShapesConfig
from anyflow.data.sample import Batch, Sample, VideoDataset
from anyflow.data.space_time import pixel_shuffle_3d, pixel_unshuffle_3d
from anyflow.data.synthetic import SyntheticVideos

__all__ = [
    "VideoDataset",
    "Sample",
    "Batch",
    "open_dataset",
    "TrainingData",
    "SyntheticVideos",
    "MovingShapes",
    "MovingShapesConfig",
    "pixel_shuffle_3d",
    "pixel_unshuffle_3d",
]
