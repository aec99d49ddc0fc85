"""Compare one update of each stage with the reference's numbers; test what changes when."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from anyflow.data import Batch, SyntheticVideos
from anyflow.methods import OnPolicyConfig, PretrainConfig, TimePairs
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.config import OnPolicyStageConfig, OptimizerConfig, Recipe, SchedulerConfig
from anyflow.training.distributed import Mesh
from anyflow.training.draws import draw_generator, draw_seed
from anyflow.training.networks import build_critic, build_student, build_teacher
from anyflow.training.optimization import TrainingError
from anyflow.training.updates import OnPolicyUpdates, PretrainUpdates

Make = Callable[..., Recipe]

CPU = Mesh(torch.device("cpu"))
REFERENCE = Path(__file__).parents[1] / "data" / "anyflow_reference_c.safetensors"
TOLERANCE = 1e-4
# The first moment is then the gradient, and fp32 parameters do not move.
STANDING_STILL = OptimizerConfig(lr=1e-30, betas=(0.0, 0.999), clip_norm=1e9)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().reshape(b.shape), b.double()
    return ((a - b).norm() / b.norm()).item()


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _gradients(
    step: PretrainUpdates | OnPolicyUpdates, network: str = "student"
) -> dict[str, Tensor]:
    """Return the first moments of the optimizer after an update that stood still."""
    prefix, suffix = f"optimizer/{network}/", "/exp_avg"
    return {
        name.removeprefix(prefix).removesuffix(suffix): tensor
        for name, tensor in step.tensors().items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def _batches(count: int = 1, size: int = 4) -> list[Batch]:
    data = SyntheticVideos()
    picked = [tuple(37 * (i * size + b) % len(data) for b in range(size)) for i in range(count)]
    return [
        Batch(
            torch.stack([data[i].latents for i in some]),
            torch.stack([data[i].prompt_embeds for i in some]),
            some,
        )
        for some in picked
    ]


def _pretrain_step(recipe: Recipe) -> PretrainUpdates:
    return PretrainUpdates(
        recipe, CPU, build_student(recipe), SyntheticVideos().negative_prompt_embeds
    )


def _on_policy_step(recipe: Recipe) -> OnPolicyUpdates:
    teacher = build_teacher(recipe)
    critic = build_critic(recipe, teacher)
    return OnPolicyUpdates(
        recipe,
        CPU,
        build_student(recipe),
        teacher,
        critic,
        SyntheticVideos().negative_prompt_embeds,
    )


# Parity -------------------------------------------------------------------------------------------


class _Reference:
    """Hold the reference's numbers, networks and batch."""

    def __init__(self) -> None:
        with safe_open(REFERENCE, "pt") as file:
            self.values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.variant = json.loads(file.metadata()["variant"])
        latents = self.values["latents_bcfhw"].transpose(1, 2).contiguous()
        self.batch = Batch(latents, self.values["prompt_embeds"], tuple(range(len(latents))))
        self.time_pairs = TimePairs(
            self["pre.t_unit"], self["pre.r_unit"], self["pre.is_diffusion"]
        )

    def __getitem__(self, key: str) -> Tensor:
        return self.values[key]

    def network(self, name: str) -> AnyFlowTransformer3DModel:
        config, gate, deltatime = (self.variant[key] for key in ("config", "gate", "dt"))
        model = AnyFlowTransformer3DModel(**config, gate_value=gate, deltatime_type=deltatime)
        weights = {
            k.removeprefix(f"{name}."): v
            for k, v in self.values.items()
            if k.startswith(f"{name}.")
        }
        model.load_state_dict(weights)
        return model

    def settings(self) -> dict[str, Any]:
        return {
            "scheduler": SchedulerConfig(shift=self.variant["shift"]),
            "pretrain": PretrainConfig(
                epsilon=self.variant["eps"], fuse_guidance_scale=self.variant["g"]
            ),
            "optimizer": STANDING_STILL,
        }


@pytest.fixture(scope="module")
def reference() -> _Reference:
    return _Reference()


