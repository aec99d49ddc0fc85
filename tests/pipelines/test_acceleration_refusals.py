"""Test what accelerate() and restore() refuse, and how they treat offloading."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from tiny_diffusers import TINY, assert_same, build, latents, randomized, transformers
from torch import nn

import anyflow
from anyflow.models import AnyFlowTransformer3DModel


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_restore_is_refused_while_weights_are_offloaded_by_groups(level) -> None:
    pipe = anyflow.accelerate(build("anyflow"))
    expected, cpu = latents(pipe), torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    pipe.transformer.enable_group_offload(cpu, cpu, level, **blocks)
    ours = pipe.transformer
    with pytest.raises(ValueError, match="restore: the transformer has a hook of diffusers"):
        anyflow.restore(pipe)
    assert anyflow.accelerate(pipe).transformer is ours
    assert torch.equal(latents(pipe), expected)


def test_restore_is_refused_where_another_pipeline_offloads() -> None:
    pipe = build("anyflow")
    pipe.enable_model_cpu_offload(device="cpu")
    other = type(pipe).from_pipe(anyflow.accelerate(pipe))
    with pytest.raises(
        ValueError, match="restore: the transformer has a hook of the package accelerate"
    ):
        anyflow.restore(other)
    anyflow.restore(pipe)


@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan-2.2"])
@pytest.mark.parametrize("first", ["offload", "accelerate"])
def test_model_offloading(kind, first) -> None:
    """Offload with the CPU as the device, which takes the same hooks."""
    pipe = build(kind)
    expected = latents(pipe)
    steps: list[Callable[[], object]] = [
        lambda: pipe.enable_model_cpu_offload(device="cpu"),
        lambda: anyflow.accelerate(pipe),
    ]
    for step in steps if first == "offload" else reversed(steps):
        step()
    for _ in range(2):  # the pipeline puts its hooks on again after each call
        assert all(
            isinstance(t, AnyFlowTransformer3DModel) and hasattr(t, "_hf_hook")
            for t in transformers(pipe)
        )
        assert len(pipe._all_hooks) == 2 + len(transformers(pipe))
        assert_same(latents(pipe), expected)
    theirs = [t._accelerated_from.transformer for t in transformers(pipe)]
    assert not any(hasattr(t, "_hf_hook") for t in theirs)
    anyflow.restore(pipe)
    assert transformers(pipe) == theirs and all(hasattr(t, "_hf_hook") for t in theirs)
    assert torch.equal(latents(pipe), expected)


@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan-2.2"])
def test_sequential_offloading_is_put_on_again(kind) -> None:
    """Put it on without a run: diffusers asks for "cpu:0", on which accelerate 1.15 fails."""
    pipe = build(kind)
    expected = latents(pipe)
    storage = pipe.transformer.proj_out.weight.data_ptr()
    pipe.enable_sequential_cpu_offload(device="cpu")
    for step in (anyflow.accelerate, anyflow.restore):
        step(pipe)
        for transformer in transformers(pipe):
            assert isinstance(transformer, AnyFlowTransformer3DModel) == (
                step is anyflow.accelerate
            )
            assert all(p.is_meta for p in transformer.parameters())
            assert all(
                hasattr(m, "_hf_hook")
                for m in transformer.modules()
                if [*m.parameters(recurse=False)]
            )
    pipe.remove_all_hooks()
    assert pipe.transformer.proj_out.weight.data_ptr() == storage
    assert torch.equal(latents(pipe), expected)
    pipe.enable_sequential_cpu_offload(device="cpu")
    anyflow.accelerate(pipe).remove_all_hooks()
    assert_same(latents(pipe), expected)


@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan"])
def test_ours_runs_under_sequential_offloading(kind) -> None:
    pipe = anyflow.accelerate(build(kind))
    expected = latents(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    assert all(p.is_meta for p in pipe.transformer.parameters())
    assert torch.equal(latents(pipe), expected)
    assert all(p.is_meta for p in pipe.transformer.parameters())


def test_offloading_stays_on_when_a_pipeline_is_refused() -> None:
    pipe = build("wan")
    pipe.transformer = randomized(diffusers.WanTransformer3DModel(**TINY, added_kv_proj_dim=24))
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="added_kv_proj_dim"):
        anyflow.accelerate(pipe)
    assert (
        hasattr(pipe.transformer, "_hf_hook")
        and type(pipe.transformer) is diffusers.WanTransformer3DModel
    )


def refused(change: Callable[[nn.Module], object], **settings: Any) -> nn.Module:
    transformer = diffusers.WanTransformer3DModel(**(TINY | settings))
    change(transformer)
    return transformer


class OtherProcessor:
    """Stand for a processor that ours would not have."""


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "image-attention": (lambda: refused(lambda t: None, added_kv_proj_dim=24), ValueError,
                        "added_kv_proj_dim=24"),
    "image-positions": (
        lambda: refused(lambda t: None, image_dim=8, pos_embed_seq_len=3), ValueError,
        "pos_embed_seq_len=3"
    ),
    "fused": (lambda: refused(lambda t: t.fuse_qkv_projections()), ValueError, "attn1 has fused "
                                                                               "projections"),
    "processor": (
        lambda: refused(lambda t: t.blocks[1].attn2.set_processor(OtherProcessor())),
        ValueError,
        "blocks.1.attn2 has the attention processor OtherProcessor",
    ),
    "compiled": (
        lambda: torch.compile(refused(lambda t: None)), ValueError, "compiled by torch.compile; "
                                                                    "accelerate first"
    ),
    "offloaded": (lambda: refused(lambda t: cpu_offload(t, "cpu")), ValueError, "the transformer "
                                                                                "has a hook"),
    "cache": (
        lambda: refused(lambda t: t.enable_cache(diffusers.FirstBlockCacheConfig())), ValueError,
        "a hook of diffusers"
    ),
    "forward-hook": (
        lambda: refused(lambda t: t.norm_out.register_forward_hook(lambda *_: None)),
        ValueError,
        "norm_out has a forward hook",
    ),
    "parameter": (
        lambda: refused(lambda t: t.blocks[0].register_parameter("more",
                                                                 nn.Parameter(torch.ones(1)))),
        ValueError,
        "blocks.0.more",
    ),
    "causal-alone": (
        lambda: diffusers.AnyFlowFARTransformer3DModel(**TINY), ValueError, "accelerate its Any"
    ),
    "linear": (lambda: nn.Linear(2, 2), TypeError, "Linear cannot be replaced; supported are"),
    "no-module": (lambda: "path/to/model", TypeError, "str cannot be replaced"),
    "no-transformer": (
        lambda: diffusers.DDPMPipeline(diffusers.UNet2DModel(8, block_out_channels=(32, 32),
                                                             down_block_types=(
            "DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")),
            diffusers.DDPMScheduler()),
        TypeError,
        "DDPMPipeline has no transformer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        anyflow.accelerate(make())


def test_layers_with_hooks_of_their_own_keep_them() -> None:
    pipe = build("anyflow")
    pipe.transformer.blocks[0].attn1.to_q.register_forward_hook(
        lambda module, inputs, output: 0.5 * output
    )
    expected = latents(pipe)
    assert_same(latents(anyflow.accelerate(pipe)), expected)
