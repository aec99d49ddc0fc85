"""Recipes: values, inheritance, overrides, and an error with its place for every kind of
mistake.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow.methods import PretrainConfig
from anyflow.training.config import (
    CheckpointConfig,
    NetworkConfig,
    OptimizerConfig,
    PreviewConfig,
    Recipe,
)
from anyflow.training.recipe import RecipeError, dump_recipe, load_recipe

SHIPPED = Path(__file__).parents[2] / "anyflow" / "recipes"
NAMES = sorted(file.name for file in SHIPPED.glob("*.yaml"))
SMALL = "stage: pretrain\nout: runs/a\nstudent: {path: model}\ndata: {path: latents}\n"


def _write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _errors(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, the folder of the recipe left out."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


# Values -------------------------------------------------------------------------------------------


def test_what_is_not_given_has_the_default(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, SMALL))
    assert recipe == Recipe(
        "pretrain", "runs/a", NetworkConfig("model"), load_recipe(tmp_path / "recipe.yaml").data
    )
    assert recipe.optimizer == OptimizerConfig(warmup_steps=1000)


def test_a_section_given_in_part_keeps_the_defaults_of_the_recipe(tmp_path: Path) -> None:
    """Not those of the section's class, which has no warm-up, no prompt dropout and no
    co-training.
    """
    recipe = load_recipe(
        _write(tmp_path, SMALL + "optimizer: {lr: 1e-4}\npretrain: {epsilon: 2}\n")
    )
    assert (recipe.optimizer.lr, recipe.optimizer.warmup_steps) == (1e-4, 1000)
    assert (recipe.pretrain.epsilon, recipe.pretrain.prompt_dropout) == (2.0, 0.1)
    stage_2 = "teacher: {path: t}, method: {rollout: euler}, critic_optimizer: {clip_norm: 2}"
    text = SMALL.replace("pretrain", "on_policy") + f"on_policy: {{{stage_2}}}\n"
    stage = load_recipe(_write(tmp_path, text)).on_policy
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
    found = _value(load_recipe(_write(tmp_path, f"{SMALL}{text}\n")), key)
    assert found == value and type(found) is type(value)


# Inheritance --------------------------------------------------------------------------------------


def test_a_recipe_is_laid_over_its_base_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    _write(
        tmp_path,
        SMALL + "steps: 7\noptimizer: {lr: 1e-3, betas: [0.1, 0.2]}\nseed: 1\n",
        "root.yaml",
    )
    _write(
        tmp_path, "base: ../root.yaml\noptimizer: {betas: [0.3, 0.4]}\nseed: 2\n", "sub/middle.yaml"
    )
    recipe = load_recipe(_write(tmp_path, "seed: 3\nbase: sub/middle.yaml\n"))
    assert (recipe.steps, recipe.seed, recipe.out) == (7, 3, "runs/a")
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (1e-3, (0.3, 0.4))


def test_null_takes_back_what_the_base_gave(tmp_path: Path) -> None:
    _write(tmp_path, SMALL.replace("model}", "model, lora: {rank: 4}}"), "base.yaml")
    child = "base: base.yaml\nstudent: {path: null, lora: null, architecture: {num_layers: 2}}\n"
    student = load_recipe(_write(tmp_path, child)).student
    assert (student.path, student.lora, student.architecture.num_layers) == (None, None, 2)


def test_two_sources_of_a_network_are_an_error_at_the_child(tmp_path: Path) -> None:
    _write(tmp_path, SMALL, "base.yaml")
    child = _write(tmp_path, "base: base.yaml\nstudent:\n  architecture: {num_layers: 2}\n")
    assert _errors(child) == [
        "recipe.yaml:2: student: a network needs either path or architecture, and not both"
    ]


def test_a_problem_in_the_base_has_the_place_in_the_base(tmp_path: Path) -> None:
    _write(tmp_path, SMALL + "steps: 2.5\n", "base.yaml")
    child = _write(tmp_path, "base: base.yaml\noptimizer: {lr: 0}\n")
    assert _errors(child) == [
        "base.yaml:5: steps: must be an integer, got 2.5",
        "recipe.yaml:2: optimizer.lr: must be a positive number, got 0.0",
    ]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert _errors(tmp_path / "none.yaml") == ["none.yaml: no such file"]
    child = _write(tmp_path, "out: a\nbase: none.yaml\n")
    (error,) = _errors(child)
    assert error.startswith("recipe.yaml:2: base: no such file: none.yaml; `anyflow recipes` lists")
    child = _write(tmp_path, "base: 3\n")
    assert _errors(child) == [
        "recipe.yaml:1: base: must be the path of a recipe, relative to this one"
    ]
    (tmp_path / "folder.yaml").mkdir()
    assert _errors(tmp_path / "folder.yaml") == ["folder.yaml is a folder, not a regular file"]


def test_a_recipe_that_is_its_own_base_is_an_error(tmp_path: Path) -> None:
    _write(tmp_path, "base: b.yaml\n", "a.yaml")
    _write(tmp_path, "steps: 1\nbase: ./a.yaml\n", "b.yaml")
    assert _errors(tmp_path / "a.yaml") == [
        "b.yaml:2: base: goes in a circle: a.yaml -> b.yaml -> a.yaml"
    ]


# Overrides ----------------------------------------------------------------------------------------


def test_overrides_are_laid_over_the_file_and_the_last_wins(tmp_path: Path) -> None:
    path = _write(tmp_path, SMALL + "optimizer: {lr: 1e-3, clip_norm: 2}\n")
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
    [line] = _errors(_write(tmp_path, SMALL), text)
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
    assert _errors(_write(tmp_path, SMALL), text) == [f"override {text}: {problem}"]


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: true", "5: seed: must be an integer, got true"),
        ("seed: 2.0", "5: seed: must be an integer, got 2.0"),
        ("seed: '5'", '5: seed: must be an integer, got "5"'),
        ("seed: 1_000", '5: seed: must be an integer, got "1_000"'),
        ("seed: 0x10", '5: seed: must be an integer, got "0x10"'),
        ("seed: [1]", "5: seed: must be an integer, got [1]"),
        ("compile: 1", "5: compile: must be true or false, got 1"),
        ("compile: yes", '5: compile: must be true or false, got "yes"'),
        ("device: 0", "5: device: must be text, got 0"),
        ("scheduler: {shift: '5.0'}", '5: scheduler.shift: must be a number, got "5.0"'),
        ("scheduler: {shift: true}", "5: scheduler.shift: must be a number, got true"),
        ("scheduler: {shift: .nan}", '5: scheduler.shift: must be a number, got ".nan"'),
        ("scheduler:\n  shift: 1e999", "6: scheduler.shift: 1e999 is too large for a number"),
        ("ema:", "5: ema: must be a mapping, got null"),
        ("ema: 0.9", "5: ema: must be a mapping, got 0.9"),
        ("loggers: wandb", '5: loggers: must be a list, got "wandb"'),
        (
            "loggers:\n- wandb\n- tensorbord",
            '''7: loggers.1: must be 'tensorboard', 'wandb' or 'trackio', got "tensorbord"''',
        ),
        ("optimizer:\n  betas: [0.9]", "6: optimizer.betas: has too few items, got [0.9]"),
        ("optimizer:\n  betas: []", "6: optimizer.betas: has too few items, got []"),
        ("optimizer:\n  betas: [0, 0, 0]", "6: optimizer.betas: has too many items, got [0, 0, 0]"),
        (
            "optimizer:\n  betas: [0, 1]",
            "6: optimizer.betas: must be two numbers in [0, 1), got (0.0, 1.0)",
        ),
        ("precision: fp16", """5: precision: must be 'fp32' or 'bf16', got "fp16\""""),
        ("optimizer:\n  eps: 0", "6: optimizer.eps: must be a positive number, got 0.0"),
        (
            "pretrain:\n  i2v_prob: 0\n  epsilon: 0",
            "7: pretrain.epsilon: must be a positive number, got 0.0",
        ),
        ("pretrain:\n  epsilon: -5", "6: pretrain.epsilon: must be a positive number, got -5.0"),
        (
            "pretrain:\n  diffusion_ratio: 0.9",
            "6: pretrain.diffusion_ratio: must not exceed 1 together with consistency_ratio, "
            "got 0.9 + 0.25",
        ),
        (
            "pretrain:\n  derivative: exact",
            "6: pretrain.derivative: must be one of ('central', 'jvp'), got 'exact'",
        ),
        (
            "on_policy: {teacher: {path: t}}",
            "5: on_policy: is required with stage=on_policy, and only then",
        ),
        ("on_policy:\n  critic: {path: c}", "5: on_policy.teacher: is required"),
        (
            "on_policy:\n  teacher: {path: t}\n  method:\n    min_timestep: 990",
            "7: on_policy.method: need 0 <= min_timestep < max_timestep, got 990.0 and 980.0",
        ),
        (
            "on_policy:\n  teacher: {path: t}\n  critic_optimizer:\n    lr: 0",
            "8: on_policy.critic_optimizer.lr: must be a positive number, got 0.0",
        ),
        ("steps: 1\nsteps: 2", "6: steps: is given twice, first at recipe.yaml:5"),
        (
            "ema:\n  decay: 0.1\n  decay: 0.2",
            "7: ema.decay: is given twice, first at recipe.yaml:6",
        ),
        ("? [a]\n: 1", "5: keys must be names"),
        (
            "seed: [1, 2",
            "6: not valid YAML: while parsing a flow sequence expected ',' or ']', but got "
            "'<stream end>'",
        ),
        (
            "seed: 1\n\tsteps: 1",
            "6: not valid YAML: while scanning for the next token found character '\\t' that ",
        ),
        (
            "seed: 1\n---\nseed: 2",
            "6: not valid YAML: expected a single document in the stream but found another ",
        ),
        (
            "seed: !!python/name:os.system",
            "5: seed: the tag 'python/name:os.system' is not allowed",
        ),
        ("seed: !!int x", "5: seed: not a valid int: 'x'"),
        ("compile: !!bool yes", "5: compile: not a valid bool: 'yes'"),
        ("ema: &e\n  decay: *e", "5: ema.decay: contains itself"),
    ],
)
def test_a_mistake_is_one_line_with_its_place_and_key(
    text: str, problem: str, tmp_path: Path
) -> None:
    [line] = _errors(_write(tmp_path, f"{SMALL}{text}\n"))
    if problem.endswith(" "):  # the rest is the YAML library's
        assert line.startswith(f"recipe.yaml:{problem}")
    else:
        assert line == f"recipe.yaml:{problem}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("optimzer: {lr: 1}", "5: optimzer: unknown key; did you mean optimizer?"),
        (
            "optimizer:\n  lr: 1\n  beta: [0, 0]",
            "7: optimizer.beta: unknown key; did you mean betas?",
        ),
        ("data:\n  batchsize: 2", "6: data.batchsize: unknown key; did you mean batch_size?"),
        (
            "on_policy:\n  method:\n    num_step: 2",
            "7: on_policy.method.num_step: unknown key; did you mean num_steps?",
        ),
        ("ema: {xyz: 1}", "5: ema.xyz: unknown key; allowed are decay, start_step"),
        ("ema: {base: a.yaml}", "5: ema.base: unknown key; allowed are decay, start_step"),
        ("ema: {1: 2}", "5: ema.1: unknown key; allowed are decay, start_step"),
    ],
)
def test_an_unknown_key_at_any_depth_names_the_nearest_valid_one(
    text: str, problem: str, tmp_path: Path
) -> None:
    small = SMALL.replace("data: {path: latents}", "seed: 0") if text.startswith("data") else SMALL
    assert f"recipe.yaml:{problem}" in _errors(_write(tmp_path, f"{small}{text}\n"))


