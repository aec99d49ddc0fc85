"""Read recipes: values, inheritance, overrides."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import SMALL, errors, write

from anyflow.methods import CausalConfig, PretrainConfig
from anyflow.training.config import (
    CheckpointConfig,
    NetworkConfig,
    OptimizerConfig,
    PreviewConfig,
    Recipe,
)
from anyflow.training.recipe import dump_recipe, load_recipe

SHIPPED = Path(__file__).parents[2] / "anyflow" / "recipes"
NAMES = sorted(file.name for file in SHIPPED.glob("*.yaml"))


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


# Values -------------------------------------------------------------------------------------------


def test_what_is_not_given_has_the_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL))
    assert recipe == Recipe(
        "pretrain", "runs/a", NetworkConfig("model"), load_recipe(tmp_path / "recipe.yaml").data
    )
    assert recipe.optimizer == OptimizerConfig(warmup_steps=1000)


def test_a_section_given_in_part_keeps_the_defaults_of_the_recipe(tmp_path: Path) -> None:
    """Keep warm-up, prompt dropout and co-training, which the section's class has not."""
    recipe = load_recipe(write(tmp_path, SMALL + "optimizer: {lr: 1e-4}\npretrain: {epsilon: 2}\n"))
    assert (recipe.optimizer.lr, recipe.optimizer.warmup_steps) == (1e-4, 1000)
    assert (recipe.pretrain.epsilon, recipe.pretrain.prompt_dropout) == (2.0, 0.1)
    stage_2 = "teacher: {path: t}, method: {rollout: euler}, critic_optimizer: {clip_norm: 2}"
    text = SMALL.replace("pretrain", "on_policy") + f"on_policy: {{{stage_2}}}\n"
    stage = load_recipe(write(tmp_path, text)).on_policy
    assert stage.method.cotrain_pretrain and stage.method.rollout == "euler"
    assert stage.critic_optimizer == OptimizerConfig(lr=2e-6, betas=(0.0, 0.999), clip_norm=2.0)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer: {lr: 5e-5}", "optimizer.lr", 5e-5),
        ("optimizer: {lr: 5E-05}", "optimizer.lr", 5e-5),
        ("optimizer: {lr: .5}", "optimizer.lr", 0.5),
        ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
        ("seed: 010", "seed", 10),
        ("device: no", "device", "no"),
        ("device: 1:30", "device", "1:30"),
        ("device: 2026-05-13", "device", "2026-05-13"),
        ("device: '5e-5'", "device", "5e-5"),
        ("device: ~", "device", None),
        ("compile: True", "compile", True),
        ("preview: {step_counts: [1, 3]}", "preview.step_counts", (1, 3)),
        ("loggers: [wandb]", "loggers", ("wandb",)),
        ("preview: &p {every: 3}\ncheckpoint: *p", "checkpoint.every", 3),
    ],
)
def test_plain_scalars_are_read_as_they_look(
    text: str, key: str, value: Any, tmp_path: Path
) -> None:
    found = _value(load_recipe(write(tmp_path, f"{SMALL}{text}\n")), key)
    assert found == value and type(found) is type(value)


# Inheritance --------------------------------------------------------------------------------------


def test_a_recipe_is_laid_over_its_base_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(
        tmp_path,
        SMALL + "steps: 7\noptimizer: {lr: 1e-3, betas: [0.1, 0.2]}\nseed: 1\n",
        "root.yaml",
    )
    write(
        tmp_path, "base: ../root.yaml\noptimizer: {betas: [0.3, 0.4]}\nseed: 2\n", "sub/middle.yaml"
    )
    recipe = load_recipe(write(tmp_path, "seed: 3\nbase: sub/middle.yaml\n"))
    assert (recipe.steps, recipe.seed, recipe.out) == (7, 3, "runs/a")
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (1e-3, (0.3, 0.4))


def test_null_takes_back_what_the_base_gave(tmp_path: Path) -> None:
    write(tmp_path, SMALL.replace("model}", "model, lora: {rank: 4}}"), "base.yaml")
    child = "base: base.yaml\nstudent: {path: null, lora: null, architecture: {num_layers: 2}}\n"
    student = load_recipe(write(tmp_path, child)).student
    assert (student.path, student.lora, student.architecture.num_layers) == (None, None, 2)


