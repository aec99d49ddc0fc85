"""Build networks from folders and from random weights, and choose what of them trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.config import FlowMap, LoRAConfig, NetworkConfig, Recipe
from anyflow.training.networks import build_critic, build_student, build_teacher

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 8,
}
LORA = LoRAConfig(rank=2, alpha=4.0)
FILE = "diffusion_pytorch_model.safetensors"
Make = Callable[..., Recipe]


def _from(path: Path, **settings: Any) -> NetworkConfig:
    return NetworkConfig(path=str(path), **settings)


def _trained(network: AnyFlowTransformer3DModel) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


def _state(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / FILE)
    edit(weights)
    save_file(weights, folder / FILE, metadata={"format": "pt"})


def test_random_weights_are_those_of_the_seed_and_the_global_generator_is_left_alone(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path)
    assert recipe.student.architecture is not None
    adapted = small_recipe(
        tmp_path, student=NetworkConfig(architecture=recipe.student.architecture, lora=LORA)
    )
    other = small_recipe(
        tmp_path, student=NetworkConfig(architecture=recipe.student.architecture, seed=1, lora=LORA)
    )
    before = torch.get_rng_state()
    first, again, different = (_state(build_student(r)) for r in (adapted, adapted, other))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert _same(first, again) and _same(first, _state(build_student(adapted)))
    for name in ("patch_embedding.weight", "blocks.0.attn1.to_q.lora_A.default.weight"):
        assert not torch.equal(first[name], different[name])


@pytest.mark.parametrize("subfolder", ["", "transformer"])
def test_a_wan_folder_becomes_a_flow_map_but_for_the_teacher_stage(
    subfolder: str, small_recipe: Make, tmp_path: Path
) -> None:
    wan = diffusers.WanTransformer3DModel(**SIZES)
    wan.save_pretrained(tmp_path / subfolder)
    flow_map = FlowMap(gate_value=0.5, deltatime_type="t-r", fusion="additive")
    before = torch.get_rng_state()
    student = build_student(small_recipe(tmp_path, student=_from(tmp_path), flow_map=flow_map))
    assert torch.equal(torch.get_rng_state(), before)
    state = student.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wan.state_dict().items())
    for name, tensor in state.items():
        if "delta_embedder" in name:  # a copy in the same precision
            assert (
                torch.equal(tensor, state[name.replace("delta", "time")])
                and tensor.dtype == torch.float32
            )
    assert student.config.gate_value == 0.5 and student.config.deltatime_type == "t-r"
    assert student.condition_embedder.delta_emb_gate.item() == 0.5

    plain = build_student(small_recipe(tmp_path, stage="teacher", student=_from(tmp_path)))
    assert not plain.config.r_embedder and _same(_state(plain), _state(wan))


def test_a_flow_map_is_loaded_whole_in_fp32_with_its_gate_on_the_cpu(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Set the gate, which no file has, on the CPU rather than the meta device."""
    model = AnyFlowTransformer3DModel(**SIZES).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    student = build_student(small_recipe(tmp_path, student=_from(tmp_path)))
    assert student.condition_embedder.delta_emb_gate.device.type == "cpu"
    assert student.condition_embedder.delta_emb_gate.item() == 0.25
    for name, p in student.named_parameters():
        assert (
            p.dtype == torch.float32
            and torch.equal(p, model.state_dict()[name].float())
            and p.requires_grad
        )


def test_another_flow_map_than_the_recipes_is_refused(small_recipe: Make, tmp_path: Path) -> None:
    AnyFlowTransformer3DModel(**SIZES, gate_value=0.5).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"gate_value=0\.5.*but the recipe's flow_map is.*gate_value=0\.25"
    ):
        build_student(small_recipe(tmp_path, student=_from(tmp_path)))
    with pytest.raises(ValueError, match="stage=teacher trains a plain model"):
        build_student(small_recipe(tmp_path, stage="teacher", student=_from(tmp_path)))


def test_weights_that_do_not_fit_are_all_named(small_recipe: Make, tmp_path: Path) -> None:
    """Fill nothing with random weights."""
    AnyFlowTransformer3DModel(**SIZES).save_pretrained(tmp_path)
    recipe = small_recipe(tmp_path, student=_from(tmp_path))

    def rename(weights: dict[str, Tensor]) -> None:
        weights["blocks.0.attn1.to_query.weight"] = weights.pop("blocks.0.attn1.to_q.weight")

    _edit_weights(tmp_path, rename)
    with pytest.raises(ValueError, match=r"^student\.path: ") as caught:
        build_student(recipe)
    assert "missing: blocks.0.attn1.to_q.weight" in str(caught.value)
    assert "unexpected: blocks.0.attn1.to_query.weight" in str(caught.value)


def test_half_a_second_timestep_branch_is_refused(small_recipe: Make, tmp_path: Path) -> None:
    AnyFlowTransformer3DModel(**SIZES).save_pretrained(tmp_path)
    _edit_weights(
        tmp_path, lambda weights: weights.pop("condition_embedder.delta_embedder.linear_1.weight")
    )
    with pytest.raises(
        ValueError, match=r"missing: condition_embedder\.delta_embedder\.linear_1\.weight"
    ):
        build_student(small_recipe(tmp_path, student=_from(tmp_path)))


