"""Test what `anyflow train` says of settings that are not written key=value."""

import pytest
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.cli.settings import ELSEWHERE, settings_problem
from anyflow.training.reference import keys

MISSING = "(`anyflow recipes` lists those that come with anyflow)"
CASES = {
    "--steps 3": "--steps 3: settings are written steps=3",
    "--steps=3": "--steps=3: settings are written steps=3",
    "steps 3": "steps 3: settings are written steps=3",
    "steps = 3": "steps = 3: settings are written steps=3",
    "steps= 3": "steps= 3: settings are written steps=3",
    "steps =3": "steps =3: settings are written steps=3",
    "steps: 3": "steps: 3: settings are written steps=3",
    "steps:3": "steps:3: settings are written steps=3",
    "--data.path x": "--data.path x: settings are written data.path=x",
    "--batch-size 4": "--batch-size 4: settings are written data.batch_size=4",
    "--data-batch-size 4": "--data-batch-size 4: settings are written data.batch_size=4",
    "--lr 1e-4": "--lr 1e-4: settings are written optimizer.lr=1e-4",
    "--seed -1": "--seed -1: settings are written seed=-1",
    "--compile": "--compile: settings are written compile=true",
    "--compile false": "--compile false: settings are written compile=false",
    "--no-compile": "--no-compile: settings are written compile=false",
    "--out": "--out: settings are written out=VALUE",
    "--loggers wandb tensorboard": "--loggers wandb tensorboard: settings are written "
    "'loggers=[wandb, tensorboard]'",
    "--preview.step_counts [1,2]": "--preview.step_counts [1,2]: settings are written "
    "'preview.step_counts=[1,2]'",
    "--stepz 3": "--stepz 3: no setting is named stepz; did you mean steps? Settings are written "
    "steps=3",
    "--learning_rate 3": "--learning_rate 3: no setting is named learning_rate; did you mean "
    "optimizer.lr? "
    "Settings are written optimizer.lr=3",
    "--wings 3": "--wings 3: no option or setting has this name; settings are written key=value, "
    "and `anyflow train "
    "RECIPE --print-config` shows all of them",
    "--print_confg": "--print_confg: did you mean --print-config?",
    "--no-resum": "--no-resum: did you mean --no-resume?",
}


@pytest.mark.parametrize("text", CASES)
def test_a_setting_in_another_form_is_answered_with_the_right_one(text: str) -> None:
    arguments = text.split()
    assert settings_problem(["smoke_pretrain", *arguments]) == CASES[text]
    assert settings_problem(["smoke_pretrain", "seed=1", *arguments, "device=cpu"]) == CASES[text]


def test_names_of_other_trainers_lead_to_keys() -> None:
    assert set(ELSEWHERE.values()) <= {key.name for key in keys()}
    assert not set(ELSEWHERE) & {key.name for key in keys()}


def test_settings_as_they_should_be_are_no_problem() -> None:
    for text in (
        "",
        "steps=3",
        "steps=3 student={path:null}",
        "a.b=--c=d",
        "optimizer.betas=[0,1]",
    ):
        assert settings_problem(["no/such.yaml", *text.split()]) is None
    assert settings_problem(["smoke_pretrain", "steps = 3"]) is None


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("steps=3", [f"the recipe is missing: anyflow train RECIPE steps=3 {MISSING}"]),
        (
            "steps=3 smoke_pretrain",
            ["the recipe comes first: anyflow train smoke_pretrain steps=3"],
        ),
        (
            "--steps 3 seed=1",
            [
                "--steps 3: settings are written steps=3",
                f"the recipe is missing: anyflow train RECIPE steps=3 seed=1 {MISSING}",
            ],
        ),
        (
            "--compile smoke_pretrain --seed 2",
            [
                "--compile: settings are written compile=true",
                "--seed 2: settings are written seed=2",
                "the recipe comes first: anyflow train smoke_pretrain compile=true seed=2",
            ],
        ),
    ],
)
def test_the_recipe_is_missing_or_comes_last(text: str, lines: list[str]) -> None:
    assert str(settings_problem(text.split())).splitlines() == lines


def test_the_command_ends_with_status_2_and_trains_nothing() -> None:
    for arguments in (
        ["smoke_pretrain", "--steps", "3"],
        ["steps=3"],
        ["smoke_pretrain", "--steps=3", "--no-resume"],
    ):
        result = CliRunner().invoke(app, ["train", *arguments])
        assert result.exit_code == 2 and result.output.count("\n") == 1
        assert result.stderr.startswith("anyflow: ") and "steps=3" in result.stderr
    result = CliRunner().invoke(app, ["train", "smoke_pretrain", "--print-config", "steps=3"])
    assert result.exit_code == 0 and "\nsteps: 3\n" in result.output
    result = CliRunner().invoke(app, ["export", "--steps", "3"])
    assert result.exit_code == 2 and "No such option" in result.output