def test_two_sources_of_a_network_are_an_error_at_the_child(tmp_path: Path) -> None:
    write(tmp_path, SMALL, "base.yaml")
    child = write(tmp_path, "base: base.yaml\nstudent:\n  architecture: {num_layers: 2}\n")
    assert errors(child) == [
        "recipe.yaml:2: student: a network needs either path or architecture, and not both"
    ]


def test_a_problem_in_the_base_has_the_place_in_the_base(tmp_path: Path) -> None:
    write(tmp_path, SMALL + "steps: 2.5\n", "base.yaml")
    child = write(tmp_path, "base: base.yaml\noptimizer: {lr: 0}\n")
    assert errors(child) == [
        "base.yaml:5: steps: must be an integer, got 2.5",
        "recipe.yaml:2: optimizer.lr: must be a positive number, got 0.0",
    ]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert errors(tmp_path / "none.yaml") == ["none.yaml: no such file"]
    child = write(tmp_path, "out: a\nbase: none.yaml\n")
    (error,) = errors(child)
    assert error.startswith("recipe.yaml:2: base: no such file: none.yaml; `anyflow recipes` lists")
    child = write(tmp_path, "base: 3\n")
    assert errors(child) == [
        "recipe.yaml:1: base: must be the path of a recipe, relative to this one"
    ]
    (tmp_path / "folder.yaml").mkdir()
    assert errors(tmp_path / "folder.yaml") == ["folder.yaml is a folder, not a regular file"]


def test_a_recipe_that_is_its_own_base_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "steps: 1\nbase: ./a.yaml\n", "b.yaml")
    assert errors(tmp_path / "a.yaml") == [
        "b.yaml:2: base: goes in a circle: a.yaml -> b.yaml -> a.yaml"
    ]


# Overrides ----------------------------------------------------------------------------------------


def test_overrides_are_laid_over_the_file_and_the_last_wins(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "optimizer: {lr: 1e-3, clip_norm: 2}\n")
    overrides = [
        "steps=5",
        "optimizer.lr=2e-6",
        "optimizer.betas=[0, 0.999]",
        "steps=6",
        "out=a=b c",
        "compile=true",
    ]
    recipe = load_recipe(
        path, [*overrides, "student={path: null, architecture: {num_layers: 3}}", "device=null"]
    )
    assert (recipe.steps, recipe.out, recipe.compile, recipe.device) == (6, "a=b c", True, None)
    assert recipe.optimizer == OptimizerConfig(
        lr=2e-6, betas=(0.0, 0.999), clip_norm=2.0, warmup_steps=1000
    )
    assert recipe.student.path is None and recipe.student.architecture.num_layers == 3


@pytest.mark.parametrize(
    "text", ["steps", "=3", "steps=", "steps= ", "a..b=3", ".steps=3", "a b=3", ""]
)
def test_a_malformed_override_is_an_error(text: str, tmp_path: Path) -> None:
    [line] = errors(write(tmp_path, SMALL), text)
    assert (
        line
        == f"override {text.strip()}: must have the form key.key=value, with null as the empty "
        "value"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optimizer.lr=fast", 'optimizer.lr: must be a number, got "fast"'),
        ("optimizer.lr.x=1", "optimizer.lr: must be a number, got a mapping"),
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean lr?"),
        ("steps=-1", "steps: must be a positive number, got -1"),
        ("ema.base=b.yaml", "ema.base: unknown key; allowed are decay, start_step"),
        (
            "seed=[1",
            "not valid YAML: while parsing a flow sequence expected ',' or ']', but got '<stream "
            "end>'",
        ),
        ("seed=# 3", "has no value; write null for the empty one"),
        (
            "ema={decay: 0.1, decay: 0.2}",
            "ema.decay: is given twice, first at override ema={decay: 0.1, decay: 0.2}",
        ),
    ],
)
def test_a_problem_of_an_override_has_its_text_as_the_place(
    text: str, problem: str, tmp_path: Path
) -> None:
    assert errors(write(tmp_path, SMALL), text) == [f"override {text}: {problem}"]


# Dumping ------------------------------------------------------------------------------------------