def test_an_unknown_stage_lists_the_stages(tmp_path: Path) -> None:
    path = _write(tmp_path, SMALL.replace("pretrain", "onpolicy"))
    assert _errors(path) == [
        """recipe.yaml:1: stage: must be 'teacher', 'pretrain' or 'on_policy', got "onpolicy\""""
    ]


def test_a_key_that_belongs_elsewhere_says_where(tmp_path: Path) -> None:
    """Accept null, which older recipes have there."""
    text = SMALL.replace("pretrain", "on_policy") + (
        "on_policy:\n  teacher:\n    path: t\n    lora: {}\n"
        "  critic:\n    path: c\n    lora: {}\n  method:\n    pretrain: {epsilon: 1}\n"
    )
    path = _write(tmp_path, text)
    assert _errors(path) == [
        "recipe.yaml:8: on_policy.teacher.lora: the teacher is not trained",
        "recipe.yaml:11: on_policy.critic.lora: give the critic's adapters as "
        "on_policy.critic_lora",
        "recipe.yaml:13: on_policy.method.pretrain: give these keys in the recipe's own top-level "
        "pretrain",
    ]
    assert load_recipe(_write(tmp_path, text.replace("{}", "null").replace("{epsilon: 1}", "null")))
    assert (
        "teacher.lora: the teacher is not trained"
        in _errors(_write(tmp_path, SMALL), "teacher={path: t, lora: {}}")[0]
    )


