"""Check the tensors and texts of a call, before a weight is loaded or a network run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anyflow.pipelines.request import MAX_SEED
from anyflow.utils.rng import randn_like
from anyflow.utils.validation import brief, whole_number

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class PromptInputs:
    """Hold the prompts of a call, each kind as texts or as embeddings ``[B, S, text_dim]``.

    Attributes:
        prompts: texts to encode.
        embeds: embeddings in place of the texts.
        negative_prompts: texts to encode; both negative fields are empty without guidance.
        negative_embeds: embeddings in place of those texts.
        count: number of prompts.
        negative_count: number of negative prompts.
    """

    prompts: list[str]
    embeds: Tensor | None
    negative_prompts: list[str]
    negative_embeds: Tensor | None
    count: int
    negative_count: int

    @classmethod
    def checked(
        cls,
        prompt: str | Sequence[str] | None,
        embeds: Tensor | None,
        negative_prompt: str | Sequence[str] | None,
        negative_embeds: Tensor | None,
        text_dim: int,
    ) -> PromptInputs:
        """Check the prompts; the negative prompt is the empty text if it is left out.

        Raises:
            ValueError: no prompt is given, or something else than texts or embeddings.
        """
        count = _count_texts("prompt", prompt, embeds, text_dim)
        if count is None:
            raise ValueError("give prompt or prompt_embeds")
        negatives = _count_texts("negative_prompt", negative_prompt, negative_embeds, text_dim)
        if negatives is None:
            negative_prompt, negatives = "", 1
        return cls(
            listed(prompt), embeds, listed(negative_prompt), negative_embeds, count, negatives
        )

    def without_negatives(self) -> PromptInputs:
        """Return the prompts alone, as they are used without guidance."""
        return replace(self, negative_prompts=[], negative_embeds=None)

    def length(self, max_sequence_length: int) -> int:
        """Return the tokens of a prompt; texts have the length given."""
        return max_sequence_length if self.embeds is None else self.embeds.shape[1]

    def require_one_length(self, max_sequence_length: int) -> None:
        """Raise a ValueError unless all prompts can be one batch; texts have the length given."""
        length = self.length(max_sequence_length)
        other = length
        if self.negative_prompts:
            other = max_sequence_length
        elif self.negative_embeds is not None:
            other = self.negative_embeds.shape[1]
        if length != other:
            raise ValueError(
                f"prompts are {length} tokens long, but negative prompts {other}; make them equal"
            )


@dataclass(frozen=True)
class PromptSwitches:
    """Hold the prompts of later chunks, by the number of the first chunk that each is for.

    Attributes:
        texts: one text, or one for each prompt, to encode.
        embeds: embeddings ``[B or 1, S, text_dim]`` in place of texts.
    """

    texts: dict[int, list[str]]
    embeds: dict[int, Tensor]

    @classmethod
    def checked(
        cls,
        given: Any,
        prompts: PromptInputs,
        text_dim: int,
        max_sequence_length: int,
        chunks: range,
    ) -> PromptSwitches:
        """Check the switches of a call.

        Args:
            given: a mapping of numbers of chunks to texts or embeddings, or None.
            prompts: those of the call.
            text_dim: width of the embeddings.
            max_sequence_length: tokens of a text.
            chunks: those that are sampled.

        Raises:
            ValueError: they are something else, or do not fit the prompts or the chunks.
        """
        switches = cls({}, {})
        if given is None:
            return switches
        if not isinstance(given, Mapping):
            raise ValueError(
                "prompt_switches must be texts or embeddings by the numbers of chunks, such as "
                f"{{3: 'a new text'}}, got {brief(given)}"
            )
        length = prompts.length(max_sequence_length)
        for key, value in given.items():
            name = f"prompt_switches[{brief(key)}]"
            try:
                chunk = whole_number("a key of prompt_switches", key, chunks.start, chunks.stop - 1)
            except ValueError as error:
                raise ValueError(f"{error}: the chunks that are sampled") from None
            embeds = value if isinstance(value, Tensor) else None
            texts = None if embeds is not None else value
            count = _count_texts(name, texts, embeds, text_dim, name)
            if count is None:
                raise ValueError(f"{name} must be a text, a list of texts or a tensor, got None")
            tokens = max_sequence_length if embeds is None else embeds.shape[1]
            if count not in (1, prompts.count):
                raise ValueError(
                    f"{name} must be one or as many as the {prompts.count} prompts, got {count}"
                )
            if tokens != length:
                raise ValueError(
                    f"prompts are {length} tokens long, but {name} {tokens}; make them equal"
                )
            if embeds is None:
                switches.texts[chunk] = listed(texts)
            else:
                switches.embeds[chunk] = embeds
        return switches

    @property
    def all_texts(self) -> list[str]:
        """Return the texts of all chunks, to be encoded together."""
        return [text for texts in self.texts.values() for text in texts]

    def encoded(self, encoded: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return embeddings by chunks, those of :attr:`all_texts` being given."""
        remaining = iter(encoded)
        of_texts = {
            chunk: torch.cat([next(remaining) for _ in texts])
            for chunk, texts in self.texts.items()
        }
        return of_texts | self.embeds


def listed(texts: str | Sequence[str] | None) -> list[str]:
    """Return a text, several or none as a list."""
    return [] if texts is None else [texts] if isinstance(texts, str) else list(texts)


