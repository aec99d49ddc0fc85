"""Compare frames that are decoded chunk by chunk with those of diffusers' ``vae.decode``."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor

from anyflow.pipelines.chunk_decoder import ChunkDecoder
from anyflow.pipelines.wan import decode_latents, load_vae
from anyflow.training.activations import Allocations

CHUNKS = [3, 1, 2]  # latent frames


@pytest.fixture
def vae(wan_model: Path) -> AutoencoderKLWan:
    return load_vae(wan_model)


@pytest.fixture
def latents(generator: torch.Generator) -> Tensor:
    return torch.randn(2, sum(CHUNKS), 16, 4, 6, generator=generator)


def patched_vae() -> AutoencoderKLWan:
    """Make a small VAE of the kind of Wan 2.2: residual, of patches, 16 pixels to a latent."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 8,
        latents_std=[0.9] * 8,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    ).eval()


def decoded(decoder: ChunkDecoder, latents: Tensor, chunks: list[int] = CHUNKS) -> Tensor:
    return torch.cat([decoder.decode(chunk) for chunk in latents.split(chunks, dim=1)], dim=1)


def assert_same(frames: Tensor, expected: Tensor) -> None:
    """Compare in [0, 1], and make sure that there is something to compare."""
    assert expected.std() > 1e-3
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunks", [CHUNKS, [1] * 6, [6], [1, 5]])
def test_chunks_together_are_the_video_that_the_vae_decodes(vae, latents, chunks) -> None:
    decoder = ChunkDecoder(vae)
    frames = [decoder.decode(chunk) for chunk in latents.split(chunks, dim=1)]
    assert [len(f[0]) for f in frames] == [4 * size - 3 * (i == 0) for i, size in enumerate(chunks)]
    assert all(f.min() >= 0 and f.max() <= 1 and f.dtype == torch.float32 for f in frames)
    assert_same(torch.cat(frames, dim=1), decode_latents(vae, latents))


def test_every_chunk_needs_the_one_before_it(vae, latents) -> None:
    """Decode a chunk by itself: it differs from the same chunk of the video by far more."""
    alone = decode_latents(vae, latents[:, 3:])
    assert (alone - decode_latents(vae, latents)[:, 9:][:, 3:]).abs().max() > 1e-3


@pytest.mark.parametrize("slicing", [False, True])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("tiles", [None, (16, 24, 16, 16), (16, 32, 8, 24), (24, 24, 16, 16)])
def test_slices_tiles_and_patches_give_the_frames_of_the_vae(
    wan_model, generator, slicing: bool, patched: bool, tiles
) -> None:
    vae = patched_vae() if patched else load_vae(wan_model)
    scale = 2 if patched else 1
    latents = torch.randn(2, 2, vae.config.z_dim, 3, 5, generator=generator)
    plain = decode_latents(vae, latents)
    if tiles is not None:
        vae.enable_tiling(*(scale * size for size in tiles))
    if slicing:
        vae.enable_slicing()
    expected = decode_latents(vae, latents)
    assert (tiles is None) == torch.allclose(plain, expected, atol=1e-4)
    assert_same(decoded(ChunkDecoder(vae), latents, [1, 1]), expected)


def test_tiling_is_left_out_where_a_frame_fits_in_a_tile(vae, latents) -> None:
    expected = decode_latents(vae, latents)
    vae.enable_tiling()
    assert_same(decoded(ChunkDecoder(vae), latents), expected)


