"""Test that every mistake in a recipe is one line with its place and key."""

from pathlib import Path

import pytest
from recipe_texts import SMALL, errors, write

from anyflow.training.recipe import load_recipe


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
    [line] = errors(write(tmp_path, f"{SMALL}{text}\n"))
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
    assert f"recipe.yaml:{problem}" in errors(write(tmp_path, f"{small}{text}\n"))


def test_an_unknown_stage_lists_the_stages(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("pretrain", "onpolicy"))
    assert errors(path) == [
        """recipe.yaml:1: stage: must be 'teacher', 'pretrain' or 'on_policy', got "onpolicy\""""
    ]


def test_a_key_that_belongs_elsewhere_says_where(tmp_path: Path) -> None:
    """Accept null, which older recipes have there."""
    text = SMALL.replace("pretrain", "on_policy") + (
        "on_policy:\n  teacher:\n    path: t\n    lora: {}\n"
        "  critic:\n    path: c\n    lora: {}\n  method:\n    pretrain: {epsilon: 1}\n"
    )
    path = write(tmp_path, text)
    assert errors(path) == [
        "recipe.yaml:8: on_policy.teacher.lora: the teacher is not trained",
        "recipe.yaml:11: on_policy.critic.lora: give the critic's adapters as "
        "on_policy.critic_lora",
        "recipe.yaml:13: on_policy.method.pretrain: give these keys in the recipe's own top-level "
        "pretrain",
    ]
    assert load_recipe(write(tmp_path, text.replace("{}", "null").replace("{epsilon: 1}", "null")))
    assert (
        "teacher.lora: the teacher is not trained"
        in errors(write(tmp_path, SMALL), "teacher={path: t, lora: {}}")[0]
    )


def test_all_problems_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path, "stage: none\nstudent: {}\nema:\n  decay: 2\nsteps: a\nsed: 1\n")
    assert set(errors(path, "log_every=0.5")) == {
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
    assert errors(write(tmp_path, text)) == ["recipe.yaml: must hold a mapping of keys to values"]


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"out: \xff\xfe\x00")
    [line] = errors(path)
    assert line == "recipe.yaml, line 1: byte 0xff is not UTF-8; save the file as UTF-8"
