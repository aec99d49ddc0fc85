"""Define the causal (FAR) transformer, which makes a video chunk by chunk after earlier chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from anyflow.models.causal_block import AnyFlowFARTransformerBlock, SharedContext
from anyflow.models.causal_cache import ChunkCache, EncodingPlan, cache_bytes
from anyflow.models.causal_call import (
    CausalCall,
    call_after_cache,
    call_on_chunks,
)
from anyflow.models.causal_streams import ContextRows, TokenStream
from anyflow.models.chunks import (
    CHUNK_PARTITION,
    ChunkPartition,
    FrameTokens,
    checked_settings,
)
from anyflow.models.diffusers_typing import apply_lora_scale, register_to_config
from anyflow.models.embeddings import PatchEmbedding, interpolation_matrix
from anyflow.models.transformer import AnyFlowTransformer3DModel

if TYPE_CHECKING:
    import os

    from typing_extensions import Self

_COMPILED_VARIANTS = 64
CAUSAL_PARAMETERS = ("far_patch_embedding.weight", "far_patch_embedding.bias")


class AnyFlowFARTransformer3DModel(AnyFlowTransformer3DModel):
    """Predict the average velocity of the last chunks of a video, given the chunks before them.

    Frame-autoregressive AnyFlow (arXiv 2605.13724): of n chunks the last ``full_chunk_limit`` are
    full, and those before them compressed by a coarser patch embedding. Parameter names, config
    and the first eight positional arguments are those of diffusers' class of the same name (proven
    by ``tests/models/test_causal_parity.py``). No kernel has a mask: each chunk is one attention to
    what it sees, on any attention backend (:mod:`anyflow.models.chunks`).

    ``forward`` computes four layouts: training (with ``clean_hidden_states``), plain, one chunk
    after cached ones (with ``cache``), and the bidirectional model (``is_causal=False``).

    Args:
        compressed_patch_size: (frames, height, width) of a compressed patch, a multiple of
            ``patch_size``.
        full_chunk_limit: L, the chunks that are full.
        chunk_partition: latent frames of each chunk, where a call does not say otherwise.

    The other arguments are those of :class:`AnyFlowTransformer3DModel`.

    Raises:
        ValueError: a setting is not possible.
    """

    _no_split_modules = ["AnyFlowFARTransformerBlock"]  # noqa: RUF012
    _repeated_blocks = ["AnyFlowFARTransformerBlock"]  # noqa: RUF012

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
        compressed_patch_size: tuple[int, int, int] = (1, 4, 4),
        full_chunk_limit: int = 3,
        chunk_partition: tuple[int, ...] = CHUNK_PARTITION,
    ) -> None:
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
            gate_value=gate_value,
            deltatime_type=deltatime_type,
            r_embedder=r_embedder,
            r_embedder_fusion=r_embedder_fusion,
        )
        self._ratio = checked_settings(patch_size, compressed_patch_size, full_chunk_limit)
        ChunkPartition(tuple(chunk_partition))
        dim = num_attention_heads * attention_head_dim
        self.far_patch_embedding = PatchEmbedding(
            in_channels, dim, kernel_size=compressed_patch_size, stride=compressed_patch_size
        )
        self.initialize_compressed()

    def _new_block(
        self, dim: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float
    ) -> AnyFlowFARTransformerBlock:
        return AnyFlowFARTransformerBlock(dim, ffn_dim, num_heads, cross_attn_norm, eps)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile every block, as diffusers does; arguments are those of ``torch.compile``.

        A block is compiled for each kind of call: cached steps, encodings, and training on each
        number of chunks. torch's process-wide limit of such variants is raised for them.
        """
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, _COMPILED_VARIANTS)
        super().compile_repeated_blocks(*args, **kwargs)

    # Weights --------------------------------------------------------------------------------------

    @classmethod
    def from_bidirectional(
        cls,
        model: AnyFlowTransformer3DModel,
        *,
        compressed_patch_size: tuple[int, int, int] = (1, 4, 4),
        full_chunk_limit: int = 3,
        chunk_partition: Sequence[int] = CHUNK_PARTITION,
    ) -> Self:
        """Make a causal model of a bidirectional one, on its device and with copies of its weights.

        The compressed patch embedding is that of :meth:`initialize_compressed`.

        Args:
            model: without adapters; on any device, the meta device included.
            compressed_patch_size, full_chunk_limit, chunk_partition: see the class.

        Raises:
            ValueError: the model has adapters, or a setting is not possible.
        """
        if getattr(model, "peft_config", None):
            raise ValueError(
                "from_bidirectional: this model has adapters; merge them first (fuse_lora, "
                "unload_lora)"
            )
        base = {k: v for k, v in model.config.items() if not k.startswith("_")}
        settings = {
            **base,
            "compressed_patch_size": tuple(compressed_patch_size),
            "full_chunk_limit": full_chunk_limit,
            "chunk_partition": tuple(chunk_partition),
        }
        # weights that inference mode makes can never be trained
        with torch.inference_mode(False), torch.no_grad():
            with torch.device("meta"):
                causal = cls(**settings)
            for name, parameter in model.named_parameters():
                module, _, leaf = name.rpartition(".")
                copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(causal.get_submodule(module), leaf, copy)
            embedder = causal.condition_embedder
            if embedder.delta_embedder is not None and model.device.type != "meta":
                embedder.delta_emb_gate = embedder.delta_emb_gate.to(model.device)
            causal.initialize_compressed()
        return causal.train(model.training)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **settings: Any
    ) -> Self:
        """Load a folder as diffusers does; a bidirectional one becomes a causal model.

        The compressed patch embedding, which a bidirectional folder does not have, is that of
        :meth:`initialize_compressed`.
        """
        wants_info = settings.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **settings
        )
        if set(CAUSAL_PARAMETERS) <= set(info["missing_keys"]):
            model.initialize_compressed()
            info["missing_keys"] = [k for k in info["missing_keys"] if k not in CAUSAL_PARAMETERS]
        return cast("Self", (model, info) if wants_info else model)

    @torch.no_grad()
    def initialize_compressed(self) -> None:
        """Set the compressed patch embedding to the full one, interpolated to its patch size.

        The interpolation is linear between the centers of the taps, and clamped at the borders. The
        embedding goes to the device and dtype of the full one.
        """
        source = self.patch_embedding
        wide = torch.promote_types(source.weight.dtype, torch.float32)
        weight = source.weight.to(wide)
        sizes = zip(source.kernel_size[1:], self.far_patch_embedding.kernel_size[1:], strict=True)
        for axis, (few, many) in zip((3, 4), sizes, strict=True):
            matrix = interpolation_matrix(few, many, weight.device).to(wide)
            weight = torch.tensordot(weight, matrix, dims=([axis], [1])).movedim(-1, axis)
        embedding = self.far_patch_embedding
        assert source.bias is not None
        for name, value in (("weight", weight.to(source.weight.dtype)), ("bias", source.bias)):
            kept = getattr(embedding, name)
            if kept.shape == value.shape and kept.device == value.device and not kept.is_meta:
                kept.copy_(value)
            else:
                setattr(embedding, name, nn.Parameter(value.detach().clone(), kept.requires_grad))

    # Caches ---------------------------------------------------------------------------------------

    def new_cache(
        self,
        chunk_partition: Sequence[int] | None = None,
        *,
        window: int | None = None,
        storage: torch.device | str | None = None,
    ) -> ChunkCache:
        """Return an empty cache for a video; see :class:`~anyflow.models.causal_cache.ChunkCache`.

        With sequence parallelism each rank has a cache of its own, of all tokens and its heads.

        Args:
            chunk_partition: latent frames of each chunk; None takes the config's.
            window: most compressed chunks that stay.
            storage: device that keys and values wait on.
        """
        partition = ChunkPartition(
            tuple(self.config.chunk_partition if chunk_partition is None else chunk_partition)
        )
        layers = len(self.blocks)
        return ChunkCache(
            partition, self.config.full_chunk_limit, layers, window=window, storage=storage
        )

    def cache_bytes(
        self,
        height: int,
        width: int,
        chunk_partition: Sequence[int] | None = None,
        *,
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
        window: int | None = None,
    ) -> int:
        """Return the most bytes that the cache of a video takes, known before anything runs.

        With sequence parallelism they are those of this rank.

        Args:
            height, width: rows and columns of the latents.
            chunk_partition: latent frames of each chunk; None takes the config's.
            batch_size: videos; guidance doubles them.
            dtype: of the keys and values; None takes the weights'.
            window: most compressed chunks that stay.

        Raises:
            ValueError: the size is not possible.
        """
        partition = self.new_cache(chunk_partition).partition
        compressed = len(partition) > self.config.full_chunk_limit
        self.check_size(height, width, compressed=compressed)
        ranks = 1 if self._sequence is None else self._sequence.degree
        return cache_bytes(
            partition,
            self.config.full_chunk_limit,
            self._frame_tokens(height, width),
            layers=self.config.num_layers,
            width=self.config.num_attention_heads // ranks * self.config.attention_head_dim,
            itemsize=(self.patch_embedding.weight.dtype if dtype is None else dtype).itemsize,
            batch_size=batch_size,
            window=window,
        )

    def check_size(self, height: int, width: int, *, compressed: bool) -> None:
        """Raise a ValueError for rows and columns of latents that patches do not cover."""
        patch = self.config.compressed_patch_size if compressed else self.config.patch_size
        for name, size, multiple in (("height", height, patch[1]), ("width", width, patch[2])):
            if size < 1 or size % multiple:
                why = "where a frame is compressed" if compressed else "of latents"
                raise ValueError(
                    f"hidden_states: {name} {size} must be a positive multiple of {multiple} {why}"
                )

    # Forward --------------------------------------------------------------------------------------

    @apply_lora_scale("attention_kwargs")
    def forward(  # type: ignore[override]  # the positions are those of diffusers' causal class
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        r_timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        chunk_partition: Sequence[int] | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        clean_hidden_states: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        *,
        is_causal: bool = True,
        cache: ChunkCache | None = None,
        encode: EncodingPlan | None = None,
        context_rows: Sequence[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the average velocity of the full frames.

        Args:
            hidden_states: ``[B, F, C, H, W]``: all frames, clean ones where they are compressed.
                With ``cache`` the frames of the next chunk; with ``encode`` those of its chunks.
            timestep: t, ``[B, F]`` for every frame of ``hidden_states``, or ``[B]`` for the full
                ones, while compressed ones are at 0.
            r_timestep: r <= t, the shape of timestep; None skips the second branch.
            encoder_hidden_states: ``[B, S, text_dim]``.
            chunk_partition: latent frames of each chunk; None takes the config's, or the cache's.
            encoder_hidden_states_image: ``[B, S', image_dim]``, put before the text.
            clean_hidden_states: ``[B, F_f, C, H, W]``, clean latents of the full frames, for
                training: noisy chunks attend to them in place of one another. Those of the last
                chunk are not read.
            clean_timestep: their time, ``[B, F_f]`` or ``[B]``; None is 0. Their r is the same.
            attention_kwargs: ``{"scale": s}`` scales LoRA adapters.
            return_dict: False returns a 1-tuple.
            is_causal: False runs the bidirectional model on all frames.
            cache: what earlier chunks have left; the velocity is that of the chunk after them.
            encode: encodes chunks into the cache, all at t = r = 0; ``timestep`` is not needed, and
                the sample is empty.
            context_rows: with ``clean_hidden_states``, for each of the B rows the one whose context
                it has: the compressed frames, clean copies, their times, and the text that these
                attend to. A context is computed once for all its rows, and what other rows hold of
                one is not read. None gives each row its own.

        Returns:
            ``.sample`` ``[B, F_f, C_out, H, W]`` in hidden_states' dtype.

        Raises:
            ValueError: shapes do not fit, or frames, rows or columns do not fit the partition.
        """
        if context_rows is not None and not (is_causal and cache is None):
            raise ValueError("context_rows is of the causal path without a cache")
        if not is_causal:
            return super().forward(
                hidden_states,
                timestep,
                r_timestep,
                encoder_hidden_states,
                encoder_hidden_states_image,
                return_dict=return_dict,
            )
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states is required")
        self._token_grid(hidden_states)
        tokens = self._frame_tokens(*hidden_states.shape[3:])
        if cache is None:
            sizes = self.config.chunk_partition if chunk_partition is None else chunk_partition
            limit = self.config.full_chunk_limit
            call = call_on_chunks(hidden_states, sizes, limit, tokens, clean_hidden_states, encode)
        else:
            given = chunk_partition, clean_hidden_states
            call = call_after_cache(hidden_states, tokens, cache, encode, given)
        self.check_size(*hidden_states.shape[3:], compressed=call.layout.has_compressed)
        self._check_text(encoder_hidden_states, hidden_states.shape[0])
        if encode is not None:
            timestep = hidden_states.new_zeros(hidden_states.shape[0], dtype=torch.float32)
            r_timestep = timestep if self.config.r_embedder else None
        elif timestep is None:
            raise ValueError("timestep is required")
        self._check_times(hidden_states, hidden_states.shape[1], timestep, r_timestep)
        times = call.times(timestep, r_timestep, clean_timestep)
        rows = self._context_rows(context_rows, call, clean_hidden_states)

        dtype = self._compute_dtype(hidden_states.device)
        time, modulation = self._embed_times(*times, dtype)
        text = self.condition_embedder.embed_text(
            encoder_hidden_states, encoder_hidden_states_image, dtype
        )
        streams = self._streams(call, tokens, text, modulation, rows, encode is not None)
        x = self._run_blocks(*streams, rows, tokens, cache, encode)
        frames = 0 if encode is not None else call.layout.segments[-1].num_frames
        if time.shape[1] > 1:
            time = time[:, time.shape[1] - frames :]
        if frames == 0:
            sample = hidden_states[:, :0]
        else:
            x = self._project_out(x, time, hidden_states.dtype)
            if (split := streams[0].split) is not None:
                x = split.last().gather(x)
            grid = (frames, tokens.height, tokens.width)
            sample = self._unpatchify(x, grid).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _frame_tokens(self, height: int, width: int) -> FrameTokens:
        _, ph, pw = self.config.patch_size
        return FrameTokens(height // ph, width // pw, self._ratio)

    def _context_rows(
        self, given: Sequence[int] | None, call: CausalCall, clean: Tensor | None
    ) -> ContextRows | None:
        if given is None:
            return None
        if clean is None:
            raise ValueError("context_rows needs clean_hidden_states, which training has")
        rows = ContextRows.of(given, clean.shape[0], clean.device)
        return rows if len(call.layout.segments) > 1 else None

    def _streams(
        self,
        call: CausalCall,
        tokens: FrameTokens,
        text: Tensor,
        modulation: Tensor,
        rows: ContextRows | None,
        keeps_keys: bool,
    ) -> tuple[TokenStream, TokenStream | None]:
        """Return the tokens whose output is read, and the context that rows share, if they do."""
        x = [
            self._embed_patches(
                self.far_patch_embedding if segment.compressed else self.patch_embedding,
                latents if rows is None or is_last else latents.index_select(0, rows.computed),
            ).to(text.dtype)
            for segment, latents, is_last in call.parts()
        ]
        options: dict[str, Any] = {"rope": self.rope, "ranks": self._sequence}
        if rows is None:
            joined = torch.cat(x, dim=1)
            options["keeps_keys"] = keeps_keys
            return TokenStream.of(call.layout, tokens, joined, text, modulation, **options), None
        before, noisy = call.layout.apart()
        frames = sum(segment.num_frames for segment in before.segments)
        joined = torch.cat(x[:-1], dim=1)
        context = TokenStream.of(
            before,
            tokens,
            joined,
            text.index_select(0, rows.computed),
            modulation[:, :frames].index_select(0, rows.computed),
            keeps_keys=True,
            **options,
        )
        options["num_past"] = joined.shape[1]
        return TokenStream.of(
            noisy, tokens, x[-1], text, modulation[:, frames:], **options
        ), context

    def _run_blocks(
        self,
        stream: TokenStream,
        context: TokenStream | None,
        rows: ContextRows | None,
        tokens: FrameTokens,
        cache: ChunkCache | None,
        encode: EncodingPlan | None,
    ) -> Tensor:
        """Return the outputs ``[B, L', D]`` of a stream, and keep what is encoded."""
        x, shared = stream.x, None if context is None else context.x
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            inputs = stream.inputs(x, last)
            past = () if cache is None else cache.past(index, x.device)
            if context is not None and rows is not None:
                beside = SharedContext(context.inputs(shared, last), rows.rows)
                x, shared = self._run_block(block, *inputs, past, beside)
            elif cache is None or encode is None:
                x = self._run_block(block, *inputs, past)
            else:
                x, key, value = self._run_block(block, *inputs, past)
                cache.store(index, key, value, encode, tokens)
        return x
