"""The Wan2.1 video transformer with two timesteps: ``u(x_t, t, r)``, the average velocity between t
and r.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from anyflow.models.attention import require_backend, validated_backend
from anyflow.models.blocks import AnyFlowTransformerBlock, Attention, KeyValue
from anyflow.models.configuration import require_settings, require_sizes
from anyflow.models.diffusers_typing import apply_lora_scale, register_to_config
from anyflow.models.embeddings import (
    ConditionEmbedder,
    OutputProjection,
    PatchEmbedding,
    RotaryEmbedding,
    TimestepEmbedding,
)
from anyflow.models.sequence_parallel import SequenceGroup, TokenSplit
from anyflow.ops import layer_norm_modulate
from anyflow.ops.setting import hold

if TYPE_CHECKING:
    import os

    from typing_extensions import Self


@dataclass(frozen=True)
class TimeEmbedding:
    """Embedded times: ``emb[N, R, D]`` for the output norm, ``modulation[N, R, 6, D]`` for the
    blocks.
    """

    emb: Tensor
    modulation: Tensor

    def __getitem__(self, index: int | slice) -> TimeEmbedding:
        index = slice(index, index + 1) if isinstance(index, int) else index
        return TimeEmbedding(self.emb[index], self.modulation[index])

    def expand(self, batch_size: int) -> TimeEmbedding:
        """One embedding shared by a batch, as a view."""
        return TimeEmbedding(
            self.emb.expand(batch_size, -1, -1),
            self.modulation.expand(batch_size, -1, -1, -1),
        )


@dataclass(frozen=True)
class TextContext:
    """The cross-attention keys and values of every block for one prompt batch, each
    ``[B, S, H, Dh]``.
    """

    key_values: tuple[KeyValue, ...]


class _EqualToPeer(type):
    """Makes a class equal to diffusers' class of its name.

    ``DiffusionPipeline.from_pipe`` hands a component over only where its exact class is that of the
    new pipeline's signature, and otherwise leaves it out with a warning.
    """

    def __eq__(cls, other: object) -> bool:
        if cls is other or not isinstance(other, type):
            return cls is other
        module = str(getattr(other, "__module__", ""))  # of a metaclass it is a descriptor
        return (
            module.startswith("diffusers.models.transformers.") and other.__name__ == cls.__name__
        )

    __hash__ = type.__hash__


class AnyFlowTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, metaclass=_EqualToPeer):
    """Bidirectional flow-map video transformer (AnyFlow, arXiv 2605.13724; architecture Wan2.1).

    Parameter names and positional arguments are those of diffusers' class of the same name (proven
    by ``tests/models/test_parity_diffusers.py``), so it loads the same checkpoints and drops into
    ``diffusers.AnyFlowPipeline``. Differences: a ``[B]`` timestep keeps one modulation row per
    sample, a ``[B, F]`` one keeps one per frame (never one per token); ``r_timestep=None`` is the
    plain single-timestep Wan path; and the velocity has the dtype of the latents given, whose
    projection in runs at least at that precision, and the norm and projection out in fp32.

    Args:
        patch_size: (frames, height, width) of a patch.
        num_attention_heads: H, the number of heads.
        attention_head_dim: Dh, even; the width is D = H Dh.
        in_channels: latent channels C.
        out_channels: channels of the velocity; None means in_channels.
        text_dim: width of the text-encoder states.
        freq_dim: width of the sinusoidal timestep embedding.
        ffn_dim: hidden width of the feed-forward layers.
        num_layers: number of blocks.
        cross_attn_norm: LayerNorm with affine before cross-attention.
        eps: epsilon of every norm.
        image_dim: width of image-encoder states, or None for no image branch.
        rope_max_seq_len: largest number of frames, patch rows or patch columns.
        gate_value: g, the share of the second timestep's embedding.
        deltatime_type: what the second branch embeds, ``"r"`` or ``"t-r"``.
        r_embedder: False builds the plain Wan model, without the second branch.
        r_embedder_fusion: ``"gated"``: ``(1 - g) t + g r``; ``"additive"``: ``t + g r``.

    Raises:
        ValueError: a size is no whole number within ``anyflow.models.configuration.LIMITS``, or
            another setting is not possible.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["patch_embedding", "condition_embedder", "norm"]  # noqa: RUF012
    _no_split_modules = ["AnyFlowTransformerBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["time_embedder", "delta_embedder", "scale_shift_table", "norm2"]  # noqa: RUF012
    _repeated_blocks = ["AnyFlowTransformerBlock"]  # noqa: RUF012

    if TYPE_CHECKING:  # diffusers' bases have these without a usable type
        config: Any

        @classmethod
        def from_pretrained(
            cls, pretrained_model_name_or_path: str | os.PathLike[str], **settings: Any
        ) -> Self: ...

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
        eps: float = 1e-6,
        image_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        gate_value: float = 0.25,
        deltatime_type: str = "r",
        r_embedder: bool = True,
        r_embedder_fusion: str = "gated",
    ) -> None:
        super().__init__()
        require_sizes(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            image_dim=image_dim,
            rope_max_seq_len=rope_max_seq_len,
        )
        require_settings(eps=eps, cross_attn_norm=cross_attn_norm, r_embedder=r_embedder)
        dim = num_attention_heads * attention_head_dim
        channels = in_channels if out_channels is None else out_channels

        self.rope = RotaryEmbedding(attention_head_dim, rope_max_seq_len)
        self.patch_embedding = PatchEmbedding(
            in_channels, dim, kernel_size=patch_size, stride=patch_size
        )
        self.condition_embedder = ConditionEmbedder(dim, freq_dim, text_dim, image_dim)
        if r_embedder:
            delta = TimestepEmbedding(freq_dim, dim)
            self.condition_embedder.set_flow_map(
                delta, gate_value, deltatime_type, r_embedder_fusion
            )
        self.blocks = nn.ModuleList(
            AnyFlowTransformerBlock(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps)
            for _ in range(num_layers)
        )
        self.proj_out = OutputProjection(dim, channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self._sequence: SequenceGroup | None = None

    def enable_flow_map(
        self, gate_value: float = 0.25, deltatime_type: str = "r", fusion: str = "gated"
    ) -> AnyFlowTransformer3DModel:
        """Turn a plain Wan model into a flow map: ``delta_embedder`` becomes a copy of
        ``time_embedder``.

        With ``deltatime_type="r"`` the model is unchanged where r = t. Returns the model itself.

        Raises:
            ValueError: the model already is a flow map, or an option is unknown.
        """
        if self.condition_embedder.delta_embedder is not None:
            raise ValueError("enable_flow_map: this model already has a second timestep branch")
        delta = copy.deepcopy(self.condition_embedder.time_embedder)
        self.condition_embedder.set_flow_map(delta, gate_value, deltatime_type, fusion)
        settings = {
            "r_embedder": True,
            "gate_value": gate_value,
            "deltatime_type": deltatime_type,
            "r_embedder_fusion": fusion,
        }
        # diffusers' from_config ignores settings on this list.
        defaulted = [k for k in self.config.get("_use_default_values", []) if k not in settings]
        self.register_to_config(**settings, _use_default_values=defaulted)
        return self

    def set_attention_backend(self, backend: str | None) -> None:
        """Force this model's attention onto one backend; None or ``"auto"`` returns to the
        automatic choice.

        The names are those of ``anyflow.models.attention``, not diffusers' (whose ``"flash"`` is
        the package that is ``"flash_attn_2"`` here), and other models are left alone. Nearer than
        ``use_attention_backend``.

        Raises:
            ValueError: the name is unknown.
            RuntimeError: the backend is not installed, or does not run on this machine.
        """
        name = (
            None
            if backend is None or backend == "auto"
            else validated_backend(backend, "set_attention_backend: ")
        )
        if name is not None:
            # An offloaded model waits on the CPU for a CUDA device.
            devices = (
                (torch.device("cuda", torch.cuda.current_device()),)
                if torch.cuda.is_available()
                else ()
            )
            require_backend(name, (*devices, self.device))
        for module in self.modules():
            if isinstance(module, Attention):
                module.attention_backend = name

    def reset_attention_backend(self) -> None:
        """As ``set_attention_backend(None)``."""
        self.set_attention_backend(None)

    def set_sequence_parallel(self, group: dist.ProcessGroup | None) -> None:
        """Share every sample's tokens among the ranks of a group, which call the model with the
        same arguments.

        Each rank gets the whole velocity. Its gradients are those of the sum of all ranks' losses
        with respect to what the rank computed, so their mean over the group is the gradient. None,
        or a group of one, turns it off. It is neither in the config nor in the state dict.

        Raises:
            ValueError: the number of ranks does not divide the number of heads, or this process is
                not one of them.
        """
        sequence = None if group is None else SequenceGroup(group)
        if sequence is not None and sequence.rank < 0:
            raise ValueError("set_sequence_parallel: this process is not in the group")
        if sequence is not None and self.config.num_attention_heads % sequence.degree:
            raise ValueError(
                f"sequence parallelism over {sequence.degree} ranks needs a number of attention "
                "heads that it divides, "
                f"got {self.config.num_attention_heads}"
            )
        self._sequence = None if sequence is None or sequence.degree == 1 else sequence

    def embed_time(self, timestep: Tensor, r_timestep: Tensor | None = None) -> TimeEmbedding:
        """Embed times in [0, num_train_timesteps] once, to be reused by many forward calls.

        Args:
            timestep: ``[N]``, or ``[N, F]`` for one time per frame.
            r_timestep: as timestep, or None for the plain single-timestep path.

        Returns:
            :class:`TimeEmbedding` with R = 1 or R = F rows.
        """
        return self._embed_time(timestep, r_timestep)

    def _embed_time(self, timestep: Tensor, r_timestep: Tensor | None) -> TimeEmbedding:
        """Of forward's own: FSDP gathers parameters around the public method, and frees them after
        it.
        """
        rows = timestep.unsqueeze(1) if timestep.ndim == 1 else timestep
        r = None if r_timestep is None else r_timestep.flatten()
        emb, modulation = self.condition_embedder(
            rows.flatten(), r, self._compute_dtype(timestep.device)
        )
        return TimeEmbedding(emb.unflatten(0, rows.shape), modulation.unflatten(0, rows.shape))

    def encode_text(
        self, encoder_hidden_states: Tensor, encoder_hidden_states_image: Tensor | None = None
    ) -> TextContext:
        """Project ``[B, S, text_dim]`` text states to every block's keys and values, to be reused
        by many calls.
        """
        dtype = self._compute_dtype(encoder_hidden_states.device)
        tokens = self.condition_embedder.embed_text(
            encoder_hidden_states, encoder_hidden_states_image, dtype
        )
        return TextContext(
            tuple(cast(AnyFlowTransformerBlock, b).text_key_value(tokens) for b in self.blocks)
        )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        r_timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        *,
        time_embedding: TimeEmbedding | None = None,
        text_context: TextContext | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Average velocity u(x_t, t, r), or the instantaneous velocity of the plain path when
        ``r_timestep`` is None.

        Args:
            hidden_states: ``[B, F, C, H, W]`` latents; H and W are multiples of the patch size.
            timestep: t, ``[B]`` or ``[B, F]``, in [0, num_train_timesteps].
            r_timestep: r <= t, the shape of timestep. **None is not r = t**: it skips the second
                branch entirely.
            encoder_hidden_states: ``[B, S, text_dim]``.
            encoder_hidden_states_image: ``[B, S', image_dim]``, put before the text.
            attention_kwargs: ``{"scale": s}`` scales LoRA adapters; nothing else is understood.
            return_dict: False returns a 1-tuple.
            time_embedding: result of :meth:`embed_time` in place of timestep and r_timestep.
            text_context: result of :meth:`encode_text` in place of encoder_hidden_states.

        Returns:
            ``.sample`` ``[B, F, C_out, H, W]`` in hidden_states' dtype.

        Raises:
            ValueError: shapes do not fit, or ``r_timestep`` is given to a model without the second
                branch.
        """
        grid = self._token_grid(hidden_states)
        batch_size, dtype = hidden_states.shape[0], self._compute_dtype(hidden_states.device)
        if time_embedding is None:
            self._check_times(hidden_states, grid[0], timestep, r_timestep)
            assert timestep is not None
            time_embedding = self._embed_time(timestep, r_timestep)
        context: Tensor | None = None
        if text_context is None:
            self._check_text(encoder_hidden_states, batch_size)
            assert encoder_hidden_states is not None
            context = self.condition_embedder.embed_text(
                encoder_hidden_states, encoder_hidden_states_image, dtype
            )

        x = self.patch_embedding(hidden_states.transpose(1, 2)).flatten(2).transpose(1, 2).to(dtype)
        rotary = self.rope(grid, x.device, torch.promote_types(dtype, torch.float32))
        split = (
            None
            if self._sequence is None
            else TokenSplit(self._sequence, grid[0], grid[1] * grid[2])
        )
        if split is not None:
            x, rotary = (
                split.scatter(x),
                (split.scatter(rotary[0][None])[0], split.scatter(rotary[1][None])[0]),
            )
        for index, block in enumerate(self.blocks):
            arguments = (x, context if text_context is None else text_context.key_values[index])
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                # recomputed on the same backends
                run = block if torch.compiler.is_compiling() else hold(block)
                x = self._gradient_checkpointing_func(
                    run, *arguments, time_embedding.modulation, rotary, split
                )
            else:
                x = block(*arguments, time_embedding.modulation, rotary, split)

        # In fp32 whatever the latents: a bf16 norm and projection would be 4 % of a bf16 model's
        # error.
        wide = torch.promote_types(torch.promote_types(hidden_states.dtype, dtype), torch.float32)
        shift, scale = (self.scale_shift_table + time_embedding.emb.to(wide).unsqueeze(2)).unbind(2)
        x = x.to(wide)
        x = self.proj_out(layer_norm_modulate(x, shift, scale, self.config.eps))
        if split is not None:
            x = split.gather(x)
        sample = self._unpatchify(x, grid).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.patch_embedding.weight.dtype

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        pt, ph, pw = self.config.patch_size
        x = x.unflatten(1, grid).unflatten(-1, (pt, ph, pw, -1))  # [B, F', H', W', pt, ph, pw, C]
        return x.permute(0, 1, 4, 7, 2, 5, 3, 6).flatten(1, 2).flatten(3, 4).flatten(4, 5)

    def _token_grid(self, hidden_states: Tensor) -> tuple[int, int, int]:
        if hidden_states.ndim != 5 or hidden_states.shape[2] != self.config.in_channels:
            raise ValueError(
                f"hidden_states must be [B, F, C={self.config.in_channels}, H, W] (frames first), "
                f"got {tuple(hidden_states.shape)}"
            )
        sizes = (hidden_states.shape[1], hidden_states.shape[3], hidden_states.shape[4])
        for name, size, patch in zip(
            ("frames", "height", "width"), sizes, self.config.patch_size, strict=True
        ):
            if size == 0 or size % patch:
                raise ValueError(
                    f"hidden_states: {name} {size} must be a positive multiple of the patch size "
                    f"{patch}"
                )
        pt, ph, pw = self.config.patch_size
        return sizes[0] // pt, sizes[1] // ph, sizes[2] // pw

    def _check_times(
        self, hidden_states: Tensor, frames: int, t: Tensor | None, r: Tensor | None
    ) -> None:
        if t is None:
            raise ValueError("timestep is required unless time_embedding is given")
        b = hidden_states.shape[0]
        if t.shape not in ((b,), (b, frames)):
            raise ValueError(
                f"timestep must be [B={b}] or [B={b}, F={frames}], got {tuple(t.shape)}"
            )
        if r is not None and r.shape != t.shape:
            raise ValueError(
                f"r_timestep {tuple(r.shape)} must have the shape of timestep {tuple(t.shape)}"
            )

    def _check_text(self, text: Tensor | None, batch_size: int) -> None:
        if text is None:
            raise ValueError("encoder_hidden_states is required unless text_context is given")
        if text.ndim != 3 or text.shape[0] != batch_size or text.shape[2] != self.config.text_dim:
            raise ValueError(
                f"encoder_hidden_states must be [B={batch_size}, S, "
                f"text_dim={self.config.text_dim}], "
                f"got {tuple(text.shape)}"
            )
