"""Compare the causal model with the reference trainers' numbers, and with its own definition."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyflow.models import (
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    use_attention_backend,
)
from anyflow.models.causal_cache import encode_chunks
from anyflow.models.chunks import ChunkPartition, FrameTokens, TokenLayout, chunk_layout
from anyflow.sampling import sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

TOKENS = FrameTokens(height=2, width=4, ratio=(2, 2))


def _training(model: Any, reference: Any) -> Tensor:
    return model(
        reference["fwd.x"],
        reference["fwd.t"],
        reference["fwd.r"],
        reference["prompt_embeds"][:2],
        clean_hidden_states=reference["fwd.clean"],
    ).sample


def _bidirectional(reference: Any) -> AnyFlowTransformer3DModel:
    causal = reference.model()
    own = ("compressed_patch_size", "full_chunk_limit", "chunk_partition")
    model = AnyFlowTransformer3DModel(
        **{k: v for k, v in causal.config.items() if k[:1] != "_" and k not in own}
    )
    weights = causal.state_dict()
    model.load_state_dict({k: v for k, v in weights.items() if "far_patch" not in k})
    return model


# Against the reference trainers -------------------------------------------------------------------


def test_the_compressed_embedding_is_that_of_the_reference(causal_reference, relative) -> None:
    model = AnyFlowFARTransformer3DModel.from_bidirectional(_bidirectional(causal_reference))
    embedding = model.far_patch_embedding
    for name in ("weight", "bias"):
        expected = causal_reference[f"init.far_patch_embedding.{name}"]
        assert relative(getattr(embedding, name).detach(), expected) <= 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_velocities_and_gradients_are_those_of_the_reference(
    checkpointing, causal_reference, relative
) -> None:
    model = causal_reference.model()
    if checkpointing:
        model.enable_gradient_checkpointing()
    velocity = _training(model, causal_reference)
    assert relative(velocity.detach(), causal_reference["fwd.y"]) <= 1e-5
    velocity.square().mean().backward()
    parameters = dict(model.named_parameters())
    expected = {k: v for k, v in causal_reference.tensors.items() if k.startswith("fwd.grad.")}
    assert "fwd.grad.far_patch_embedding.weight" in expected
    for name, gradient in expected.items():
        own = parameters[name.removeprefix("fwd.grad.")].grad
        assert relative(own, gradient) <= 1e-4, name


@torch.no_grad()
def test_the_other_layouts_are_those_of_the_reference(causal_reference, relative) -> None:
    """Compare the plain layout, a video without compressed chunks, and the bidirectional path."""
    r, model = causal_reference, causal_reference.model()
    x, t, r_, text = r["fwd.x"], r["fwd.t"], r["fwd.r"], r["prompt_embeds"][:2]
    assert relative(model(x, t, r_, text).sample, r["fwd_plain.y"]) <= 1e-5
    n = 5
    short = model(
        x[:, -n:],
        t[:, -n:],
        r_[:, -n:],
        text,
        chunk_partition=r.variant["partition"][:3],
        clean_hidden_states=x[:, :n],
    ).sample
    assert relative(short, r["fwd_short.y"]) <= 1e-5
    both = model(x, t, r_, text, is_causal=False).sample
    assert relative(both, r["fwd_bidirectional.y"]) <= 1e-5
    base = _bidirectional(r)(x, t, r_, text).sample
    assert torch.equal(both, base)


# The layouts against their definition -------------------------------------------------------------

partitions = st.lists(st.integers(1, 4), min_size=1, max_size=7).map(tuple)


def _visible(layout: TokenLayout, length: int) -> Tensor:
    """Return which key a query attends to, by the groups."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for group in layout.groups:
        for start, stop in group.keys:
            assert not seen[slice(*group.queries), start:stop].any(), "a key counts twice"
            seen[slice(*group.queries), start:stop] = True
    return seen