def test_the_pretrain_update_has_the_references_loss_and_gradients(
    reference: _Reference, small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path, **reference.settings())
    step = PretrainUpdates(
        recipe, CPU, reference.network("student"), reference["negative_prompt_embeds"]
    )
    scalars = step.update(
        [reference.batch], 0, noise=reference["pre.noise_bfchw"], time_pairs=reference.time_pairs
    )
    assert _relative(scalars["loss"], reference["pre.loss"]) <= TOLERANCE
    gradients = _gradients(step)
    keys = [key for key in reference.values if key.startswith("pre.grad.")]
    assert len(keys) == 10
    for key in keys:
        assert _relative(gradients[key.removeprefix("pre.grad.")], reference[key]) <= TOLERANCE, key


@pytest.mark.parametrize("cotrain", [False, True])
def test_the_on_policy_update_has_the_references_losses_and_gradients(
    cotrain: bool, reference: _Reference, small_recipe: Make, tmp_path: Path
) -> None:
    small = small_recipe(tmp_path, stage="on_policy")
    stage = OnPolicyStageConfig(
        teacher=small.on_policy.teacher,
        method=OnPolicyConfig(cotrain_pretrain=cotrain),
        critic_optimizer=STANDING_STILL,
    )
    recipe = dataclasses.replace(small, **reference.settings(), on_policy=stage)
    networks = [reference.network(name) for name in ("student", "real", "fake")]
    step = OnPolicyUpdates(recipe, CPU, *networks, reference["negative_prompt_embeds"])
    data = (
        {"data_noise": reference["pre.noise_bfchw"], "time_pairs": reference.time_pairs}
        if cotrain
        else {}
    )
    scalars = step.update(
        [reference.batch],
        0,
        student_draws={
            "noise": reference["roll.noise_bfchw"],
            "rollout_draw": (4, 1),
            "t": reference["dmd.t_unit"],
            "score_noise": reference["dmd.noise_bfchw"],
            **data,
        },
        critic_draws={
            "rollout_noise": reference["roll.noise_bfchw"],
            "rollout_draw": (4, 1),
            "t": reference["critic.t_unit"],
            "noise": reference["critic.noise_bfchw"],
        },
    )
    assert _relative(scalars["loss_dmd" if cotrain else "loss"], reference["dmd.loss"]) <= TOLERANCE
    assert _relative(scalars["critic_loss"], reference["critic.loss"]) <= TOLERANCE
    gradients = _gradients(step)
    for key in (key for key in reference.values if key.startswith("dmd.grad.")):
        name, want = key.removeprefix("dmd.grad."), reference[key]
        if cotrain:  # one gradient of both losses
            assert _relative(scalars["loss_data"], reference["pre.loss"]) <= TOLERANCE
            alone = PretrainUpdates(
                recipe, CPU, reference.network("student"), reference["negative_prompt_embeds"]
            )
            alone.update(
                [reference.batch], 0, noise=data["data_noise"], time_pairs=data["time_pairs"]
            )
            want = want + _gradients(alone)[name]
        assert _relative(gradients[name], want) <= TOLERANCE, key


# Draws --------------------------------------------------------------------------------------------


def test_draws_differ_by_every_argument_and_repeat() -> None:
    arguments = list(itertools.product((0, 1), ("student", "critic"), (0, 1), (0, 1)))
    draws = [tuple(torch.rand(2, generator=draw_generator(*a)).tolist()) for a in arguments]
    assert len(set(draws)) == len(arguments)
    assert draws == [tuple(torch.rand(2, generator=draw_generator(*a)).tolist()) for a in arguments]
    # of this and every later release
    assert draw_seed(0, "student", 1, 0, 0) == 11705185558200858141


