"""Test the loss on videos that are held out."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anyflow.data import SyntheticVideos, TrainingData
from anyflow.methods import AnyFlowPretrainMethod, DiffusionBalance, sample_time_pairs
from anyflow.training.config import DataConfig, Recipe, ValidationConfig
from anyflow.training.distributed import Mesh
from anyflow.training.held_out import split_data, validation_losses
from anyflow.training.trainer import _build_updates, train
from anyflow.training.updates import build_scheduler

Make = Callable[..., Recipe]
CPU = Mesh(torch.device("cpu"))
TIMING = {
    "seconds",
    "samples_per_second",
    "tokens_per_second",
    "tflops_per_second",
    "peak_memory_gb",
}


def _lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_samples_that_are_held_out_are_never_trained_on(small_recipe: Make) -> None:
    data = SyntheticVideos()
    recipe = small_recipe("unused", validation=ValidationConfig(every=1, num_samples=5))
    split = split_data(recipe, data)
    assert len(split.held_out_picked) == 5 and split_data(recipe, data) == split
    assert sorted([*split.picked, *split.held_out_picked]) == list(range(len(data)))
    assert split_data(dataclasses.replace(recipe, seed=9), data) == split
    batches = TrainingData(data, batch_size=7, picked=split.picked)
    seen = [i for _ in range(2 * len(data) // 7) for i in next(batches).index]
    assert set(seen) == set(split.picked)


def test_without_validation_every_sample_is_trained_on(small_recipe: Make) -> None:
    split = split_data(
        small_recipe("unused", validation=ValidationConfig(num_samples=5)), SyntheticVideos()
    )
    assert list(split.picked) == list(range(len(SyntheticVideos()))) and split.held_out_picked == ()


@pytest.mark.parametrize(
    ("target", "causal"), [("data", False), ("teacher", False), ("data", True)]
)
def test_the_loss_is_that_of_the_averaged_weights(
    target: str, causal: bool, small_recipe: Make
) -> None:
    """Compare with the method's own loss of all videos in one batch, on the averages.

    A causal student sees all three chunks, and no bidirectional loss is added.
    """
    small = small_recipe("unused", causal=causal)
    recipe = dataclasses.replace(
        small,
        pretrain=dataclasses.replace(small.pretrain, velocity_target=target),
        teacher=dataclasses.replace(small.student, seed=1) if target == "teacher" else None,
        validation=ValidationConfig(every=1, num_samples=5),
        data=DataConfig(kind="synthetic", batch_size=2, num_workers=0),
    )
    data = SyntheticVideos()
    split, step = split_data(recipe, data), _build_updates(recipe, CPU, data)
    for average in step.ema.state_dict().values():
        average.mul_(0.7)
    before = {name: p.detach().clone() for name, p in step.student.named_parameters()}
    found = validation_losses(recipe, CPU, split, data.negative_prompt_embeds, step)
    assert all(torch.equal(p, before[name]) for name, p in step.student.named_parameters())

    from anyflow.training.draws import SampleDraws

    draws = SampleDraws(0, 0, range(5), CPU.device)
    samples = [data[i] for i in split.held_out_picked]
    balance = DiffusionBalance()
    config = dataclasses.replace(recipe.pretrain, prompt_dropout=0.0)
    step.ema.copy_to(step.student)
    scheduler = build_scheduler(recipe)
    AnyFlowPretrainMethod(step.student, scheduler, config, teacher=step.teacher).loss(
        torch.stack([sample.latents for sample in samples]),
        torch.stack([sample.prompt_embeds for sample in samples]),
        data.negative_prompt_embeds,
        noise=draws.normal("validation noise", data.latent_shape),
        time_pairs=sample_time_pairs(
            5, uniforms=draws.uniform("validation times", (2,)).T, device="cpu"
        ),
        num_chunks=3 if causal else None,
        bidirectional=False,
        balance=balance,
    )
    expected = {name: value.item() for name, value in balance.metrics().items()}
    assert found["validation_loss_diffusion"] == pytest.approx(expected["loss_diffusion"], rel=1e-5)
    assert found["validation_loss_flow_map"] == pytest.approx(expected["loss_flow_map"], rel=1e-5)
    # round(0.5 * 5) samples with r = t
    mean = (2 * expected["loss_diffusion"] + 3 * expected["loss_flow_map"]) / 5
    assert found["validation_loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "on_policy"])
def test_a_run_evaluates_it_and_trains_as_without(
    stage: str, small_recipe: Make, tmp_path: Path
) -> None:
    """Hold the same videos out of both runs: every other number is the same, bit for bit."""
    often, once = (ValidationConfig(every=every, num_samples=5) for every in (2, 4))
    for name, validation in (("often", often), ("once", once)):
        train(small_recipe(tmp_path / name, stage=stage, validation=validation, log_every=3))
    found, other = (_lines(tmp_path / name) for name in ("often", "once"))
    assert [line["step"] for line in found] == [1, 2, 3, 4] and [
        line["step"] for line in other
    ] == [1, 3, 4]
    assert [
        ("validation_loss" in line, "grad_norm" in line or "critic_loss" in line) for line in found
    ] == [
        *((False, True), (True, False), (False, True), (True, False)),
    ]
    assert found[3]["validation_loss"] == other[2]["validation_loss"] != found[1]["validation_loss"]
    assert ("validation_loss_flow_map" in found[1]) == (stage != "teacher")
    for line, same in ((found[0], other[0]), (found[2], other[1])):
        assert {k: v for k, v in line.items() if k not in TIMING} == {
            k: v for k, v in same.items() if k not in TIMING
        }


def test_a_run_goes_on_with_other_validation_but_not_with_other_samples(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(
        tmp_path / "run", steps=1, validation=ValidationConfig(every=1, num_samples=5)
    )
    train(recipe)
    more = dataclasses.replace(recipe, steps=2, validation=ValidationConfig(every=2, num_samples=6))
    with pytest.raises(ValueError, match=r"differs in validation\.num_samples \(5 there, 6 here\)"):
        train(more)
    train(dataclasses.replace(more, validation=ValidationConfig(every=2, num_samples=5)))
    assert ["validation_loss" in line for line in _lines(tmp_path / "run")] == [True, True]


def test_what_cannot_be_held_out_is_refused(small_recipe: Make, tmp_path: Path) -> None:
    everything = ValidationConfig(every=1, num_samples=len(SyntheticVideos()))
    with pytest.raises(
        ValueError, match=r"validation\.num_samples=\d+ leaves none of the \d+ videos to train on"
    ):
        train(small_recipe(tmp_path / "run", validation=everything))
    with pytest.raises(ValueError, match="nowhere"):
        train(
            small_recipe(
                tmp_path / "run",
                validation=ValidationConfig(every=1, path=str(tmp_path / "nowhere")),
            )
        )
    assert not (tmp_path / "run").exists()
