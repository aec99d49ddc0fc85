"""Embed patches, positions, times and text.

Parameter names are those of diffusers' AnyFlow and Wan transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyflow.models.linear import apply_linear
from anyflow.ops import dual_timestep_embedding, gelu, linear
from anyflow.ops.dual_timestep_embedding import FUSIONS
from anyflow.utils.devices import widest_float
from anyflow.utils.validation import brief, is_finite_number

DELTATIME_TYPES = ("r", "t-r")


class PatchEmbedding(nn.Conv3d):
    """Project patches that do not overlap: a Conv3d by name, one matrix product in execution.

    The product runs in the wider of the input's and the weight's dtype, also under autocast: fp32
    latents are not rounded before a bf16 model projects them, or the central difference of x would
    drown in the rounding (algorithm.md, equation 8).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, F, H, W]``, multiples of the patch size, to ``[B, D, F', H', W']``."""
        b, c = x.shape[:2]
        pt, ph, pw = self.kernel_size
        grid = (x.shape[2] // pt, x.shape[3] // ph, x.shape[4] // pw)
        patches = (
            x.reshape(b, c, grid[0], pt, grid[1], ph, grid[2], pw)
            .permute(0, 2, 4, 6, 1, 3, 5, 7)
            .flatten(4)
        )
        out = linear_wide(patches.flatten(1, 3), self.weight.flatten(1), self.bias)
        return out.transpose(1, 2).unflatten(2, grid)


def interpolation_matrix(few: int, many: int, device: torch.device) -> Tensor:
    """Return the matrix ``[many, few]`` of linear interpolation between centers of taps, clamped.

    From 2 to 4 it is ``[[1, 0], [3/4, 1/4], [1/4, 3/4], [0, 1]]``.
    """
    wide = widest_float(device)
    position = (torch.arange(many, dtype=wide, device=device) + 0.5) * (few / many) - 0.5
    position = position.clamp(0, few - 1)
    tap = torch.arange(few, dtype=wide, device=device)
    return (1 - (position[:, None] - tap).abs()).clamp(min=0)


class OutputProjection(nn.Linear):
    """Apply a linear layer in the wider of the input's and the weight's dtype, without autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_wide(x, self.weight, self.bias)


def linear_wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` in the wider of the two dtypes, with autocast off."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class RotaryEmbedding(nn.Module):
    """Compute the cosines and sines of the 3-D rotary embedding, with theta 1e4.

    Of the Dh channels of a head, 2 (Dh // 6) go to the height and as many to the width, the rest to
    the frames. The tables of an axis are computed in fp64 and rounded to fp32 once; diffusers
    rotates in complex fp64 arithmetic.
    """

    def __init__(self, head_dim: int, max_seq_len: int, theta: float = 1e4) -> None:
        super().__init__()
        space = 2 * (head_dim // 6)
        self.axis_dims = (head_dim - 2 * space, space, space)
        self.max_seq_len = max_seq_len
        self.theta = theta
        self._cache: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        *,
        first_frame: int = 0,
        ratio: tuple[int, int] = (1, 1),
    ) -> tuple[Tensor, Tensor]:
        """Return ``(cos, sin)``, each ``[F * H * W, Dh / 2]``, for a token grid (F, H, W).

        Args:
            grid: frames, rows and columns of tokens.
            device, dtype: of the tables.
            first_frame: position of the first frame.
            ratio: (rows, columns) of positions that a token covers; it is in their middle.

        Raises:
            ValueError: an axis of the grid is longer than ``rope_max_seq_len``.
        """
        covered = (first_frame + grid[0], grid[1] * ratio[0], grid[2] * ratio[1])
        if max(covered) > self.max_seq_len:
            raise ValueError(
                f"token grid {covered} exceeds rope_max_seq_len={self.max_seq_len} of the model"
            )
        # a cache that changes between calls would force a recompilation
        if torch.compiler.is_compiling():
            return self._tables(grid, device, dtype, first_frame, ratio)
        key = (grid, device, dtype, first_frame, ratio)
        tables = self._cache.get(key)
        if tables is None:
            with torch.inference_mode(False):
                tables = self._tables(grid, device, dtype, first_frame, ratio)
            # a new dictionary: other threads may be reading the old one
            kept = self._cache if len(self._cache) < 8 else {}
            self._cache = {**kept, key: tables}
        return tables

    def _tables(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        first_frame: int,
        ratio: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        wide = widest_float(device)
        phases = []
        steps, firsts = (1, *ratio), (first_frame, (ratio[0] - 1) / 2, (ratio[1] - 1) / 2)
        for axis, (length, dim) in enumerate(zip(grid, self.axis_dims, strict=True)):
            frequency = self.theta ** -(torch.arange(0, dim, 2, dtype=wide, device=device) / dim)
            index = torch.arange(length, dtype=wide, device=device)
            phase = torch.outer(index * steps[axis] + firsts[axis], frequency)
            shape = [1, 1, 1, phase.shape[1]]
            shape[axis] = length
            phases.append(phase.view(shape).expand(*grid, -1))
        angle = torch.cat(phases, dim=-1).flatten(0, 2)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def __deepcopy__(self, memo: dict[int, object]) -> RotaryEmbedding:
        return RotaryEmbedding(sum(self.axis_dims), self.max_seq_len, self.theta)


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Return fp32 ``[cos | sin]`` of ``t[N]`` times ``exp(-ln(1e4) i / (dim / 2))``, [N, dim]."""
    half = dim // 2
    exponent = (
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    )
    angle = timestep.to(torch.float32)[:, None] * exponent.exp()
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Apply Linear, SiLU, Linear to a sinusoidal embedding."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(freq_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, sinusoid: Tensor) -> Tensor:
        """Map ``[N, freq_dim]`` to ``[N, D]``."""
        return apply_linear(self.linear_2, F.silu(apply_linear(self.linear_1, sinusoid)))


class TextProjection(nn.Module):
    """Apply Linear, tanh-GELU, Linear to the states of a text encoder."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        """Map ``[B, S, text_dim]`` to ``[B, S, D]``."""
        return apply_linear(self.linear_2, gelu(apply_linear(self.linear_1, text)))


class ImageProjection(nn.Module):
    """Apply LayerNorm, Linear, GELU, Linear, LayerNorm to image states, the norms in fp32."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(image_dim)
        self.ff = _ImageFeedForward(image_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[B, S, image_dim]`` to ``[B, S, D]``."""
        return _layer_norm_fp32(self.norm2, self.ff(_layer_norm_fp32(self.norm1, image)))


class _ImageFeedForward(nn.Module):
    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_ExactGELU(image_dim), nn.Identity(), nn.Linear(image_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = module(x)
        return x


class _ExactGELU(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


def _layer_norm_fp32(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = norm.weight.float(), norm.bias.float()
    return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


class ConditionEmbedder(nn.Module):
    """Embed the times t and, for a flow map, r, and the text and image.

    ``delta_embedder`` and the buffer of the gate exist only for a flow map; the buffer is not in
    checkpoints.
    """

    delta_emb_gate: Tensor

    def __init__(self, dim: int, freq_dim: int, text_dim: int, image_dim: int | None) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.delta_embedder: TimestepEmbedding | None = None
        self.deltatime, self.fusion, self.gate = "r", "gated", 0.0
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TextProjection(text_dim, dim)
        self.image_embedder = None if image_dim is None else ImageProjection(image_dim, dim)

    def set_flow_map(
        self, delta_embedder: TimestepEmbedding, gate: float, deltatime: str, fusion: str
    ) -> None:
        """Install the second timestep branch.

        Raises:
            ValueError: the deltatime or fusion is unknown, or the gate is not finite in fp32; the
                message has the names of the config.
        """
        if deltatime not in DELTATIME_TYPES:
            raise ValueError(
                f"deltatime_type must be one of {', '.join(DELTATIME_TYPES)}, got "
                f"{brief(deltatime)}"
            )
        if fusion not in FUSIONS:
            raise ValueError(
                f"r_embedder_fusion must be one of {', '.join(FUSIONS)}, got {brief(fusion)}"
            )
        if not is_finite_number(gate):
            raise ValueError(
                f"gate_value must be a number that is finite in fp32, got {brief(gate)}"
            )
        self.delta_embedder = delta_embedder
        self.deltatime, self.fusion, self.gate = deltatime, fusion, gate
        device = delta_embedder.linear_1.weight.device
        # no file fills this buffer, so that it must not stay on the meta device of a loading model
        device = torch.device("cpu") if device.type == "meta" else device
        self.register_buffer("delta_emb_gate", self._gate_on(device), persistent=False)

    def _gate_on(self, device: torch.device) -> Tensor:
        return torch.tensor([self.gate], dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConditionEmbedder:
        """Convert the module, but keep the gate's value in ``to_empty()`` and its fp32."""
        super()._apply(fn, recurse)
        if self.delta_embedder is not None:
            self.delta_emb_gate = self._gate_on(self.delta_emb_gate.device)
        return self

    def forward(
        self, timestep: Tensor, r_timestep: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Embed the times ``t[N]`` and ``r[N]`` or None.

        Times are embedded by the module's call, and text by a method, because the times read the
        module's own tensor, the gate: hooks of offloading bring it to the device around calls only.

        Returns:
            ``emb[N, D]``, rounded to ``dtype``, and its projection ``[N, 6, D]``.
        """
        temb = self._embed(self.time_embedder, timestep, dtype)
        if r_timestep is None:
            activated = F.silu(temb)
        elif self.delta_embedder is None:
            raise ValueError(
                "r_timestep was given, but this model has no second timestep branch "
                "(r_embedder=False); call enable_flow_map() first, or pass r_timestep=None"
            )
        else:
            delta = r_timestep if self.deltatime == "r" else timestep - r_timestep
            remb = self._embed(self.delta_embedder, delta, dtype)
            temb, activated = dual_timestep_embedding(temb, remb, self.delta_emb_gate, self.fusion)
        return temb, apply_linear(
            self.time_proj, activated.to(self.time_proj.weight.dtype)
        ).unflatten(-1, (6, -1))

    def _embed(self, embedder: TimestepEmbedding, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        sinusoid = sinusoidal_embedding(timestep, self.freq_dim)
        return embedder(sinusoid.to(embedder.linear_1.weight.dtype)).to(dtype)

    def embed_text(self, text: Tensor, image: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return tokens ``[B, S' + S, D]`` of ``image[B, S', image_dim]`` and ``text[B, S, ...]``.

        Without an image they are the text's alone.
        """
        tokens = self.text_embedder(text.to(dtype))
        if image is None:
            return tokens
        if self.image_embedder is None:
            raise ValueError(
                "encoder_hidden_states_image was given, but this model has no image branch "
                "(image_dim=None)"
            )
        image_dim = self.image_embedder.norm1.normalized_shape[0]
        if image.ndim != 3 or image.shape[0] != text.shape[0] or image.shape[2] != image_dim:
            raise ValueError(
                f"encoder_hidden_states_image must be [B={text.shape[0]}, S, "
                f"image_dim={image_dim}], got {tuple(image.shape)}"
            )
        return torch.cat([self.image_embedder(image.to(dtype)), tokens], dim=1)
