"""Compare model FLOPs with torch's counter, on diffusers' networks and every call of an update."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anyflow.data import Batch, SyntheticVideos
from anyflow.methods import OnPolicyConfig, PretrainConfig
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.models.causal_cache import encode_chunks
from anyflow.models.chunks import ChunkPartition
from anyflow.ops import use_backend
from anyflow.training.config import LoRAConfig, NetworkConfig, Recipe
from anyflow.training.distributed import Mesh
from anyflow.training.flops import (
    ChunkFlops,
    NetworkFlops,
    chunk_flops,
    network_flops,
    peak_flops,
    token_count,
)
from anyflow.training.networks import build_student
from anyflow.training.trainer import _build_updates

Make = Callable[..., Recipe]
TEXT = 4


def _counted(recipe: Recipe) -> tuple[NetworkFlops, int, int]:
    """Return our count, and torch's of forward and backward of diffusers' network."""
    ours = build_student(recipe)
    settings = dataclasses.asdict(recipe.student.architecture)
    theirs = WanTransformer3DModel(**settings)
    if recipe.student.lora is not None:
        from peft import LoraConfig

        lora = recipe.student.lora
        theirs.requires_grad_(False)
        theirs.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
        )
        for name in lora.trained_modules:
            theirs.get_submodule(name).requires_grad_(True)
    data = SyntheticVideos()
    frames, channels, height, width = data.latent_shape
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        video = theirs(
            torch.randn(1, channels, frames, height, width),
            torch.tensor([500.0]),
            torch.randn(1, TEXT, 32),
        ).sample
        forward = counter.get_total_flops()
        video.sum().backward()
    counted = network_flops(ours, token_count(ours, data.latent_shape), TEXT)
    return counted, forward, counter.get_total_flops() - forward


def test_a_network_that_trains_in_full_is_counted_exactly(small_recipe: Make) -> None:
    counted, forward, backward = _counted(small_recipe("unused", stage="teacher"))
    assert (counted.forward, counted.backward) == (forward, backward)


def test_a_network_with_adapters_is_counted_exactly(small_recipe: Make) -> None:
    """Count no gradient of frozen weights, and none at all for the text."""
    lora = LoRAConfig(rank=2, trained_modules=("condition_embedder.time_embedder",))
    student = dataclasses.replace(small_recipe("unused").student, lora=lora)
    counted, forward, backward = _counted(small_recipe("unused", stage="teacher", student=student))
    assert (counted.forward, counted.backward) == (forward, backward)


class _Calls:
    """Hold what networks are called with, and what of it has a gradient."""

    def __init__(self, **networks: AnyFlowTransformer3DModel) -> None:
        self.forward = dict.fromkeys(networks, 0)
        self.backward = dict.fromkeys(networks, 0)
        for name, network in networks.items():
            network.register_forward_hook(self._note(name), with_kwargs=True)

    def _note(self, name: str) -> Any:
        def note(network: Any, args: Any, kwargs: Any, output: Any) -> None:
            samples = len(kwargs["hidden_states"])
            self.forward[name] += samples
            self.backward[name] += samples if output[0].requires_grad else 0

        return note


def _batch() -> Batch:
    data = SyntheticVideos()
    samples = [data[i] for i in range(4)]
    return Batch(
        *(torch.stack([getattr(s, n) for s in samples]) for n in ("latents", "prompt_embeds")),
        range(4),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrain": PretrainConfig()},
        {"pretrain": PretrainConfig(fuse_guidance_scale=1.0, prompt_dropout=0.1)},
        {"stage": "teacher"},
        {"gradient_accumulation": 2},
    ],
    ids=["guided", "not guided", "flow matching", "micro-steps"],
)
def test_every_call_of_a_pretrain_update_is_counted(
    changes: dict[str, Any], small_recipe: Make
) -> None:
    recipe = small_recipe("unused", **changes)
    step = _build_updates(recipe, Mesh(torch.device("cpu")), SyntheticVideos())
    calls = _Calls(student=step.student)
    step.update([_batch()] * recipe.gradient_accumulation, 0)
    one = network_flops(
        step.student, token_count(step.student, SyntheticVideos().latent_shape), TEXT
    )
    assert (
        step.flops
        == calls.forward["student"] * one.forward + calls.backward["student"] * one.backward
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rollout": "euler"},
        {"grad_through": "step", "real_guidance_scale": 0.0},
        {"cotrain_pretrain": False},
    ],
    ids=str,
)
def test_every_call_of_an_on_policy_update_is_counted(
    settings: dict[str, Any], small_recipe: Make
) -> None:
    recipe = small_recipe("unused", stage="on_policy")
    method = OnPolicyConfig(**{"num_steps": (1, 2, 4), "cotrain_pretrain": True} | settings)
    stage = dataclasses.replace(recipe.on_policy, method=method, generator_update_interval=2)
    recipe = dataclasses.replace(recipe, on_policy=stage)
    step = _build_updates(recipe, Mesh(torch.device("cpu")), SyntheticVideos())
    networks = {"student": step.student, "teacher": step.method.teacher, "critic": step.critic}
    tokens = token_count(step.student, SyntheticVideos().latent_shape)
    ones = {name: network_flops(network, tokens, TEXT) for name, network in networks.items()}
    calls = _Calls(**networks)
    counted = 0
    for index in range(2):  # with and without the student
        step.update([_batch()], index)
        counted += step.flops
    expected = sum(
        calls.forward[n] * ones[n].forward + calls.backward[n] * ones[n].backward for n in networks
    )
    assert counted == expected
    assert ones["teacher"].backward == 0 < calls.forward["teacher"]


def test_a_network_of_the_published_size_needs_what_its_parameters_suggest() -> None:
    """Count 6 FLOPs a parameter and token; attention comes on top."""
    with torch.device("meta"):
        network = AnyFlowTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
    counted = network_flops(network, 100, 0)
    blocks = sum(p.numel() for p in network.blocks.parameters())
    text = sum(
        p.numel() for b in network.blocks for p in (b.attn2.to_k.weight, b.attn2.to_v.weight)
    )
    assert counted.forward + counted.backward == pytest.approx(6 * 100 * (blocks - text), rel=0.02)


def test_peaks_are_found_by_the_name_of_the_device() -> None:
    assert (
        peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    )
    assert (
        peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
        and peak_flops("NVIDIA GeForce GTX 1080") is None
    )


def test_forward_mode_costs_an_evaluation_and_its_tangent(small_recipe: Make) -> None:
    student = NetworkConfig(architecture=small_recipe("unused").student.architecture)
    pretrain = PretrainConfig(derivative="jvp", fuse_guidance_scale=1.0)
    step = _build_updates(
        small_recipe("unused", student=student, pretrain=pretrain),
        Mesh(torch.device("cpu")),
        SyntheticVideos(),
    )
    step.update([_batch()], 0)
    tokens = token_count(step.student, SyntheticVideos().latent_shape)
    one = network_flops(step.student, tokens, TEXT)
    attention = 2 * 4 * 24 * tokens * (tokens + TEXT)  # two blocks of width 24
    assert one.tangent == one.forward + attention
    assert step.flops == 4 * (one.forward + one.backward) + 2 * (one.forward + one.tangent)


class _Causal:
    """Run a small causal model on 1 + 2 + 1 + 2 frames, two chunks full, and count by torch."""

    def __init__(self) -> None:
        self.model = AnyFlowFARTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            full_chunk_limit=2,
            chunk_partition=(1, 2, 1, 2),
        )
        self.partition = ChunkPartition(self.model.config.chunk_partition)
        self.shape = (6, 16, 8, 4)
        self.text = torch.randn(1, TEXT, 32)

    def counted(self, num_chunks: int = 4) -> ChunkFlops:
        sizes = (self.partition, self.shape, TEXT)
        return chunk_flops(self.model, *sizes, num_chunks=num_chunks, bidirectional=False)

    def flops(self, run: Callable[[], torch.Tensor]) -> tuple[int, int]:
        """Return torch's count of forward and backward."""
        with (
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
            use_backend("eager"),
        ):
            out = run()
            forward = counter.get_total_flops()
            if out.requires_grad:
                out.square().sum().backward()
            return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4])
