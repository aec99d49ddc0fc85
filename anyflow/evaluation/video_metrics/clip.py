"""Measure the similarity of videos to texts by CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.evaluation.video_metrics.models import CLIP, model_problem
from anyflow.evaluation.video_metrics.values import levels, unit_videos
from anyflow.utils.documents import shortened
from anyflow.utils.validation import brief, require_whole


class Clip:
    """Measure how well videos show what texts say, by CLIP (Radford et al. 2021, arXiv 2103.00020).

    Frames are resized, cropped and normalized as ``preprocessor_config.json`` of the model says, by
    Pillow as in OpenAI's own code. Values of different CLIP models do not compare.

    Args:
        folder: holds a model that ``transformers.CLIPModel`` loads, its tokenizer and its image
            processor; ``model_path("clip")`` is the usual one. Nothing is downloaded.
        device: device of the model.
        dtype: dtype of the model's weights.

    Raises:
        ValueError: a file is missing or cannot be loaded, or weights are missing from it.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        problem = model_problem("CLIP", CLIP, Path(folder))
        if problem is not None:
            raise ValueError(problem)
        try:
            self._processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            model, info = CLIPModel.from_pretrained(
                folder, local_files_only=True, dtype=dtype, output_loading_info=True
            )
        except (
            Exception
        ) as error:  # transformers, safetensors and tokenizers raise errors of many kinds
            reason = brief(" ".join(str(error).split()), 300)
            raise ValueError(
                f"the CLIP model in {shortened(folder)} cannot be loaded: {reason}"
            ) from error
        if lacking := sorted(info["missing_keys"]):
            names = ", ".join(lacking[:3]) + (
                f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            )
            raise ValueError(f"the CLIP model in {shortened(folder)} lacks the weights {names}")
        self._model = model.eval().requires_grad_(False).to(device)
        self._device, self._dtype = torch.device(device), dtype

    def __call__(self, videos: Tensor, texts: Sequence[str], *, batch_size: int = 32) -> Tensor:
        """Compute the cosine similarity of each video to its text: the mean over its frames.

        Args:
            videos: ``[N, F, C, H, W]``, floating-point in [0, 1] or uint8; C is 1 or 3.
            texts: N texts. What lies beyond the length of the model, 77 tokens, is not read.
            batch_size: frames, and texts, in one call of the model.

        Returns:
            ``[N]`` float32 on the CPU, in [-1, 1]; higher is closer. CLIPScore (Hessel et al. 2021,
            arXiv 2104.08718) is 100 times this in torchmetrics, and 0 where this is negative.

        Raises:
            ValueError: another number of texts, values that are no text, a batch size below 1, or
                videos of another shape, dtype or range.
        """
        frames = levels(unit_videos(videos))
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts must be a list of texts, got {brief(texts)}")
        if len(texts) != len(frames):
            raise ValueError(f"texts must be as many as videos, {len(frames)}, got {len(texts)}")
        require_whole("batch_size", batch_size)
        wanted = torch.cat(
            [self._text_embeds(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
        )
        flat = frames.flatten(0, 1).expand(-1, 3, -1, -1).cpu()
        shown = torch.cat([self._image_embeds(piece) for piece in flat.split(batch_size)])
        similarity = torch.einsum("nfd,nd->nf", shown.unflatten(0, frames.shape[:2]), wanted)
        return similarity.mean(dim=1)

    @torch.inference_mode()
    def _text_embeds(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors ``[B, D]`` float32 of texts."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        features = self._model.get_text_features(
            input_ids=tokens["input_ids"].to(self._device),
            attention_mask=tokens["attention_mask"].to(self._device),
        )
        return _unit(features.pooler_output)

    @torch.inference_mode()
    def _image_embeds(self, frames: Tensor) -> Tensor:
        """Return unit vectors ``[B, D]`` float32 of ``frames[B, 3, H, W]`` uint8."""
        from PIL import Image

        images = [
            Image.fromarray(frame) for frame in frames.permute(0, 2, 3, 1).contiguous().numpy()
        ]
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"]
        features = self._model.get_image_features(pixel_values=pixels.to(self._device, self._dtype))
        return _unit(features.pooler_output)


def _unit(features: Tensor) -> Tensor:
    embeds = F.normalize(features.float().cpu(), dim=-1)
    if not torch.isfinite(embeds).all():
        raise ValueError(
            "the CLIP model gives NaN or infinity; float16 overflows, use float32 or bfloat16"
        )
    return embeds