def test_all_problems_are_listed(tmp_path: Path) -> None:
    path = _write(tmp_path, "stage: none\nstudent: {}\nema:\n  decay: 2\nsteps: a\nsed: 1\n")
    assert set(_errors(path, "log_every=0.5")) == {
        "recipe.yaml:6: sed: unknown key; did you mean seed?",
        """recipe.yaml:1: stage: must be 'teacher', 'pretrain' or 'on_policy', got "none\"""",
        "recipe.yaml: out: is required",
        "recipe.yaml: data: is required",
        "recipe.yaml:2: student: a network needs either path or architecture, and not both",
        "recipe.yaml:4: ema.decay: must be in [0, 1), got 2.0",
        'recipe.yaml:5: steps: must be an integer, got "a"',
        "override log_every=0.5: log_every: must be an integer, got 0.5",
    }


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "text\n"])
def test_a_file_without_keys_is_an_error(text: str, tmp_path: Path) -> None:
    assert _errors(_write(tmp_path, text)) == ["recipe.yaml: must hold a mapping of keys to values"]


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"out: \xff\xfe\x00")
    [line] = _errors(path)
    assert line == "recipe.yaml, line 1: byte 0xff is not UTF-8; save the file as UTF-8"


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


@settings(max_examples=40)
@given(base=st.sampled_from(NAMES), parts=PARTS)
def test_every_recipe_is_its_dump_read_again(
    base: str, parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = dataclasses.replace(load_recipe(SHIPPED / base), **parts)
    path = _write(tmp_path_factory.getbasetemp(), dump_recipe(recipe), "dumped.yaml")
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
    path = _write(tmp_path_factory.getbasetemp(), dump_recipe(recipe), "dumped.yaml")
    assert load_recipe(path) == recipe


def test_a_dump_has_every_value() -> None:
    recipe = load_recipe(SHIPPED / "anyflow_onpolicy_t2v.yaml")
    lines = dump_recipe(recipe).splitlines()
    assert {f"{field.name}:" for field in dataclasses.fields(Recipe)} == {
        line.split()[0] for line in lines if not line.startswith(" ")
    }
    assert "    cotrain_pretrain: true" in lines and "    pretrain:" not in lines


# Optional packages --------------------------------------------------------------------------------


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
