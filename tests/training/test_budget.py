"""Test what a recipe takes: counts against real tensors and figures from elsewhere."""

import dataclasses
from pathlib import Path

import pytest
import torch

from anyflow.data import open_dataset
from anyflow.models.blocks import AnyFlowTransformerBlock
from anyflow.training.activations import Allocations, block_bytes
from anyflow.training.budget import architecture, count, table
from anyflow.training.config import NetworkConfig, ParallelConfig
from anyflow.training.distributed import Mesh
from anyflow.training.memory import shard_elements
from anyflow.training.networks import build_student
from anyflow.training.recipe import load_recipe
from anyflow.training.updates import PretrainUpdates

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
SMOKE = Path("smoke_pretrain")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_block_on_fakes_takes_what_it_takes_on_real_tensors(
    precision: str, gradient: bool
) -> None:
    block = AnyFlowTransformerBlock(64, 128, 2, True, 1e-6)
    sizes = (block, 2, 24, 8, precision)
    assert block_bytes(*sizes, gradient=gradient) == block_bytes(
        *sizes, gradient=gradient, fake=False
    )


def test_storages_are_counted_while_they_are_alive() -> None:
    before = torch.zeros(100)
    with Allocations() as memory:
        a = before + 1
        view = a[:10]
        del a
        assert memory.now == 400
        b = view * 2
        assert memory.now == 440
        del view
        assert (memory.now, memory.peak, b.nbytes) == (40, 440, 40)


def test_state_and_parameters_are_those_of_a_real_training_step() -> None:
    recipe = load_recipe(SMOKE)
    dataset = open_dataset(recipe.data)
    step = PretrainUpdates(
        recipe, Mesh(torch.device("cpu")), build_student(recipe), dataset.negative_prompt_embeds
    )
    budget = count(recipe, 1, dataset.latent_shape, dataset.text_shape[0])
    assert budget.parameters == sum(p.numel() for p in step.student.parameters()) == budget.trained
    moments = sum(
        t.nbytes
        for name, t in step.optimizer.tensors().items()
        if name.endswith(("exp_avg", "exp_avg_sq"))
    )
    assert budget.memory.optimizer == moments
    assert budget.memory.average == sum(t.nbytes for t in step.ema.state_dict().values())
    assert (
        budget.memory.gradients == budget.memory.weights == 4 * budget.parameters
        and budget.memory.gathered == 0
    )
    steps = sum(name.endswith("/step") for name in step.tensors())
    assert budget.checkpoint == sum(t.nbytes for t in step.tensors().values()) - 4 * steps


def test_what_checkpointed_blocks_keep_grows_by_the_counted_bytes_with_each_block() -> None:
    """Compare peaks of whole networks of 2 and 6 blocks, forward and backward, on real tensors."""
    peaks, kept = [], 0
    for layers in (2, 6):
        overrides = [f"student.architecture.num_layers={layers}", "activation_checkpointing=true"]
        recipe = load_recipe(SMOKE, overrides)
        model, dataset = build_student(recipe), open_dataset(recipe.data)
        latents = torch.zeros(8, *dataset.latent_shape)
        time = torch.full((8,), 50.0)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with Allocations() as memory:
            model(latents, time, time, torch.zeros(8, *dataset.text_shape)).sample.sum().backward()
        peaks.append(memory.peak)
        kept = count(recipe, 1, dataset.latent_shape, dataset.text_shape[0]).memory.kept // layers
    assert (peaks[1] - peaks[0]) / 4 == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("shape", [(7, 3), (8, 2), (3, 5), (1,), ()])
def test_the_largest_shard_is_that_of_torch(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape)
    largest = max(part.numel() for part in (tensor.chunk(4) if shape else (tensor,)))
    assert shard_elements(tensor, 4) == largest


def test_sizes_of_networks_follow_folders_and_recipes(tmp_path: Path) -> None:
    large = architecture(NetworkConfig("models/Wan2.1-T2V-14B-Diffusers"))
    assert (large.num_layers, large.num_attention_heads, large.ffn_dim) == (40, 40, 13824)
    assert architecture(NetworkConfig("runs/anyflow_pretrain_t2v_14b/model")) == large
    assert architecture(NetworkConfig("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers")).num_layers == 30
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(
        '{"num_layers": 3, "patch_size": [1, 2, 2], "_x": 1}'
    )
    assert architecture(NetworkConfig(str(tmp_path))).num_layers == 3
    with pytest.raises(
        ValueError, match=r"models/mine: there is no such folder, and its name does not say"
    ):
        architecture(NetworkConfig("models/mine"))


def test_the_published_recipe_on_eight_gpus() -> None:
    """Count Wan2.1-1.3B's 1 418 996 800 parameters (diffusers' file), and FLOPs by hand to 5 %."""
    recipe = load_recipe(Path("fastvideo_pretrain_t2v"))
    budget = count(recipe, 8)
    embedder = 256 * 1536 + 1536 + 1536 * 1536 + 1536
    assert budget.parameters == 1_418_996_800 + embedder
    assert budget.memory.kept == 30 * 32760 * 1536 * 2
    forward = 2 * 30 * 32760 * (6 * 1536**2 + 2 * 1536 * 8960) + 4 * 30 * 1536 * 32760 * (
        32760 + 512
    )
    assert budget.update_flops == pytest.approx(32 * (1 + 2 + 1 + 1) * forward, rel=0.05)
    assert budget.gpu_hours() == pytest.approx(budget.update_flops * 6000 / (989e12 * 0.4) / 3600)
    shared = dataclasses.replace(
        recipe, parallel=ParallelConfig(sequence=4), gradient_accumulation=16
    )
    assert count(shared, 8).memory.kept == budget.memory.kept // 4
    assert count(shared, 8).update_flops == budget.update_flops
    with pytest.raises(ValueError, match="must divide the 6 processes"):
        count(shared, 6)
    with pytest.raises(ValueError, match="peak of 'abacus' is not known"):
        budget.gpu_hours("abacus")


def test_a_causal_recipe_is_refused_rather_than_counted_wrong() -> None:
    for name in ("anyflow_far_pretrain_t2v", "anyflow_far_onpolicy_t2v"):
        with pytest.raises(ValueError, match=r"pretrain\.causal: training of the causal model is"):
            count(load_recipe(Path(name)))


@pytest.mark.slow
def test_the_table_of_the_page_is_up_to_date() -> None:
    assert table() in PAGE, "python -m anyflow.training.budget"