def test_settings_are_those_of_the_first_chunk(vae, latents) -> None:
    latents = latents[:, :3]
    vae.enable_tiling(24, 32, 16, 24)
    expected = decode_latents(vae, latents)
    decoder = ChunkDecoder(vae)
    first = decoder.decode(latents[:, :1])
    vae.disable_tiling()
    vae.enable_slicing()
    assert_same(torch.cat([first, decoder.decode(latents[:, 1:])], dim=1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frames_have_the_dtype_of_the_vae(vae, latents, dtype) -> None:
    vae.to(dtype)
    frames, expected = decoded(ChunkDecoder(vae), latents), decode_latents(vae, latents)
    assert frames.dtype == dtype
    # one step of the dtype below 1
    torch.testing.assert_close(frames, expected, rtol=0, atol=torch.finfo(dtype).eps)


def test_decoders_and_the_vae_do_not_disturb_each_other(vae, latents, generator) -> None:
    """Interleave two decoders with ``decode`` and ``encode``, whose own results are compared."""
    other = torch.randn(1, 6, 16, 2, 4, generator=generator)
    expected = [decode_latents(vae, latents), decode_latents(vae, other)]
    pixels = torch.rand(1, 3, 5, 16, 32, generator=generator)
    moments = vae.encode(pixels).latent_dist.parameters
    decoders, frames = [ChunkDecoder(vae), ChunkDecoder(vae)], ([], [])
    attributes = dict(vars(vae))
    for i in range(0, 6, 2):
        frames[0].append(decoders[0].decode(latents[:, i : i + 2]))
        frames[1].append(decoders[1].decode(other[:, i : i + 2]))
        assert vars(vae) == attributes
        assert torch.equal(decode_latents(vae, other), expected[1])
        assert torch.equal(vae.encode(pixels).latent_dist.parameters, moments)
        attributes = dict(vars(vae))  # the VAE's own methods replace its lists
    for made, whole in zip(frames, expected, strict=True):
        assert_same(torch.cat(made, dim=1), whole)


def test_a_chunk_that_fails_ends_its_video_and_no_other(vae, latents) -> None:
    """Let the last convolution raise in the middle of a chunk, as out of memory does."""
    expected = decode_latents(vae, latents)
    broken, whole = ChunkDecoder(vae), ChunkDecoder(vae)
    first = broken.decode(latents[:, :2])
    start = whole.decode(latents[:, :2])
    attributes, calls = dict(vars(vae)), []

    def fail(module, args):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError("no memory for the second latent frame")

    handle = vae.decoder.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="second latent frame"):
        broken.decode(latents[:, 2:5])
    handle.remove()
    assert len(calls) == 2 and vars(vae) == attributes
    with pytest.raises(RuntimeError, match="with a new ChunkDecoder"):
        broken.decode(latents[:, 2:5])
    assert_same(first, expected[:, :5])
    assert_same(torch.cat([start, whole.decode(latents[:, 2:])], dim=1), expected)
    assert torch.equal(decode_latents(vae, latents), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_named_by_their_video(vae, latents, value) -> None:
    decoder = ChunkDecoder(vae)
    decoder.decode(latents[:, :3])
    latents[1, 4, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match="latents to be decoded .* in video 2 of 2"):
        decoder.decode(latents[:, 3:])


def test_weights_that_are_not_finite_are_named_by_the_frames(vae, latents) -> None:
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="decoded frames .* in videos 1, 2 of 2"):
        ChunkDecoder(vae).decode(latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], "had B=2, and a later one must have it too, got 1"),
        (lambda x: x[..., :5], "had w=6"),
        (lambda x: x[..., :3, :], "had h=4"),
        (lambda x: x[:, :0], r"must be \[B, F', C=16, h, w\], got \(2, 0, 16, 4, 6\)"),
        (lambda x: x[:, :, :15], r"got \(2, 6, 15, 4, 6\)"),
        (lambda x: x[0], r"got \(6, 16, 4, 6\)"),
    ],
)
def test_a_refused_chunk_leaves_the_video_as_it_was(vae, latents, change, message) -> None:
    decoder = ChunkDecoder(vae)
    first = decoder.decode(latents[:, :2])
    with pytest.raises(ValueError, match=message):
        decoder.decode(change(latents))
    frames = torch.cat([first, decoder.decode(latents[:, 2:])], dim=1)
    assert_same(frames, decode_latents(vae, latents))


def test_another_dtype_or_class_of_vae_is_refused(vae, latents) -> None:
    decoder = ChunkDecoder(vae)
    decoder.decode(latents)
    with pytest.raises(ValueError, match="dtype of the VAE=torch.float32"):
        vae.to(torch.bfloat16)
        decoder.decode(latents)
    with pytest.raises(ValueError, match="with an AutoencoderKLWan, got AutoencoderKL$"):
        ChunkDecoder(AutoencoderKL(block_out_channels=(8,), norm_num_groups=2))


@pytest.mark.parametrize(
    ("tiled", "few", "many"),
    [
        (False, 4, 8),
        pytest.param(False, 8, 32, marks=pytest.mark.slow),
        pytest.param(True, 8, 32, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_number_of_chunks(
    vae, generator, tiled: bool, few: int, many: int
) -> None:
    """Count the bytes of all storages that are alive; features are complete after two chunks."""
    if tiled:
        vae.enable_tiling(16, 16, 16, 16)
    chunk = torch.randn(1, 1, 16, 2, 3, generator=generator)
    peaks, kept = [], []
    for count in (few, many):
        with Allocations() as memory:
            decoder = ChunkDecoder(vae)
            for _ in range(count):
                decoder.decode(chunk)
            peaks.append(memory.peak)
            kept.append(memory.now)
    assert peaks[0] == peaks[1] and 0 < kept[0] == kept[1] < peaks[0]


@pytest.mark.parametrize("kind", ["model", "sequential", "block_level", "leaf_level"])
def test_offloaded_weights_are_brought_for_every_chunk(vae, latents, kind: str) -> None:
    """Offload as diffusers does; sequential offloading keeps weights on the meta device."""
    expected = decode_latents(vae, latents)
    if kind == "sequential":
        cpu_offload(vae, execution_device=torch.device("cpu"), offload_buffers=True)
        assert all(p.is_meta for p in vae.parameters())
    elif kind != "model":
        vae.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1
        )
    if kind == "model":
        frames, brought = _decoded_with_model_offloading(vae, latents)
        assert brought == len(CHUNKS)
    else:
        frames = decoded(ChunkDecoder(vae), latents)
    assert_same(frames, expected)
    assert kind != "sequential" or all(p.is_meta for p in vae.parameters())


class _CountedOffload(CpuOffload):
    """Count how often accelerate brings the weights of a module."""

    brought = 0

    def pre_forward(self, module, *args, **kwargs):
        self.brought += 1
        return super().pre_forward(module, *args, **kwargs)


def _decoded_with_model_offloading(vae: AutoencoderKLWan, latents: Tensor) -> tuple[Tensor, int]:
    """Decode with the hook of ``enable_model_cpu_offload`` on the VAE."""
    hook = _CountedOffload(torch.device("cpu"))
    add_hook_to_module(vae, hook)
    return decoded(ChunkDecoder(vae), latents), hook.brought


@pytest.mark.slow
def test_a_compiled_vae_is_decoded_with_its_own_modules(vae, latents) -> None:
    compiled = torch.compile(copy.deepcopy(vae))
    assert_same(decoded(ChunkDecoder(compiled), latents), decode_latents(vae, latents))