@pytest.mark.parametrize("stage", ["teacher", "pretrain", "on_policy"])
def test_an_update_is_a_function_of_its_number_and_the_state(
    stage: str, small_recipe: Make, tmp_path: Path
) -> None:
    build = _on_policy_step if stage == "on_policy" else _pretrain_step
    recipe = small_recipe(tmp_path, stage=stage)
    before = torch.get_rng_state()
    steps = [build(recipe), build(recipe)]
    scalars = [step.update(_batches(), 3) for step in steps]
    assert scalars[0] == scalars[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert _same(steps[0].tensors(), steps[1].tensors())
    other = build(dataclasses.replace(recipe, seed=1)).update(_batches(), 3)
    assert other["loss"] != scalars[0]["loss"]


# What an update does ------------------------------------------------------------------------------


def test_the_teacher_stage_is_flow_matching_of_a_plain_model(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path, stage="teacher", optimizer=STANDING_STILL)
    step, batch = _pretrain_step(recipe), _batches()[0]
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    noise = torch.randn(batch.latents.shape, generator=draw_generator(0, "test"))
    pairs = TimePairs(t, t, torch.ones(4, dtype=torch.bool))
    loss = step.update([batch], 0, noise=noise, time_pairs=pairs)["loss"]

    scheduler = step.method.scheduler
    s = scheduler.apply_shift(t).reshape(-1, 1, 1, 1, 1)
    x_t = (1 - s) * batch.latents + s * noise
    with torch.no_grad():
        v = step.student(x_t, s.flatten() * 1000, None, batch.prompt_embeds).sample
    error = (v - (noise - batch.latents)).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(
        loss, (scheduler.get_train_weight(s.flatten() * 1000) * error).mean(), rtol=1e-4, atol=0
    )


def test_micro_steps_add_up_to_the_mean(small_recipe: Make, tmp_path: Path) -> None:
    settings = {"optimizer": STANDING_STILL, "pretrain": PretrainConfig(prompt_dropout=0.0)}
    batch = _batches()[0]
    noise = torch.randn(batch.latents.shape, generator=draw_generator(0, "test"))
    t, r = torch.tensor([0.2, 0.5, 0.7, 0.9]), torch.tensor([0.2, 0.5, 0.3, 0.0])
    draws = {"noise": noise, "time_pairs": TimePairs(t, r, t == r)}
    once, thrice = (
        _pretrain_step(small_recipe(tmp_path, gradient_accumulation=n, **settings)) for n in (1, 3)
    )
    one, three = once.update([batch], 0, **draws), thrice.update([batch] * 3, 0, **draws)
    torch.testing.assert_close(one["loss"], three["loss"])
    for name, gradient in _gradients(once).items():
        torch.testing.assert_close(_gradients(thrice)[name], gradient, rtol=1e-4, atol=1e-6)


def test_bf16_gradients_agree_with_fp32_and_parameters_stay_fp32(
    small_recipe: Make, tmp_path: Path
) -> None:
    gradients = []
    for precision in ("fp32", "bf16"):
        step = _pretrain_step(small_recipe(tmp_path, precision=precision, optimizer=STANDING_STILL))
        step.update(_batches(), 0)
        assert all(tensor.dtype == torch.float32 for tensor in step.tensors().values())
        gradients.append(torch.cat([g.flatten() for g in _gradients(step).values()]))
    assert 0 < _relative(gradients[1], gradients[0]) < 0.05


def test_the_critic_sees_a_rollout_of_the_student_after_its_update(
    small_recipe: Make, tmp_path: Path
) -> None:
    small = small_recipe(tmp_path, stage="on_policy", optimizer=OptimizerConfig(lr=0.05))
    stage = dataclasses.replace(small.on_policy, critic_optimizer=STANDING_STILL)
    step, batch = _on_policy_step(dataclasses.replace(small, on_policy=stage)), _batches()[0]
    noise = torch.randn(batch.latents.shape, generator=draw_generator(0, "test"))
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])

    def critic_loss() -> Tensor:
        with torch.no_grad():
            samples = step.method.rollout(noise, batch.prompt_embeds, num_steps=4, grad_step=1)
            return step.method.critic_loss(samples, batch.prompt_embeds, t=t, noise=noise).loss

    before = critic_loss()
    draws = {"rollout_noise": noise, "rollout_draw": (4, 1), "t": t, "noise": noise}
    loss = step.update([batch], 0, critic_draws=draws)["critic_loss"]
    torch.testing.assert_close(loss, critic_loss())
    assert abs(loss - before) > 1e-3 * before