FRACTION = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(1e-300, 1e300)
TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "null",
        "~",
        "5e-5",
        "007",
        "1_0",
        "true",
        "Yes",
        ".inf",
        "=",
        "<<",
        "2026-05-13",
        "- a",
        "a: b",
        "é\u2028 ",
        "a\x85b",
        "",
    ]
)
NAME = TEXT.filter(lambda text: text.strip() != "" and "\0" not in text)
COUNT, SIZE = st.integers(1, 10**12), st.integers(1, 2**20)
SMALL_COUNT = st.integers(1, 10**6)
SEED = st.integers(-(2**63), 2**63 - 1)
PARTS = st.fixed_dictionaries(
    {
        "out": NAME,
        "steps": COUNT,
        "seed": SEED,
        "device": st.none() | NAME,
        "compile": st.booleans(),
        "loggers": st.lists(st.sampled_from(["tensorboard", "wandb"])).map(tuple),
        "optimizer": st.builds(
            OptimizerConfig,
            lr=POSITIVE,
            betas=st.tuples(FRACTION, FRACTION),
            eps=POSITIVE,
            warmup_steps=COUNT,
        ),
        "checkpoint": st.builds(CheckpointConfig, every=COUNT, keep=COUNT),
        "preview": st.builds(
            PreviewConfig,
            step_counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=4).map(tuple),
        ),
        "pretrain": st.builds(
            PretrainConfig,
            diffusion_ratio=st.floats(0, 0.5),
            consistency_ratio=st.floats(0, 0.5),
            epsilon=st.floats(1e-300, 49),
            derivative=st.sampled_from(["central", "jvp"]),
        ),
    }
)


CAUSAL = st.builds(
    CausalConfig,
    chunk_partition=st.none() | st.lists(st.integers(1, 4096), min_size=1, max_size=4).map(tuple),
    long_context_ratio=st.floats(0, 1),
    bidirectional_prob=st.floats(0, 1),
)


@settings(max_examples=40)
@given(base=st.sampled_from(NAMES), parts=PARTS, causal=CAUSAL)
def test_every_recipe_is_its_dump_read_again(
    base: str,
    parts: dict[str, Any],
    causal: CausalConfig,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    shipped = load_recipe(SHIPPED / base)
    if shipped.pretrain.causal is not None:  # its student is causal, and so must its losses be
        parts = {**parts, "pretrain": dataclasses.replace(parts["pretrain"], causal=causal)}
    recipe = dataclasses.replace(shipped, **parts)
    path = write(tmp_path_factory.getbasetemp(), dump_recipe(recipe), "dumped.yaml")
    assert load_recipe(path) == recipe


SCALARS = st.sampled_from(
    [
        ("steps", COUNT),
        ("seed", SEED),
        ("optimizer.lr", POSITIVE),
        ("on_policy.method.real_guidance_scale", st.floats(0, 1e9)),
        ("student.lora.rank", SIZE),
        ("activation_checkpointing", st.booleans()),
        ("ema.decay", FRACTION),
    ]
).flatmap(lambda item: st.tuples(st.just(item[0]), item[1]))


@settings(max_examples=40)
@given(values=st.lists(SCALARS, max_size=6))
def test_overrides_arrive_and_survive_the_dump(
    values: list[tuple[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    overrides = [f"{key}={str(value).lower()}" for key, value in values]
    recipe = load_recipe(SHIPPED / "anyflow_onpolicy_t2v.yaml", overrides)
    for key, value in dict(values).items():
        assert _value(recipe, key) == value
    path = write(tmp_path_factory.getbasetemp(), dump_recipe(recipe), "dumped.yaml")
    assert load_recipe(path) == recipe


def test_a_dump_has_every_value() -> None:
    recipe = load_recipe(SHIPPED / "anyflow_onpolicy_t2v.yaml")
    lines = dump_recipe(recipe).splitlines()
    assert {f"{field.name}:" for field in dataclasses.fields(Recipe)} == {
        line.split()[0] for line in lines if not line.startswith(" ")
    }
    assert "    cotrain_pretrain: true" in lines and "    pretrain:" not in lines


# Optional packages --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("module", "package"), [("yaml", "pyyaml"), ("pydantic", "pydantic")])
def test_an_absent_package_is_named_with_the_command_that_installs_it(
    module: str, package: str
) -> None:
    code = (
        f"import sys, anyflow.methods; sys.modules[{module!r}] = None; import "
        "anyflow.training.recipe"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    want = (
        f"ImportError: reading a recipe needs the package {package}, which is not installed: pip "
        f"install {package}"
    )
    assert run.returncode == 1 and run.stderr.strip().endswith(want)