def test_a_sharded_folder_is_read(small_recipe: Make, tmp_path: Path) -> None:
    wan = diffusers.WanTransformer3DModel(**SIZES)
    wan.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / f"{FILE}.index.json").is_file()
    student = build_student(small_recipe(tmp_path, stage="teacher", student=_from(tmp_path)))
    assert _same(_state(student), _state(wan))


def test_a_folder_without_a_network_is_named(small_recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student\.path: .*nothing does not exist"):
        build_student(small_recipe(tmp_path, student=_from(tmp_path / "nothing")))
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    with pytest.raises(ValueError, match=r"student\.path: .*safetensors"):
        build_student(small_recipe(tmp_path, student=_from(tmp_path)))


def test_lora_trains_its_adapters_and_the_modules_named(small_recipe: Make, tmp_path: Path) -> None:
    AnyFlowTransformer3DModel(**SIZES).save_pretrained(tmp_path)
    student = build_student(small_recipe(tmp_path, student=_from(tmp_path, lora=LORA)))
    linear = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
    )
    assert _trained(student) == {
        f"blocks.{i}.{name}.lora_{ab}.default.weight"
        for i in range(2)
        for name in linear
        for ab in "AB"
    } | {
        f"condition_embedder.{kind}_embedder.linear_{i}.{part}"
        for kind in ("time", "delta")
        for i in (1, 2)
        for part in ("weight", "bias")
    }
    layer = student.blocks[0].attn1.to_q
    assert layer.scaling["default"] == 2.0 and layer.lora_A["default"].weight.shape == (2, 24)
    assert not layer.lora_B["default"].weight.any()  # at the start, the model is the base model


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            LoRAConfig(target_modules=("attn1.to_q", "attn3.to_q")),
            r"target_modules: 'attn3\.to_q' is the end of no",
        ),
        (
            LoRAConfig(target_modules=("to_q", "ttn1.to_k")),
            r"target_modules: 'ttn1\.to_k' is the end of no",
        ),
        (
            LoRAConfig(trained_modules=("condition_embedder.time",)),
            r"trained_modules: 'condition_embedder\.time' is",
        ),
        (
            LoRAConfig(target_modules=("patch_embedding",)),
            "patch_embedding is not a linear layer but PatchEmbedding",
        ),
        (
            LoRAConfig(trained_modules=("attn1",)),
            r"attn1\.to_q cannot have an adapter and be trained in full",
        ),
    ],
)
def test_lora_names_that_do_not_fit(
    lora: LoRAConfig, message: str, small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path)
    with pytest.raises(ValueError, match=f"student.lora.*{message}"):
        build_student(
            small_recipe(
                tmp_path, student=NetworkConfig(architecture=recipe.student.architecture, lora=lora)
            )
        )


def test_the_critic_starts_as_a_copy_of_the_frozen_teacher(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path, stage="on_policy", compile=True)
    teacher = build_teacher(recipe)
    critic = build_critic(recipe, teacher)
    assert not _trained(teacher) and _trained(critic) == set(critic.state_dict())
    assert _same(_state(teacher), _state(critic))
    assert not {p.data_ptr() for p in teacher.parameters()} & {
        p.data_ptr() for p in critic.parameters()
    }
    assert not teacher.config.r_embedder and build_student(recipe).config.r_embedder
    assert critic.gradient_checkpointing and not teacher.gradient_checkpointing


def test_activation_checkpointing_changes_no_gradient(
    small_recipe: Make, tmp_path: Path, generator: torch.Generator
) -> None:
    x, text = (
        torch.randn(2, 4, 8, 6, 6, generator=generator),
        torch.randn(2, 4, 32, generator=generator),
    )
    t, r = torch.tensor([900.0, 500.0]), torch.tensor([400.0, 500.0])
    gradients = []
    for activation_checkpointing in (False, True):
        student = build_student(
            small_recipe(tmp_path, activation_checkpointing=activation_checkpointing)
        )
        assert student.gradient_checkpointing == activation_checkpointing
        student(x, t, r, text).sample.square().mean().backward()
        gradients.append(
            {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        )
    assert _same(*gradients)


@pytest.mark.slow
def test_an_architecture_that_cannot_be_is_refused_before_it_is_built() -> None:
    from anyflow.training.config import ArchitectureConfig, NetworkConfig
    from anyflow.training.networks import _build

    for name, size in (
        ("num_layers", 10**9),
        ("num_layers", -1),
        ("ffn_dim", 10**400),
        ("eps", float("nan")),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            ArchitectureConfig(**{name: size})
    huge = ArchitectureConfig(num_attention_heads=512, ffn_dim=2**20, num_layers=1000)
    with pytest.raises(ValueError, match="student.architecture has .* GB of weights"):
        _build(NetworkConfig(architecture=huge), "student")
