"""Encode the prompts that a run samples from: captions of its data, or given texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import pad

from anyflow.data import VideoDataset
from anyflow.formats.hub import local_folder
from anyflow.training.distributed import Mesh, main_result

if TYPE_CHECKING:
    from anyflow.training.config import Recipe
    from anyflow.training.preview import PreviewConfig
    from anyflow.training.sample_metrics import MetricsConfig


@dataclass(frozen=True)
class Prompt:
    """Hold a text and its encoding.

    Args:
        caption: the text.
        embeds: ``[1, S, text_dim]`` on the CPU.
        sample: index of the sample of the data whose caption this is; None for a given text.
    """

    caption: str
    embeds: Tensor
    sample: int | None = None


@dataclass(frozen=True)
class SampledPrompts:
    """Hold the prompts of a run's previews and of its metrics; none where one is turned off."""

    preview: tuple[Prompt, ...] = ()
    metrics: tuple[Prompt, ...] = ()


def sampled_prompts(recipe: Recipe, mesh: Mesh, dataset: VideoDataset) -> SampledPrompts:
    """Make the prompts that a run samples from. Collective.

    Given texts are encoded once, by the text encoder of ``preview.model``, which is then
    dropped; the captions of the data are those of samples spread evenly over it.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        dataset: gives captions, and the shape of encoded prompts.

    Raises:
        ValueError: the text encoder cannot be loaded, or does not fit the data; on every rank.
    """
    parts = [part for part in (recipe.preview, recipe.metrics) if part.every]
    texts = dict.fromkeys(text for part in parts for text in part.prompts)
    encoded: dict[str, Prompt] = {}
    if texts:
        encoded = main_result(mesh, lambda: _encoded(recipe, mesh, dataset, tuple(texts)))

    def chosen(part: PreviewConfig | MetricsConfig) -> tuple[Prompt, ...]:
        if not part.every:
            return ()
        if part.prompts:
            return tuple(encoded[text] for text in part.prompts)
        return data_prompts(dataset, part.num_samples)

    return SampledPrompts(chosen(recipe.preview), chosen(recipe.metrics))


def data_prompts(dataset: VideoDataset, count: int) -> tuple[Prompt, ...]:
    """Return the captions of ``count`` samples, or of all where there are fewer."""
    samples = spread_samples(dataset, count)
    return tuple(
        Prompt(dataset.caption(sample), dataset[sample].prompt_embeds[None], sample)
        for sample in samples
    )


def spread_samples(dataset: VideoDataset, count: int) -> list[int]:
    """Choose ``count`` samples spread evenly over the data, or all where there are fewer."""
    count = min(count, len(dataset))
    return [i * len(dataset) // count for i in range(count)]


def _encoded(
    recipe: Recipe, mesh: Mesh, dataset: VideoDataset, texts: Sequence[str]
) -> dict[str, Prompt]:
    """Encode texts as ``anyflow preprocess`` does unless it is told otherwise."""
    import torch

    from anyflow.data.encoders import TextEncoder

    model, (length, width) = recipe.preview.model, dataset.text_shape
    assert model is not None
    try:
        folder = local_folder(model, ("text_encoder/*", "tokenizer/*"))
        encoder = TextEncoder(folder, mesh.device, dtype=torch.bfloat16, text_length=length)
    except ValueError as error:
        raise ValueError(f"preview.model: {error}") from None
    if encoder.text_dim != width:
        raise ValueError(
            f"preview.model: the text encoder of {model} has width {encoder.text_dim}, the data's "
            f"prompts {width}"
        )
    prompts = {}
    for text in texts:
        tokens = encoder(text)
        prompts[text] = Prompt(text, pad(tokens, (0, 0, 0, length - len(tokens)))[None])
    return prompts
