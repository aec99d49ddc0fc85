"""Check that the networks of a run take its data, before anything is trained."""

from __future__ import annotations

from anyflow.data import VideoDataset
from anyflow.methods.causal import CausalConfig, training_partition
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.training.config import Recipe


def check_data(network: AnyFlowTransformer3DModel, dataset: VideoDataset, name: str) -> None:
    """Raise a ValueError unless a network takes the data's latents and prompts.

    Args:
        network: on any device.
        dataset: the training data.
        name: names the network in the error.
    """
    config = network.config
    frames, channels, height, width = dataset.latent_shape
    out_channels = config.in_channels if config.out_channels is None else config.out_channels
    if not channels == config.in_channels == out_channels:
        raise ValueError(
            f"the data's latents have {channels} channels, "
            f"the {name} takes {config.in_channels} and gives {out_channels}"
        )
    for axis, size, patch in zip(
        ("frames", "rows", "columns"), (frames, height, width), config.patch_size, strict=True
    ):
        if size % patch or size // patch > config.rope_max_seq_len:
            raise ValueError(
                f"the data's latents have {size} {axis}; the {name} takes multiples of {patch} up "
                "to "
                f"{patch * config.rope_max_seq_len}"
            )
    if dataset.text_shape[1] != config.text_dim:
        raise ValueError(
            f"the data's prompts have width {dataset.text_shape[1]}, the {name} takes "
            f"text_dim={config.text_dim}"
        )


def check_chunks(student: AnyFlowTransformer3DModel, dataset: VideoDataset, recipe: Recipe) -> None:
    """Raise a ValueError unless a causal student's chunks make up the data's videos.

    Args:
        student: the causal model, on any device.
        dataset: the training data.
        recipe: the run; its settings of the student and of the losses give the chunks.
    """
    assert isinstance(student, AnyFlowFARTransformer3DModel)
    frames, _, height, width = dataset.latent_shape
    given: dict[str, CausalConfig | None] = {"pretrain.causal": recipe.pretrain.causal}
    if recipe.on_policy is not None:
        given["on_policy.method.causal"] = recipe.on_policy.method.causal
    for name, causal in given.items():
        assert causal is not None
        partition = training_partition(student, causal)
        if partition.num_frames != frames:
            source = "student" if causal.chunk_partition is None else name
            raise ValueError(
                f"the data's latents have {frames} frames, and the chunks {partition.sizes} of "
                f"the {source} have {partition.num_frames}: give chunks of all frames as "
                f"{name}.chunk_partition"
            )
        compressed = partition.num_compressed(student.config.full_chunk_limit) > 0
        try:
            student.check_size(height, width, compressed=compressed)
        except ValueError as error:
            raise ValueError(f"the data's latents do not fit the student: {error}") from None
