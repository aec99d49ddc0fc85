"""Provide Wan's transformer behind the call of diffusers' class: channels first, one time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from anyflow.models.diffusers_typing import register_to_config
from anyflow.models.transformer import AnyFlowTransformer3DModel
from anyflow.utils.validation import brief


class WanTransformer3DModel(AnyFlowTransformer3DModel):
    """Run the plain path of :class:`AnyFlowTransformer3DModel` in diffusers' Wan pipelines.

    Settings, parameter names and call are those of diffusers' class of the same name (proven by
    ``tests/pipelines/test_acceleration.py``), so folders interchange both ways.

    Raises:
        ValueError: ``added_kv_proj_dim`` or ``pos_embed_seq_len`` is set (image-to-video with image
            tokens), ``qk_norm`` is another one, or a size is not possible.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
    ) -> None:
        for name, value in (
            ("added_kv_proj_dim", added_kv_proj_dim),
            ("pos_embed_seq_len", pos_embed_seq_len),
        ):
            if value is not None:
                raise ValueError(
                    f"{name}={brief(value)}: Wan models with image attention are not supported, "
                    f"only {name}=None"
                )
        if qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm must be 'rms_norm_across_heads', got {brief(qk_norm)}")
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            eps=eps,
            image_dim=image_dim,
            rope_max_seq_len=rope_max_seq_len,
            r_embedder=False,
        )

    def forward(  # type: ignore[override]  # the call of another class of diffusers
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the velocity at t, as :meth:`AnyFlowTransformer3DModel.forward` without r.

        Args:
            hidden_states: ``[B, C, F, H, W]``, channels first, as the result.
            timestep: ``[B]``, or ``[B, L]`` for every token (Wan 2.2, 5B), equal within a frame.
            encoder_hidden_states: ``[B, S, text_dim]``.
            encoder_hidden_states_image: ``[B, S', image_dim]``, put before the text.
            return_dict: False returns a 1-tuple.
            attention_kwargs: ``{"scale": s}`` scales LoRA adapters.

        Raises:
            ValueError: shapes do not fit, or a frame's tokens have different times.
        """
        frames_first = hidden_states.transpose(1, 2)
        if timestep.ndim == 2:
            timestep = _frame_times(timestep, self._token_grid(frames_first))
        sample = super().forward(
            frames_first,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            encoder_hidden_states_image=encoder_hidden_states_image,
            attention_kwargs=attention_kwargs,
            return_dict=False,
        )[0]
        sample = sample.transpose(1, 2)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def cache_context(self, name: str, **context: Any) -> AbstractContextManager[None]:
        """Return a block that does nothing: Wan's pipeline opens one around each call."""
        return nullcontext()


def _frame_times(timestep: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Return the times of frames, ``[B, F]``, of those of tokens, ``[B, L]``."""
    frames, height, width = grid
    if timestep.shape[1] != frames * height * width:
        raise ValueError(
            f"timestep must be [B] or [B, L={frames * height * width}], got {tuple(timestep.shape)}"
        )
    times = timestep.unflatten(1, (frames, height * width))
    if (times != times[:, :, :1]).any():
        raise ValueError("timestep: the tokens of a frame must have one time")
    return times[:, :, 0]