def _tokens(partition: ChunkPartition, limit: int, clean: bool) -> tuple[Tensor, Tensor]:
    """Return the chunk of every token, and its kind: 0 compressed, 1 noisy, 2 clean."""
    compressed, n = partition.num_compressed(limit), len(partition)
    parts = [(c, 0, TOKENS.compressed) for c in range(compressed)]
    parts += [(c, 2, TOKENS.full) for c in range(compressed, n - 1)] if clean else []
    parts += [(c, 1, TOKENS.full) for c in range(compressed, n)]
    counts = torch.tensor([partition.sizes[c] * tokens for c, _, tokens in parts])
    chunk, kind = (
        torch.tensor([part[i] for part in parts]).repeat_interleave(counts) for i in (0, 1)
    )
    return chunk, kind


@settings(max_examples=60)
@given(partitions, st.integers(1, 4), st.booleans())
def test_tokens_attend_to_what_the_definition_says(sizes, limit, clean) -> None:
    """Build the dense mask of the definition, and compare every pair of tokens."""
    partition = ChunkPartition(sizes)
    layout = chunk_layout(partition, limit, TOKENS, clean=clean)
    chunk, kind = _tokens(partition, limit, clean)
    cq, ck, kq, kk = chunk[:, None], chunk[None], kind[:, None], kind[None]
    expected = cq >= ck
    if clean:
        expected &= ~((kq == 2) & (kk == 1))
        expected &= ~((kq == 1) & (kk == 1) & (cq != ck))
        expected &= ~((kq == 1) & (kk == 2) & (cq == ck))
    assert torch.equal(_visible(layout, len(chunk)), expected)
    start, stop = layout.outputs
    assert torch.equal((kind == 1).nonzero().flatten(), torch.arange(start, stop))
    full = min(limit, len(sizes))
    attentions = partition.num_compressed(limit) + (2 * full - 1 if clean else full)
    assert len(layout.groups) == attentions


@torch.no_grad()
def test_nothing_depends_on_the_clean_copy_of_the_last_chunk(causal_reference) -> None:
    model, r = causal_reference.model(), causal_reference
    changed = r["fwd.clean"].clone()
    changed[:, -1:] += 1000
    velocity = _training(model, r)
    altered = copy.copy(r.tensors) | {"fwd.clean": changed}
    assert torch.equal(_training(model, altered), velocity)
    changed[:, -2:-1] += 1
    assert not torch.allclose(_training(model, altered), velocity)


@torch.no_grad()
def test_training_computes_no_token_more_than_it_needs(causal_reference) -> None:
    """Count tokens of each layer: all but the clean copy of the last chunk go in.

    The last layer gives noisy tokens only.
    """
    model, counts = causal_reference.model(), []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, inputs, out: counts.append((inputs[0].shape[1], out.shape[1]))
        )
    _training(model, causal_reference)
    compressed, noisy, clean = 5 * 2, 4 * 8, 3 * 8
    every = compressed + noisy + clean
    assert counts == [(every, every), (every, noisy)]


