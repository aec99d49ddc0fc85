"""Define the Wan2.1 video transformer with two times: ``u(x_t, t, r)``, the average velocity."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from anyflow.models.attention import require_backend
from anyflow.models.blocks import AnyFlowTransformerBlock, Attention
from anyflow.models.configuration import LIMITS, require_settings, require_sizes
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
from anyflow.ops.setting import ATTENTION_BACKEND, hold

if TYPE_CHECKING:
    import os

    from typing_extensions import Self


class _EqualToPeer(type):
    """Make a class equal to diffusers' class of its name.

    ``DiffusionPipeline.from_pipe`` hands a component over only where its exact class is that of the
    new pipeline's signature, and otherwise leaves it out with a warning.
    """

    def __eq__(cls, other: object) -> bool:
        if cls is other or not isinstance(other, type):
            return cls is other
        module = str(getattr(other, "__module__", ""))  # a metaclass has a descriptor there
        return (
            module.startswith("diffusers.models.transformers.") and other.__name__ == cls.__name__
        )

    __hash__ = type.__hash__


class AnyFlowTransformer3DModel(ModelMixin, ConfigMixin, PeftAdapterMixin, metaclass=_EqualToPeer):
    """Predict the average velocity of a video (AnyFlow, arXiv 2605.13724; architecture Wan2.1).

    Parameter names and positional arguments are those of diffusers' class of the same name (proven
    by ``tests/models/test_parity_diffusers.py``), so that the model loads the same checkpoints and
    drops into ``diffusers.AnyFlowPipeline``. The differences: a ``[B]`` timestep keeps one
    modulation row per sample, a ``[B, F]`` one keeps one per frame (never one per token);
    ``r_timestep=None`` is the plain Wan path with a single time; the velocity has the dtype of the
    latents given. The projection of the latents runs at least at their precision, the last norm and
    projection in fp32.

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
        rope_max_seq_len: largest number of patches along frames, height or width.
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
        require_sizes(patch_size=patch_size, **{name: self.config[name] for name in LIMITS})
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
            self._new_block(dim, ffn_dim, num_attention_heads, cross_attn_norm, eps)
            for _ in range(num_layers)
        )
        self.proj_out = OutputProjection(dim, channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.gradient_checkpointing = False
        self._sequence: SequenceGroup | None = None

    def _new_block(
        self, dim: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float
    ) -> AnyFlowTransformerBlock:
        return AnyFlowTransformerBlock(dim, ffn_dim, num_heads, cross_attn_norm, eps)

    def enable_flow_map(
        self, gate_value: float = 0.25, deltatime_type: str = "r", fusion: str = "gated"
    ) -> AnyFlowTransformer3DModel:
        """Turn a plain Wan model into a flow map, in place, and return it.

        ``delta_embedder`` becomes a copy of ``time_embedder``: with ``deltatime_type="r"`` and the
        gated fusion the velocity is unchanged where r = t.

        Args:
            gate_value: g, the share of the second time's embedding.
            deltatime_type: what the second branch embeds, ``"r"`` or ``"t-r"``.
            fusion: ``"gated"`` or ``"additive"``.

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
        # diffusers' from_config ignores the settings on this list
        defaulted = [k for k in self.config.get("_use_default_values", []) if k not in settings]
        self.register_to_config(**settings, _use_default_values=defaulted)
        return self

    def set_attention_backend(self, backend: str | None) -> None:
        """Force the attention of this model, and of no other one, onto one backend.

        The choice is nearer than ``use_attention_backend``.

        Args:
            backend: a name of ``anyflow.models.attention``, not of diffusers (whose ``"flash"`` is
                the package that is ``"flash_attn_2"`` here); None or ``"auto"`` returns to the
                automatic choice.

        Raises:
            ValueError: the name is unknown.
            RuntimeError: the backend is not installed, or does not run on this machine.
        """
        name = ATTENTION_BACKEND.checked(
            None if backend == "auto" else backend, "set_attention_backend: "
        )
        if name is not None:
            # an offloaded model is on the CPU, and runs on a CUDA device
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
        """Return to the automatic choice, as ``set_attention_backend(None)``."""
        self.set_attention_backend(None)

    def set_sequence_parallel(self, group: dist.ProcessGroup | None) -> None:
        """Share every sample's tokens among the ranks of a group.

        The ranks call the model with the same arguments, and each gets the whole velocity. A rank's
        gradients are those of the sum of all ranks' losses with respect to what the rank computed,
        so that their mean over the group is the gradient. None, or a group of one, turns sharing
        off. The group is neither in the config nor in the state dict.

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
                f"heads that it divides, got {self.config.num_attention_heads}"
            )
        self._sequence = None if sequence is None or sequence.degree == 1 else sequence

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
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the average velocity u(x_t, t, r), or the plain velocity without ``r_timestep``.

        Args:
            hidden_states: ``[B, F, C, H, W]`` latents; H and W are multiples of the patch size.
            timestep: t, ``[B]`` or ``[B, F]``, in [0, num_train_timesteps]; required.
            r_timestep: r <= t, the shape of timestep. **None is not r = t**: None skips the second
                branch entirely.
            encoder_hidden_states: ``[B, S, text_dim]``; required.
            encoder_hidden_states_image: ``[B, S', image_dim]``, put before the text.
            attention_kwargs: ``{"scale": s}`` scales LoRA adapters; nothing else is understood.
            return_dict: False returns a 1-tuple.

        Returns:
            ``.sample`` ``[B, F, C_out, H, W]`` in hidden_states' dtype.

        Raises:
            ValueError: shapes do not fit, or ``r_timestep`` is given to a model without the second
                branch.
        """
        if timestep is None or encoder_hidden_states is None:
            absent = "timestep" if timestep is None else "encoder_hidden_states"
            raise ValueError(f"{absent} is required")
        grid = self._token_grid(hidden_states)
        self._check_times(hidden_states, grid[0], timestep, r_timestep)
        self._check_text(encoder_hidden_states, hidden_states.shape[0])
        dtype = self._compute_dtype(hidden_states.device)
        time, modulation = self._embed_times(timestep, r_timestep, dtype)
        text = self.condition_embedder.embed_text(
            encoder_hidden_states, encoder_hidden_states_image, dtype
        )

        x = self._embed_patches(self.patch_embedding, hidden_states).to(dtype)
        rotary = self.rope(grid, x.device, torch.promote_types(dtype, torch.float32))
        split = None
        if self._sequence is not None:
            split = TokenSplit.of_frames(self._sequence, grid[0], grid[1] * grid[2])
            cos, sin = (split.scatter(table[None])[0] for table in rotary)
            x, rotary = split.scatter(x), (cos, sin)
        for block in self.blocks:
            x = self._run_block(block, x, text, modulation, rotary, split)

        x = self._project_out(x, time, hidden_states.dtype)
        if split is not None:
            x = split.gather(x)
        sample = self._unpatchify(x, grid).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _project_out(self, x: Tensor, time: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalize and project tokens ``[B, L, D]``, with times ``[B, R, D]``, to patches.

        Both run in fp32 whatever the dtype of the latents: a bf16 norm and projection would be 4 %
        of a bf16 model's error.
        """
        wide = torch.promote_types(torch.promote_types(dtype, x.dtype), torch.float32)
        shift, scale = (self.scale_shift_table + time.to(wide).unsqueeze(2)).unbind(2)
        return cast(
            Tensor, self.proj_out(layer_norm_modulate(x.to(wide), shift, scale, self.config.eps))
        )

    def _embed_patches(self, embedding: nn.Module, latents: Tensor) -> Tensor:
        """Embed latents ``[B, F, C, H, W]`` as tokens ``[B, L, D]``."""
        return cast(Tensor, embedding(latents.transpose(1, 2))).flatten(2).transpose(1, 2)

    def _embed_times(
        self, timestep: Tensor, r_timestep: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return ``[B, R, D]`` for the last norm and ``[B, R, 6, D]`` for blocks; R = 1 or F."""
        t = timestep.unsqueeze(1) if timestep.ndim == 1 else timestep
        r = None if r_timestep is None else r_timestep.flatten()
        time, modulation = self.condition_embedder(t.flatten(), r, dtype)
        return time.unflatten(0, t.shape), modulation.unflatten(0, t.shape)

    def _run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """Run a block, and with gradient checkpointing run it again in the backward pass."""
        if not (torch.is_grad_enabled() and self.gradient_checkpointing):
            return block(*inputs)
        # the backward pass recomputes on the backends of the forward pass
        run = block if torch.compiler.is_compiling() else hold(block)
        return self._gradient_checkpointing_func(run, *inputs)

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

    def _check_times(self, hidden_states: Tensor, frames: int, t: Tensor, r: Tensor | None) -> None:
        b = hidden_states.shape[0]
        if t.shape not in ((b,), (b, frames)):
            raise ValueError(
                f"timestep must be [B={b}] or [B={b}, F={frames}], got {tuple(t.shape)}"
            )
        if r is not None and r.shape != t.shape:
            raise ValueError(
                f"r_timestep {tuple(r.shape)} must have the shape of timestep {tuple(t.shape)}"
            )

    def _check_text(self, text: Tensor, batch_size: int) -> None:
        if text.ndim != 3 or text.shape[0] != batch_size or text.shape[2] != self.config.text_dim:
            raise ValueError(
                f"encoder_hidden_states must be [B={batch_size}, S, "
                f"text_dim={self.config.text_dim}], got {tuple(text.shape)}"
            )
