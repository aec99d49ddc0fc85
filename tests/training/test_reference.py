"""Compare the page of all keys of a recipe with the recipe and the dataclasses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from anyflow.methods import CausalConfig, OnPolicyConfig, PretrainConfig
from anyflow.training.config import (
    CausalSettings,
    DataConfig,
    LoRAConfig,
    NetworkConfig,
    OnPolicyStageConfig,
    Recipe,
    WeightsConfig,
)
from anyflow.training.recipe import RecipeError, dump_recipe, load_recipe
from anyflow.training.reference import keys, main, render, sections

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
NETWORK = NetworkConfig("model")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    inner = [_flat(item, f"{name}.{key}" if name else key) for key, item in value.items()]
    return {key: item for each in inner for key, item in each.items()}


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), (
        "python -m anyflow.training.reference docs/recipes.md"
    )


def test_the_keys_are_those_of_a_recipe_with_every_section(tmp_path: Path) -> None:
    """Write such a recipe out and count; what is not required has the default of the page."""
    full = dataclasses.replace(NETWORK, lora=LoRAConfig(), causal=CausalSettings())
    weights, causal = WeightsConfig(NETWORK.path), CausalConfig()
    method = OnPolicyConfig(cotrain_pretrain=True, causal=causal)
    stage = OnPolicyStageConfig(weights, method, critic=weights, critic_lora=LoRAConfig())
    pretrain = PretrainConfig(prompt_dropout=0.1, causal=causal)
    data = DataConfig(path="latents")
    recipe = Recipe("on_policy", "runs/a", full, data, pretrain=pretrain, on_policy=stage)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    values = dataclasses.asdict(recipe)
    flat = _flat(values)
    listed = {key.name: key for key in keys() if ".architecture." not in key.name}
    for place in ("student", "on_policy.teacher", "on_policy.critic"):
        assert flat.pop(f"{place}.architecture") is None
    # A teacher of its own belongs to another stage; the section is that of the others.
    assert flat.pop("teacher") is None
    teacher = {name for name in listed if name.startswith("teacher.")}
    assert teacher == {
        name.removeprefix("on_policy.") for name in listed if name.startswith("on_policy.teacher.")
    }
    listed = {name: key for name, key in listed.items() if name not in teacher}
    assert set(listed) == set(flat)
    given = {
        "stage",
        "out",
        "student.path",
        "on_policy.teacher.path",
        "on_policy.critic.path",
        "data.path",
    }
    for name in set(listed) - given:
        default, value = listed[name].default, flat[name]
        shown = value if isinstance(value, str) else json.dumps(value)
        assert default is not None
        assert default == shown or float(default) == value, name
    assert {name for name, key in listed.items() if key.default is None} == {"stage", "out"}


def test_every_key_says_what_it_means_and_what_it_may_be() -> None:
    for key in keys():
        assert len(key.meaning) > 3 and "``" not in key.meaning and "None" not in key.meaning, key
        assert key.types and "None" not in key.types and "Literal" not in key.types
    by_name = {key.name: key for key in keys()}
    assert by_name["precision"].types == "`fp32` or `bf16`"
    assert by_name["parallel.shard"].types == "whole number or `null`"
    assert by_name["optimizer.betas"].types == "list of 2 numbers"
    assert by_name["preview.step_counts"].is_list and by_name["compile"].is_flag
    assert by_name["optimizer.warmup_steps"].default == "1000"
    assert by_name["on_policy.critic_optimizer.warmup_steps"].default == "0"
    assert sections()[0].name == "" and sections()[-1].name.startswith("on_policy.")


def test_a_key_without_a_meaning_is_an_error() -> None:
    @dataclasses.dataclass
    class Unexplained:
        """Hold a key."""

        seed: int = 0

    with pytest.raises(
        ValueError, match=r"seed: the docstring of Unexplained does not say what it means"
    ):
        sections(Unexplained)


def test_the_command_prints_or_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([])
    assert capsys.readouterr().out == render()
    main([str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == render()


def test_a_key_of_another_section_is_named(tmp_path: Path) -> None:
    for key, where in (
        ("epsilon", "pretrain.epsilon"),
        ("lr", "optimizer.lr"),
        ("batch_size", "data.batch_size"),
    ):
        with pytest.raises(RecipeError, match=rf"{key}: unknown key; did you mean {where}\?"):
            load_recipe(Path("smoke_pretrain"), [f"{key}=3"])