def test_chunks_of_training_are_counted_exactly(num_chunks: int) -> None:
    """Count the last block's outputs only, and the last chunk without a clean copy."""
    causal = _Causal()
    chunks = causal.partition.first(num_chunks)
    noisy = chunks.num_frames - chunks.ends[chunks.num_compressed(2)]
    x, t = torch.randn(1, chunks.num_frames, *causal.shape[1:]), torch.tensor([500.0])
    forward, backward = causal.flops(
        lambda: (
            causal.model(
                x, t, t, causal.text, chunks.sizes, clean_hidden_states=x[:, -noisy:]
            ).sample
        )
    )
    counted = causal.counted(num_chunks).training
    assert (counted.forward, counted.backward) == (forward, backward)


def test_steps_and_encodings_of_a_rollout_are_counted_exactly() -> None:
    causal = _Causal()
    cache = causal.model.new_cache()
    t, video = torch.tensor([500.0]), torch.randn(1, *causal.shape)
    forward = backward = encoding = 0
    for chunk in range(4):
        latents = {c: video[:, causal.partition.frames(c)] for c in range(4)}
        if chunk:

            def encode(chunk: int = chunk, latents: dict[int, torch.Tensor] = latents) -> Any:
                with torch.no_grad():
                    encode_chunks(causal.model, cache, chunk, latents, causal.text)
                return torch.zeros(())

            encoding += causal.flops(encode)[0]
        x = latents[chunk]
        both = causal.flops(lambda x=x: causal.model(x, t, t, causal.text, cache=cache).sample)
        forward, backward = forward + both[0], backward + both[1]
    counted = causal.counted()
    assert (counted.step.forward, counted.step.backward) == (forward, backward)
    assert counted.encoding == encoding


@pytest.mark.parametrize("stage", ["pretrain", "on_policy"])
def test_every_product_of_a_causal_update_is_counted(stage: str, small_recipe: Make) -> None:
    """Compare with torch's count, which has the text of clean frames beside that of noisy ones."""
    recipe = small_recipe("unused", stage=stage, causal=True, activation_checkpointing=False)
    step = _build_updates(recipe, Mesh(torch.device("cpu")), SyntheticVideos())
    for index in range(2):  # the second has another number of chunks
        with (
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
            use_backend("eager"),
        ):
            step.update([_batch()], index)
        assert step.flops == pytest.approx(counter.get_total_flops(), rel=0.03)
        assert step.flops <= counter.get_total_flops()