def _count_texts(
    name: str,
    texts: str | Sequence[str] | None,
    embeds: Tensor | None,
    text_dim: int,
    embeds_name: str | None = None,
) -> int | None:
    """Count texts, or embeddings ``[B, S, text_dim]``; None without any.

    Args:
        name: name of the texts, for errors.
        texts: given.
        embeds: given in place of them.
        text_dim: width of embeddings.
        embeds_name: name of the embeddings; None takes that of the texts with ``_embeds``.

    Raises:
        ValueError: something else is given.
    """
    if texts is not None and embeds is not None:
        raise ValueError(f"give either {name} or {name}_embeds, not both")
    embeds_name = f"{name}_embeds" if embeds_name is None else embeds_name
    if embeds is not None:
        expected = f"{embeds_name} must be a floating-point tensor [B, S, {text_dim}]"
        if not isinstance(embeds, Tensor):
            raise ValueError(f"{expected}, got {brief(embeds)}")
        if (
            embeds.ndim != 3
            or embeds.numel() == 0
            or embeds.shape[2] != text_dim
            or not embeds.is_floating_point()
        ):
            raise ValueError(f"{expected}, got {tuple(embeds.shape)} {embeds.dtype}")
        require_finite_samples(embeds_name, embeds)
        return embeds.shape[0]
    if texts is None:
        return None
    several = texts if isinstance(texts, (list, tuple)) else [texts]
    if not several or not all(isinstance(text, str) for text in several):
        raise ValueError(f"{name} must be a text or a list of texts, got {brief(texts)}")
    for text in several:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{name} has a lone surrogate, which is no character: {brief(text)}")
    return len(several)


def require_finite_samples(name: str, tensor: Tensor) -> None:
    """Raise a ValueError if a tensor holds NaN or infinity; the host waits for the device."""
    bad = (~torch.isfinite(tensor)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} holds NaN or infinity in sample {bad[0] + 1} of {len(tensor)}; encoders "
            "overflow in float16: use bf16"
        )


def initial_noise(
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    seed: int | None,
    generator: Generators | None,
    latents: Tensor | None,
) -> Tensor:
    """Draw or take the noise ``[B, F', C, h, w]`` that sampling starts from, fp32 at least.

    Args:
        shape: shape of the result, frames first.
        device: device of the result.
        seed: seed of one generator for the batch.
        generator: one for the batch, or a list with one for each video, whose draws do not depend
            on the others. They draw on their own devices, ``[B, C, F', h, w]`` as diffusers'
            pipelines do.
        latents: ``[B, C, F', h, w]``, taken in place of a draw; a generator beside them draws
            nothing.

    Raises:
        ValueError: a seed is given beside another one, a list has another length, or one is not
            what it should be.
    """
    if seed is not None and not (generator is None and latents is None):
        raise ValueError("give one of seed, generator and latents")
    batch_size, frames, *rest = shape
    channels_first = (rest[0], frames, *rest[1:])
    if latents is not None:
        return _given_noise(latents, (batch_size, *channels_first), device)
    if isinstance(generator, (list, tuple)):
        if not all(isinstance(g, torch.Generator) for g in generator):
            raise ValueError(
                f"generator must be a torch.Generator or a list of them, got {brief(generator)}"
            )
        if len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)} for {batch_size} videos: give one for "
                "each video"
            )
        like = torch.empty(1, *channels_first, device=device)
        return torch.cat([randn_like(like, g) for g in generator]).transpose(1, 2)
    if seed is not None:
        generator = torch.Generator().manual_seed(whole_number("seed", seed, 0, MAX_SEED))
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be a torch.Generator or a list of them, got {brief(generator)}"
        )
    like = torch.empty(batch_size, *channels_first, device=device)
    return randn_like(like, generator).transpose(1, 2)


def _given_noise(latents: Tensor, expected: tuple[int, ...], device: torch.device) -> Tensor:
    """Return noise that the caller gives, ``[B, C, F', h, w]``, with the frames first."""
    tensor = isinstance(latents, Tensor)
    if not tensor or latents.shape != expected or not latents.is_floating_point():
        got = f"{tuple(latents.shape)} {latents.dtype}" if tensor else brief(latents)
        raise ValueError(
            f"latents must be [B, C, F', h, w] = {expected} (channels first) floating point, "
            f"got {got}"
        )
    return latents.to(device, torch.promote_types(latents.dtype, torch.float32)).transpose(1, 2)


def checked_first_frames(
    latents: Tensor | None, shape: tuple[int, ...], batch_size: int
) -> Tensor | None:
    """Check the latents of first frames, ``[B or 1, fewer than F', C, h, w]``; None without any.

    Args:
        latents: given.
        shape: shape of the videos' latents.
        batch_size: number of prompts, B.

    Raises:
        ValueError: they are something else, or hold NaN or infinity.
    """
    if latents is None:
        return None
    fits = (
        isinstance(latents, Tensor)
        and latents.ndim == 5
        and latents.is_floating_point()
        and latents.numel() > 0
    )
    if not fits or latents.shape[0] not in (1, batch_size) or latents.shape[2:] != shape[2:]:
        got = (
            f"{tuple(latents.shape)} {latents.dtype}"
            if isinstance(latents, Tensor)
            else brief(latents)
        )
        raise ValueError(
            f"video_latents must be [B={batch_size} or 1, fewer than F'={shape[1]}, "
            f"{', '.join(map(str, shape[2:]))}] floating point, got {got}"
        )
    if latents.shape[1] >= shape[1]:
        raise ValueError(
            f"video_latents must have fewer than the {shape[1]} latent frames, got "
            f"{latents.shape[1]}"
        )
    require_finite_samples("video_latents", latents)
    return latents