@torch.no_grad()
def test_no_layout_makes_a_matrix_of_scores(causal_reference) -> None:
    """Look at every tensor that operators return: none has a number for each pair of tokens."""
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = function(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    model = causal_reference.model()
    x = torch.randn(1, 9, 16, 32, 32)
    t = torch.tensor([900.0])
    tokens = 9 * 256 + 3 * 256 - 5 * 192
    with Largest():
        model(x, t, t, causal_reference["prompt_embeds"][:1], clean_hidden_states=x[:, 5:])
    assert tokens * 48 <= max(largest) < tokens * tokens / 8


@torch.no_grad()
def test_a_model_without_a_second_time_takes_clean_copies_too(causal_reference, tiny) -> None:
    """Train and sample the plain model, whose times have no interval."""
    model = AnyFlowFARTransformer3DModel(**tiny, r_embedder=False, chunk_partition=(1, 1, 1, 1))
    x, text = torch.randn(1, 4, 16, 4, 4), torch.randn(1, 5, 20)
    t = torch.tensor([500.0])
    velocity = model(x, t, None, text, clean_hidden_states=x[:, 1:]).sample
    assert velocity.shape == (1, 3, 16, 4, 4)
    scheduler = FlowMapEulerDiscreteScheduler()
    options = {"num_inference_steps": 2, "use_mean_velocity": False}
    cached = sample_causal(model, scheduler, x, text, **options)
    recomputed = sample_causal(model, scheduler, x, text, **options, use_cache=False)
    torch.testing.assert_close(cached, recomputed, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no second timestep branch"):
        sample_causal(model, scheduler, x, text)


# Weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (4, 8), (6, 6)])
def test_the_compressed_embedding_is_torchs_interpolation(size, relative, tiny) -> None:
    model = AnyFlowFARTransformer3DModel(**tiny, compressed_patch_size=(1, *size))
    expected = nn.functional.interpolate(
        model.patch_embedding.weight, size=(1, *size), mode="trilinear"
    )
    assert relative(model.far_patch_embedding.weight.detach(), expected.detach()) <= 1e-6
    assert torch.equal(model.far_patch_embedding.bias, model.patch_embedding.bias)


def test_a_causal_model_is_made_of_a_bidirectional_one_on_any_device(tiny) -> None:
    """Check values in bf16, that nothing is shared, and that the meta device works."""
    base = AnyFlowTransformer3DModel(**tiny, gate_value=0.4, deltatime_type="t-r").eval()
    base.to(torch.bfloat16)
    causal = AnyFlowFARTransformer3DModel.from_bidirectional(
        base, full_chunk_limit=2, chunk_partition=(1, 2)
    )
    assert not causal.training
    assert causal.config.gate_value == 0.4 and causal.config.deltatime_type == "t-r"
    assert causal.config.full_chunk_limit == 2 and tuple(causal.config.chunk_partition) == (1, 2)
    own = dict(causal.named_parameters())
    for name, parameter in base.named_parameters():
        assert torch.equal(own[name], parameter) and own[name].dtype == torch.bfloat16
        assert own[name].data_ptr() != parameter.data_ptr()
    assert own["far_patch_embedding.weight"].dtype == torch.bfloat16
    with torch.device("meta"):
        empty = AnyFlowTransformer3DModel(**tiny)
    made = AnyFlowFARTransformer3DModel.from_bidirectional(empty)
    assert {p.device.type for p in made.parameters()} == {"meta"}
    made.to_empty(device="cpu").load_state_dict(causal.state_dict())


def test_settings_that_cannot_be_are_refused(tiny) -> None:
    for options, match in (
        ({"compressed_patch_size": (1, 3, 4)}, "multiple of patch_size"),
        ({"compressed_patch_size": (2, 4, 4)}, "begin with 1"),
        ({"compressed_patch_size": (4, 4)}, "three positive integers"),
        ({"full_chunk_limit": 0}, "full_chunk_limit"),
        ({"chunk_partition": ()}, "chunk_partition"),
        ({"chunk_partition": (1, 0)}, "chunk 1"),
    ):
        with pytest.raises(ValueError, match=match):
            AnyFlowFARTransformer3DModel(**tiny, **options)


# Calls that cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"chunk_partition": (1, 2, 2)}, "has 5 latent frames, and the video has 9"),
        ({"chunk_partition": (9, 0)}, "chunk 1"),
        ({"hidden_states": torch.zeros(2, 9, 16, 6, 8)}, "height 6 must be .* multiple of 4"),
        ({"hidden_states": torch.zeros(2, 9, 16, 4, 10)}, "width 10 must be .* multiple of 4"),
        ({"clean_hidden_states": torch.zeros(2, 3, 16, 4, 8)}, "the 4 full frames"),
        ({"clean_timestep": torch.zeros(2, 3)}, "clean_timestep"),
        ({"timestep": torch.zeros(2, 4)}, "timestep"),
        ({"r_timestep": torch.zeros(2)}, "r_timestep"),
        ({"timestep": None}, "timestep is required"),
        ({"encoder_hidden_states": None}, "encoder_hidden_states is required"),
        ({"encoder_hidden_states": torch.zeros(1, 7, 16)}, "encoder_hidden_states must be"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_weight_runs(change, match, causal_reference) -> None:
    r, model, ran = causal_reference, causal_reference.model(), []
    for module in model.modules():
        if list(module.parameters(recurse=False)) and not isinstance(module, type(model)):
            module.register_forward_hook(lambda *_: ran.append(True))
    arguments = {
        "hidden_states": r["fwd.x"],
        "timestep": r["fwd.t"],
        "r_timestep": r["fwd.r"],
        "encoder_hidden_states": r["prompt_embeds"][:2],
        "clean_hidden_states": r["fwd.clean"],
    }
    if "hidden_states" in change:
        arguments["clean_hidden_states"] = change["hidden_states"][:, 5:]
    with pytest.raises(ValueError, match=match):
        model(**(arguments | change))
    assert not ran


@torch.no_grad()
def test_sizes_that_only_full_frames_can_have_work_without_compressed_ones(tiny) -> None:
    model = AnyFlowFARTransformer3DModel(**tiny, chunk_partition=(1, 2, 1))
    x = torch.randn(1, 4, 16, 6, 10)
    t = torch.tensor([700.0])
    assert model(x, t, t, torch.randn(1, 5, 20)).sample.shape == x.shape


# Times --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_time_per_sample_is_that_of_the_full_frames(causal_reference, relative) -> None:
    r, model = causal_reference, causal_reference.model(torch.float64)
    x, text, clean = (v.double() for v in (r["fwd.x"], r["prompt_embeds"][:2], r["fwd.clean"]))
    t, s = torch.tensor([900.0, 300.0]), torch.tensor([100.0, 300.0])
    frames = [torch.cat([torch.zeros(2, 5), v[:, None].expand(2, 4)], 1) for v in (t, s)]
    for copies in (None, clean):
        one = model(x, t, s, text, clean_hidden_states=copies).sample
        every = model(x, *frames, text, clean_hidden_states=copies).sample
        assert relative(one, every) <= 1e-12


@torch.no_grad()
def test_a_clean_copy_has_no_interval_at_any_time(causal_reference, relative) -> None:
    """Embed t = r = 300 for clean copies: with ``"t-r"`` the second branch sees 0.

    The copies' velocity cannot be read, so that noise-free frames in the plain layout stand for
    them: the first noisy chunk that sees them must agree.
    """
    model = causal_reference.model(torch.float64, deltatime_type="t-r")
    x = causal_reference["fwd.x"][:, :2].double()
    text = causal_reference["prompt_embeds"][:2].double()
    t = torch.tensor([[300.0, 800.0]]).expand(2, 2)
    r = torch.tensor([[300.0, 200.0]]).expand(2, 2)
    plain = model(x, t, r, text, chunk_partition=(1, 1)).sample[:, 1:]
    trained = model(
        x,
        t,
        r,
        text,
        chunk_partition=(1, 1),
        clean_hidden_states=x,
        clean_timestep=torch.full((2,), 300.0),
    ).sample[:, 1:]
    assert relative(trained, plain) <= 1e-12


# Caches, and what runs around a model -------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_gradients_through_cached_steps_are_exact_under_checkpointing(
    limit, causal_reference
) -> None:
    """Sample two chunks with gradients and caches without; compare with no checkpointing.

    A cache that later chunks write into would give the first chunks other gradients.
    """

    def gradients(checkpointing: bool) -> list[Tensor]:
        model = causal_reference.model(full_chunk_limit=limit)
        if checkpointing:
            model.enable_gradient_checkpointing()
        text = causal_reference["prompt_embeds"][:2]
        cache, done, outputs = model.new_cache((1, 2, 2)), {}, []
        for chunk, frames in enumerate((slice(0, 1), slice(1, 3), slice(3, 5))):
            if chunk:
                with torch.no_grad():
                    encode_chunks(model, cache, chunk, done, text)
            x = causal_reference["fwd.x"][:, frames]
            t = torch.full((2,), 900.0)
            velocity = model(x, t, torch.zeros(2), text, cache=cache).sample
            outputs.append(x - 0.9 * velocity)
            done[chunk] = outputs[-1].detach()
        torch.cat(outputs, 1).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 50
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@torch.no_grad()
def test_every_attention_backend_gives_the_same_velocity(causal_reference, relative) -> None:
    model = causal_reference.model()
    expected = _training(model, causal_reference)
    for name in ("math", "native"):
        with use_attention_backend(name):
            assert relative(_training(model, causal_reference), expected) <= 1e-6
    model.set_attention_backend("math")
    assert relative(_training(model, causal_reference), expected) <= 1e-6


def test_adapters_train_and_scale(causal_reference, relative) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    model = causal_reference.model()
    with torch.no_grad():
        plain = _training(model, causal_reference)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    adapted = _training(model, causal_reference)
    adapted.square().mean().backward()
    assert relative(adapted.detach(), plain) > 1e-2
    with torch.no_grad():
        off = model(
            causal_reference["fwd.x"],
            causal_reference["fwd.t"],
            causal_reference["fwd.r"],
            causal_reference["prompt_embeds"][:2],
            clean_hidden_states=causal_reference["fwd.clean"],
            attention_kwargs={"scale": 0.0},
        ).sample
    assert relative(off, plain) <= 1e-6
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained and all("lora" in name for name in trained)


@pytest.mark.slow
def test_blocks_compile_without_a_graph_break(causal_reference, relative) -> None:
    """Compile the blocks for training, cached steps and encodings; a second video compiles none."""
    torch._dynamo.reset()
    model, counter = causal_reference.model(), CompileCounterWithBackend("eager")
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    noise, text = causal_reference["roll.noise_bfchw"], causal_reference["prompt_embeds"][:2]
    with torch.no_grad():
        velocity = _training(model, causal_reference)
    video = sample_causal(model, scheduler, noise, text, num_inference_steps=1)
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    compiled = _training(model, causal_reference)
    compiled.square().mean().backward()
    assert relative(compiled.detach(), velocity) <= 1e-6
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        again = sample_causal(model, scheduler, noise, text, num_inference_steps=1)
        assert relative(again, video) <= 1e-6
    compiled_once = counter.frame_count
    assert 0 < compiled_once <= 32
    sample_causal(model, scheduler, noise, text, num_inference_steps=2)
    assert counter.frame_count == compiled_once


def test_a_cached_call_takes_the_cache_alone(causal_reference) -> None:
    model, r = causal_reference.model(), causal_reference
    cache, t, text = model.new_cache(), torch.zeros(2), r["prompt_embeds"][:2]
    with pytest.raises(ValueError, match="give neither clean_hidden_states nor"):
        model(r["fwd.x"], t, t, text, (1, 2), cache=cache)
    with pytest.raises(ValueError, match="has 9 frames, and the chunk after the cache has 1"):
        model(r["fwd.x"], t, t, text, cache=cache)
    with pytest.raises(ValueError, match="encode needs the cache"):
        model(r["fwd.x"], encoder_hidden_states=text, encode=cache.plan(1))


def test_the_size_of_a_cache_is_known_beforehand(causal_reference) -> None:
    model = causal_reference.model()
    for limit, window in ((1, None), (3, None), (3, 2)):
        model.register_to_config(full_chunk_limit=limit)
        cache = model.new_cache(window=window)
        text, x, sizes = causal_reference["prompt_embeds"][:2], causal_reference["fwd.x"], []
        chunks = {c: x[:, cache.partition.frames(c)] for c in range(6)}
        for chunk in range(1, 6):
            with torch.no_grad():
                encode_chunks(model, cache, chunk, chunks, text)
            sizes.append(cache.num_bytes)
        assert max(sizes) == model.cache_bytes(4, 8, batch_size=2, window=window)


def test_cache_sizes_of_the_published_models_are_those_of_the_arithmetic() -> None:
    """Count keys and values of 480 x 832: at most 9360 full and 5070 compressed tokens."""
    for heads, layers, gib in ((12, 30, 2.5), (40, 40, 11.0)):
        with torch.device("meta"):
            model = AnyFlowFARTransformer3DModel(num_attention_heads=heads, num_layers=layers)
        size = model.cache_bytes(60, 104, dtype=torch.bfloat16)
        assert size == 2 * (9360 + 13 * 390) * heads * 128 * 2 * layers
        assert size / 2**30 == pytest.approx(gib, abs=0.05)
