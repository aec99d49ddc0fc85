"""Refuse recipes and configurations without bounds at once, in one line with its place."""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from recipe_texts import SMALL, errors, write

from anyflow.methods import OnPolicyConfig, PretrainConfig
from anyflow.training.config import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    LoRAConfig,
    NetworkConfig,
    OnPolicyStageConfig,
    OptimizerConfig,
    PreviewConfig,
    Recipe,
    WeightsConfig,
)
from anyflow.training.recipe import load_recipe, print_config
from anyflow.utils.validation import SettingError

ADAPTED = NetworkConfig(path="a", lora=LoRAConfig())
ARCHITECTURE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}
BUILT = (
    "stage: pretrain\nout: runs/a\ndata: {kind: synthetic}\nstudent: "
    f"{{architecture: {ARCHITECTURE}}}\n"
).replace("'", "")
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ALIASES, "a3: the document has more than 2000 values or 32 levels"),
        ("steps: " + "[" * 5000, "5: not valid YAML: nested more than 32 deep"),
        ("steps: " + "{a: " * 500 + "1" + "}" * 500, "5: not valid YAML: nested more than 32 deep"),
        ("steps: " + "9" * 400, "is too large for a whole number"),
        ("steps: " + "9" * 5000, "steps: not a valid int"),
        ("optimizer: {lr: " + "9" * 400 + "}", "is too large for a whole number"),
        ("# " + "x" * 2**16, "is larger than the 65536 bytes allowed"),
        ('device: "\\ud800"', "device: \\ud800 has a lone surrogate"),
        ("".join(f"k{i}: 1\n" for i in range(1900)), "1870 more problems"),
    ],
    ids=[
        "aliases",
        "lists",
        "mappings",
        "digits",
        "more digits",
        "digits of lr",
        "bytes",
        "surrogate",
        "keys",
    ],
)
def test_a_document_without_bounds_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in errors(write(tmp_path, SMALL + text + "\n"))[-1]


@pytest.mark.parametrize("kind", ["loop", "fifo", "device", "folder", "long", "chain"])
def test_a_base_that_is_no_small_file_is_refused_with_its_place(kind: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for i in range(17):
        write(tmp_path, f"base: b{i + 1}.yaml\n", f"b{i}.yaml")
    base = {"device": "/dev/zero", "folder": ".", "long": "x" * 3000, "chain": "b0.yaml"}.get(
        kind, kind
    )
    [line] = errors(write(tmp_path, f"{SMALL}base: {base}\n"))
    assert re.match(
        r"b14\.yaml:1: base: more than 16" if kind == "chain" else r"recipe\.yaml:5: base: ", line
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=9e999", "steps: 9e999 is too large for a number"),
        (".".join("a" * 40) + "=1", "its key is nested more than 32 deep"),
        ("steps=" + "[" * 70000, "its value is larger than the 65536 bytes allowed"),
        ("steps=\udcff", "not valid YAML: unacceptable character"),
        ("steps=&a [*a]", "steps: contains itself"),
        (
            "student.architecture.num_layers=-1",
            "num_layers: must be a whole number from 1 to 1000, got -1",
        ),
        (
            "student.architecture.num_layers=1000000000",
            "num_layers: must be a whole number from 1 to 1000, got 1000000000",
        ),
        (
            "student.architecture.patch_size=[1,0,2]",
            "patch_size (height): must be a whole number from 1 to 64, got 0",
        ),
        ("parallel.timeout_s=999999999999999", "timeout_s: must be at most 2592000"),
        ("parallel.sequence=4", "sequence: must divide the 2 attention heads of student, got 4"),
        (
            "scheduler.num_train_timesteps=1000000000",
            "num_train_timesteps: must be a whole number from 1 to 1000000",
        ),
        (
            "scheduler.num_train_timesteps=4",
            "pretrain.epsilon: must be below half of num_train_timesteps=4, got 5.0",
        ),
        ("scheduler.shift=-1", "shift: must be a positive number, from 1e-06 to 1e+06, got -1.0"),
        ("out=' '", "out: must be text that is not empty"),
        ("data.num_workers=100000", "num_workers: must be at most 1024"),
    ],
)
def test_an_override_that_cannot_work_is_refused(
    override: str, expected: str, tmp_path: Path
) -> None:
    assert expected in errors(write(tmp_path, BUILT), override)[0]


def test_the_whole_recipe_is_not_printed_where_the_model_cannot_be_built(tmp_path: Path) -> None:
    path = write(tmp_path, BUILT)
    assert load_recipe(path) == load_recipe(write(tmp_path, print_config(path), "whole.yaml"))
    for override, expected in (
        ("student.architecture.attention_head_dim=11", "must be even"),
        ("device=banana", "device 'banana' is unknown to PyTorch"),
        ("student.lora={target_modules: [nonsense]}", "'nonsense' is the end of no module's name"),
    ):
        with pytest.raises(ValueError, match=expected):
            print_config(path, [override])


@pytest.mark.parametrize(
    "build",
    [
        lambda: OptimizerConfig(lr=True),
        lambda: OptimizerConfig(lr=10**400),
        lambda: OptimizerConfig(warmup_steps=1.5),
        lambda: OptimizerConfig(betas=(0.9, float("nan"))),
        lambda: CheckpointConfig(every=10**5000),
        lambda: PreviewConfig(step_counts=(1, 2.5)),
        lambda: EMAConfig(decay="0.9"),
        lambda: LoRAConfig(target_modules="attn1.to_q"),
        lambda: PretrainConfig(epsilon=10**400),
        lambda: PretrainConfig(prompt_dropout=True),
        lambda: OnPolicyConfig(num_steps=(True,)),
        lambda: OnPolicyConfig(max_timestep=float("inf")),
    ],
)
def test_configurations_built_in_python_check_kinds_and_ranges(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=" must "):
        build()


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        ({"teacher": ADAPTED}, r"^teacher\.lora must be None: the teacher is not trained$"),
        ({"critic": ADAPTED}, r"^critic\.lora must be None: .* as on_policy\.critic_lora$"),
    ],
)
def test_a_network_that_has_no_adapters_of_its_own_refuses_them(
    networks: dict[str, NetworkConfig], message: str
) -> None:
    """Build stage 2 in Python, where a trained network's configuration passes for any other."""
    with pytest.raises(ValueError, match=message):
        OnPolicyStageConfig(**{"teacher": WeightsConfig(path="t"), **networks})


def test_the_target_of_the_pretrain_stage_refuses_adapters() -> None:
    with pytest.raises(
        ValueError, match=r"^teacher\.lora must be None: the teacher is not trained$"
    ):
        Recipe(
            stage="pretrain",
            out="run",
            student=NetworkConfig(path="s"),
            data=DataConfig(path="latents"),
            pretrain=PretrainConfig(velocity_target="teacher"),
            teacher=ADAPTED,
        )


def test_a_settings_error_survives_the_way_to_another_rank() -> None:
    """Rank 0's errors are pickled (``anyflow.training.distributed.main_result``)."""
    error = pickle.loads(pickle.dumps(SettingError("ema.decay", "must be in [0, 1), got 2")))
    assert (error.field, str(error)) == ("ema.decay", "ema.decay must be in [0, 1), got 2")
