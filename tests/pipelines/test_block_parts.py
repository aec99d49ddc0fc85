"""Test accelerate(only=...): parts of diffusers' blocks on our operators."""

import copy
import pickle
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import WanPipeline
from peft import LoraConfig
from torch import Tensor, nn

import anyflow
from anyflow.ops import Linear
from anyflow.pipelines.block_parts import PARTS, replaced_parts

TOLERANCE = 1e-5
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
CHOICES = [*PARTS, PARTS]


def build(kind: str, **settings: Any) -> nn.Module:
    """Build a transformer whose norms and biases are not the ones that it starts with."""
    cls = (
        diffusers.AnyFlowTransformer3DModel
        if kind == "anyflow"
        else diffusers.WanTransformer3DModel
    )
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = cls(**(TINY | settings))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def run(network: nn.Module, per_token: bool = False, image: bool = False) -> Tensor:
    """Return the velocity of two samples of three frames, from fixed latents and text."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 16, 3, 4, 6, generator=generator)
    text = torch.randn(2, 512 if image else 5, 16, generator=generator)
    t = torch.tensor([900.0, 300.0])
    if type(network) is diffusers.AnyFlowTransformer3DModel:
        return network(
            x.transpose(1, 2), t[:, None].expand(2, 3), t[:, None].expand(2, 3) / 2, text
        ).sample
    pictures = (torch.randn(2, 3, 8, generator=generator),) if image else ()
    return network(x, t[:, None].expand(2, 18) if per_token else t, text, *pictures).sample


@pytest.mark.parametrize("only", CHOICES, ids=str)
@pytest.mark.parametrize("kind", ["anyflow", "wan", "wan-5b"])
def test_same_velocity_and_bit_identical_after_restore(kind, only) -> None:
    network = build(kind)
    classes = [type(module) for module in network.modules()]
    names, per_token = set(network.state_dict()), kind == "wan-5b"
    with torch.no_grad():
        before = run(network, per_token)
        assert anyflow.accelerate(network, only=only) is network
        assert replaced_parts(network) == (PARTS if only == PARTS else (only,))
        changed = [type(module) for module in network.modules()]
        assert changed != classes and [c.__name__ for c in changed if "Block" in c.__name__]
        after = run(network, per_token)
        torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE)
        assert set(network.state_dict()) == names
        assert anyflow.restore(network) is network and not replaced_parts(network)
        assert [type(module) for module in network.modules()] == classes
        assert torch.equal(run(network, per_token), before)


@pytest.mark.parametrize("kind", ["anyflow", "wan"])
def test_every_replaced_module_is_what_computes(kind) -> None:
    """Change weights while our classes are there: the result changes as in diffusers."""
    network, other = build(kind), build(kind)
    anyflow.accelerate(network, only=PARTS)
    with torch.no_grad():
        before = run(network)
        for name in (
            "norm2.weight",
            "norm2.bias",
            "attn1.norm_q.weight",
            "attn1.norm_k.weight",
            "scale_shift_table",
        ):
            for changed in (network, other):
                changed.blocks[1].get_parameter(name).add_(0.5)
            after = run(network)
            assert (after - before).abs().max() > 1e-3, name
            torch.testing.assert_close(after, run(other), rtol=0, atol=TOLERANCE)
            before = after


def test_gradients_are_those_of_diffusers() -> None:
    network, other = build("wan").train(), build("wan").train()
    anyflow.accelerate(network, only=PARTS)
    network.enable_gradient_checkpointing()
    for each in (network, other):
        run(each).square().sum().backward()
    for (name, ours), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_bf16_is_as_near_to_fp32_as_diffusers() -> None:
    with torch.no_grad():
        exact = run(build("wan"))
        theirs = build("wan").bfloat16()
        errors = []
        for network in (
            theirs,
            anyflow.accelerate(copy.deepcopy(theirs), only=("norms", "rope", "gelu")),
        ):
            assert isinstance(network, nn.Module)
            generator = torch.Generator().manual_seed(7)
            x = torch.randn(2, 16, 3, 4, 6, generator=generator).bfloat16()
            text = torch.randn(2, 5, 16, generator=generator).bfloat16()
            errors.append(
                (network(x, torch.tensor([900.0, 300.0]), text).sample.float() - exact).norm()
            )
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize(
    "settings",
    [{"cross_attn_norm": False}, {"added_kv_proj_dim": 24, "image_dim": 8}],
    ids=["no-norm", "image"],
)
def test_variants_of_wan_that_only_parts_take(settings) -> None:
    """Run image attention, which accelerate() refuses without ``only``."""
    network, image = build("wan", **settings), "image_dim" in settings
    with torch.no_grad():
        before = run(network, image=image)
        anyflow.accelerate(network, only=PARTS)
        torch.testing.assert_close(run(network, image=image), before, rtol=0, atol=TOLERANCE)


def test_fused_projections_stay() -> None:
    network = build("wan")
    network.fuse_qkv_projections()
    with torch.no_grad():
        before = run(network)
        anyflow.accelerate(network, only=PARTS)
        torch.testing.assert_close(run(network), before, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("first", ["adapter", "accelerate"])
def test_adapters_before_and_after(first) -> None:
    network, other = build("wan"), build("wan")
    targets = ["to_q", "to_k", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(3)
    other.add_adapter(config, adapter_name="style")
    torch.manual_seed(3)
    if first == "accelerate":
        anyflow.accelerate(network, only=PARTS)
    network.add_adapter(config, adapter_name="style")
    if first == "adapter":
        anyflow.accelerate(network, only=PARTS)
    with torch.no_grad():
        expected = run(other)
        assert (expected - run(build("wan"))).abs().max() > 1e-3
        torch.testing.assert_close(run(network), expected, rtol=0, atol=TOLERANCE)
        anyflow.restore(network)
        assert not any(type(module) is Linear for module in network.modules())
        assert torch.equal(run(network), expected)


def pipeline(transformer: nn.Module) -> WanPipeline:
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    return WanPipeline(
        **parts, transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
    )


def test_a_pipeline_with_model_offloading_keeps_it() -> None:
    pipe = pipeline(build("wan"))
    pipe.enable_model_cpu_offload(device="cpu")
    with torch.no_grad():
        before = run(pipe.transformer)
        assert anyflow.accelerate(pipe, only="norms") is pipe
        assert replaced_parts(pipe.transformer) == ("norms",) and hasattr(
            pipe.transformer, "_hf_hook"
        )
        torch.testing.assert_close(run(pipe.transformer), before, rtol=0, atol=TOLERANCE)
        anyflow.restore(pipe)
        assert hasattr(pipe.transformer, "_hf_hook") and torch.equal(run(pipe.transformer), before)


def test_weights_that_come_for_each_module() -> None:
    """Offload sequentially afterwards: norms have their weights during their own calls only."""
    network = build("wan")
    with torch.no_grad():
        before = run(network)
        cpu_offload(
            anyflow.accelerate(network, only=PARTS), torch.device("cpu"), offload_buffers=True
        )
        assert all(parameter.is_meta for parameter in network.parameters())
        torch.testing.assert_close(run(network), before, rtol=0, atol=TOLERANCE)


def test_a_cache_of_diffusers_afterwards() -> None:
    network = build("wan")
    anyflow.accelerate(network, only=PARTS)
    network.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    with torch.no_grad(), network.cache_context("cond"):
        torch.testing.assert_close(run(network), run(build("wan")), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))]
)
def test_copies_are_accelerated_and_restored_for_themselves(copied) -> None:
    network = build("wan")
    anyflow.accelerate(network, only=PARTS)
    other = copied(network)
    with torch.no_grad():
        assert torch.equal(run(other), run(network))
        anyflow.restore(other)
        assert replaced_parts(network) == PARTS and not replaced_parts(other)
        torch.testing.assert_close(run(other), run(network), rtol=0, atol=TOLERANCE)


def test_a_further_call_replaces_exactly_what_it_names() -> None:
    network = build("wan")
    anyflow.accelerate(network, only=["gelu", "rope"])
    assert replaced_parts(network) == ("rope", "gelu")
    anyflow.accelerate(network, only="norms")
    assert replaced_parts(network) == ("norms",)
    ours = anyflow.accelerate(network)
    assert ours is not network and not replaced_parts(network)
    with pytest.raises(ValueError, match="this one is anyflow's already"):
        anyflow.accelerate(ours, only="norms")
    with pytest.raises(ValueError, match="not made by accelerate"):
        anyflow.restore(network)


def test_torch_compile_afterwards() -> None:
    network = build("wan", num_layers=1)
    with torch.no_grad():
        before = run(network)
        anyflow.accelerate(network, only=PARTS).compile(backend="eager")
        torch.testing.assert_close(run(network), before, rtol=0, atol=TOLERANCE)


class OtherProcessor:
    """Stand for a processor that ours would not have."""


def change(network: nn.Module, action: Any) -> nn.Module:
    action(network)
    return network


REFUSED = {
    "unknown": (
        lambda: build("wan"),
        "speed",
        r"only= takes 'norms', 'rope', 'gelu', 'linear'; got 'speed'",
    ),
    "nothing": (lambda: build("wan"), (), r"only= takes 'norms', .*; got nothing"),
    "processor": (
        lambda: change(build("wan"), lambda n: n.blocks[1].attn1.set_processor(OtherProcessor())),
        "rope",
        "blocks.1.attn1.processor is a .*OtherProcessor; only diffusers' own WanAttnProcessor can "
        "be replaced",
    ),
    "norm": (
        lambda: change(build("wan"), lambda n: setattr(n.blocks[0], "norm2", nn.LayerNorm(24))),
        "norms",
        "blocks.0.norm2 is a torch.*LayerNorm; only diffusers' own FP32LayerNorm",
    ),
    "offloaded": (
        lambda: change(build("wan"), lambda n: cpu_offload(n, torch.device("cpu"))),
        PARTS,
        "blocks.0.norm2 has a hook of the package accelerate|blocks.0 has a hook of the package "
        "accelerate",
    ),
    "cache": (
        lambda: change(build("wan"), lambda n: n.enable_cache(diffusers.FirstBlockCacheConfig())),
        "norms",
        "blocks.0 has a hook of diffusers",
    ),
}


@pytest.mark.parametrize(("make", "only", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_and_left_as_it_was(make, only, message) -> None:
    network = make()
    classes = [type(module) for module in network.modules()]
    with pytest.raises(ValueError, match=message):
        anyflow.accelerate(network, only=only)
    assert [type(module) for module in network.modules()] == classes


def test_other_objects_are_type_errors() -> None:
    with pytest.raises(TypeError, match="Linear cannot be replaced; supported are"):
        anyflow.accelerate(nn.Linear(2, 2), only="norms")
