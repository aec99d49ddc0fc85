"""Test whose noise is whose, and what may change in a folder of a plan."""

from dataclasses import replace
from pathlib import Path

import pytest

from anyflow.evaluation.runs.models import find_shapes_model, fingerprint
from anyflow.evaluation.runs.plan import EvaluationPlan, covers
from anyflow.pipelines.prompts import VideoPrompt


@pytest.fixture
def plan(shapes_model: Path) -> EvaluationPlan:
    model = find_shapes_model(str(shapes_model))
    assert model is not None
    return EvaluationPlan(
        {"student": model},
        [VideoPrompt("disc right"), VideoPrompt("cross down")],
        [4, 1, 4],
        2,
        7,
        8,
    )


def test_the_noise_depends_on_seed_prompt_and_sample_alone(plan: EvaluationPlan) -> None:
    seed = plan.noise_seed("disc right", 1)
    assert seed == 7890882593769654539  # the same in every process, version and order
    other = replace(
        plan,
        prompts=[VideoPrompt("cross right"), *plan.prompts],
        step_counts=[2],
        num_samples=5,
        reference_steps=0,
    )
    assert other.noise_seed("disc right", 1) == seed
    texts = [(text, sample) for text in plan.texts for sample in range(5)]
    seeds = {plan.noise_seed(*place) for place in texts} | {
        replace(plan, seed=8).noise_seed(*p) for p in texts
    }
    assert len(seeds) == 2 * len(texts) and all(0 <= seed < 2**63 for seed in seeds)


def test_the_reference_comes_first_and_is_made_once(plan: EvaluationPlan) -> None:
    assert plan.step_counts == (1, 4) and plan.sets == (8, 1, 4)
    assert replace(plan, reference_steps=4).sets == (4, 1)
    assert replace(plan, reference_steps=0).sets == (1, 4)


def test_a_folder_takes_more_models_and_steps(plan: EvaluationPlan, tmp_path: Path) -> None:
    before = plan.record()
    more = replace(plan, models={"other": plan.models["student"]}, step_counts=[2])
    after = more.extend(before, tmp_path)
    assert list(after.models) == ["student", "other"] and after.step_counts == (1, 2, 4)
    assert (
        covers(after, before) and covers(after, more.record()) and not covers(before, more.record())
    )


def test_another_setting_is_refused_with_what_differs(plan: EvaluationPlan, tmp_path: Path) -> None:
    before = plan.record()
    cases = {
        "--seed 7 is now 8": replace(plan, seed=8),
        "--num-samples 2 is now 3": replace(plan, num_samples=3),
        "prompts: 'disc down' is new": replace(
            plan, prompts=[VideoPrompt("disc down"), VideoPrompt("cross down")]
        ),
        "prompts: 2 are now 1": replace(plan, prompts=[VideoPrompt("disc right")]),
        "reference_steps 8 is now 0": replace(plan, reference_steps=0),
        "euler False is now True": replace(
            plan, models={"student": replace(plan.models["student"], euler=True)}
        ),  # type: ignore[type-var]
    }
    for message, other in cases.items():
        with pytest.raises(ValueError, match="holds an evaluation of other settings") as failure:
            other.extend(before, tmp_path)
        assert message in str(failure.value) and "\n" not in str(failure.value)
        assert not covers(before, other.record())


def test_a_fingerprint_tells_checkpoints_apart_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "transformer").mkdir(parents=True)
        content = bytearray(range(256)) * 8192  # 2 MiB: more than is read
        (tmp_path / name / "transformer" / "weights.safetensors").write_bytes(content)
    one, two = (fingerprint([tmp_path / name / "transformer"]) for name in ("a", "b"))
    assert one == two
    content = bytes(255 - byte for byte in content)
    (tmp_path / "b" / "transformer" / "weights.safetensors").write_bytes(content)
    assert fingerprint([tmp_path / "b" / "transformer"]) != one
    assert fingerprint([tmp_path / "missing"]) != one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_counts": [0]}, "steps must be a whole number from 1"),
        ({"num_samples": 0}, "num_samples must be a whole number from 1"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"reference_steps": -1}, "reference_steps must be a whole number from 0"),
        ({"prompts": []}, "prompts and steps must not be empty"),
        (
            {"prompts": [VideoPrompt("a"), VideoPrompt("a", "b")]},
            "'a' occurs with two negative prompts",
        ),
        ({"models": {"a/b": None}}, "cannot be the name of a model"),
    ],
)
def test_what_cannot_be_planned(plan: EvaluationPlan, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(plan, **change)