def test_student_and_critic_draw_their_rollouts_apart(small_recipe: Make, tmp_path: Path) -> None:
    step = _on_policy_step(small_recipe(tmp_path, stage="on_policy"))
    starts: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        if bool((keywords["timestep"] == 1000).all()):
            starts.append(keywords["hidden_states"])

    step.student.register_forward_pre_hook(keep, with_kwargs=True)
    step.update(_batches(), 0)
    assert len(starts) == 2 and not torch.isclose(*starts).any()


def test_the_student_is_updated_at_its_interval_and_the_critic_always(
    small_recipe: Make, tmp_path: Path
) -> None:
    small = small_recipe(tmp_path, stage="on_policy")
    stage = dataclasses.replace(small.on_policy, generator_update_interval=2)
    step = _on_policy_step(dataclasses.replace(small, on_policy=stage))
    for index in range(4):
        networks = (step.student, step.method.critic, step.method.teacher)
        before = [_parameters(network) for network in networks]
        average = {name: tensor.clone() for name, tensor in step.ema.state_dict().items()}
        scalars = step.update(_batches(), index)
        moved = [
            not _same(_parameters(network), old)
            for network, old in zip(networks, before, strict=True)
        ]
        assert moved == [index % 2 == 0, True, False]
        assert (
            ("loss" in scalars) == (not _same(step.ema.state_dict(), average)) == (index % 2 == 0)
        )
    assert step.ema.updates == 2
    resumed = _on_policy_step(dataclasses.replace(small, on_policy=stage))
    resumed.resume_at(4)
    assert resumed.ema.updates == 2


def test_a_network_that_yields_nan_stops_the_update(small_recipe: Make, tmp_path: Path) -> None:
    step = _pretrain_step(small_recipe(tmp_path))
    with torch.no_grad():
        step.student.blocks[1].attn1.to_q.weight[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in step.tensors().items()}
    with pytest.raises(TrainingError, match="step 3: loss of the student is not finite"):
        step.update(_batches(), 2)
    for name, tensor in step.tensors().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_the_target_of_a_teacher_is_learned_exactly_by_its_own_weights(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Give a student that is its teacher nothing to learn at r = t on any pair but of the data."""
    losses = {}
    for target in ("data", "teacher"):
        recipe = small_recipe(tmp_path)
        loss = PretrainConfig(
            diffusion_ratio=1.0,
            consistency_ratio=0.0,
            fuse_guidance_scale=1.0,
            velocity_target=target,
        )
        recipe = dataclasses.replace(
            recipe,
            pretrain=loss,
            teacher=recipe.student if target == "teacher" else None,
        )
        teacher = build_teacher(recipe) if target == "teacher" else None
        negative = SyntheticVideos().negative_prompt_embeds
        step = PretrainUpdates(recipe, CPU, build_student(recipe), negative, teacher)
        losses[target] = float(step.update(_batches(), 0)["loss_diffusion"])
    assert losses["teacher"] < 1e-9 < 1e-2 < losses["data"]


def test_a_recipes_teacher_is_for_its_target_alone(small_recipe: Make, tmp_path: Path) -> None:
    taught = PretrainConfig(velocity_target="teacher")
    with pytest.raises(
        ValueError, match="teacher is required with pretrain.velocity_target=teacher"
    ):
        small_recipe(tmp_path, pretrain=taught)
    with pytest.raises(
        ValueError, match="teacher is required with pretrain.velocity_target=teacher"
    ):
        small_recipe(tmp_path, teacher=small_recipe(tmp_path).student)
    recipe = small_recipe(tmp_path, stage="on_policy", pretrain=taught)
    step = _on_policy_step(recipe)
    assert step.method.pretrain is not None and step.method.pretrain.teacher is step.method.teacher
