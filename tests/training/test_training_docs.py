"""Run the commands and snippets of docs/training.md, and look up the names of the page of keys."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.data.caption_sources import CAPTION_LISTS, VIDEO_LISTS
from anyflow.data.captions import CAPTION_COLUMNS, FILE_COLUMNS
from anyflow.training.recipe import load_recipe
from anyflow.training.reference import keys, sections

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = re.findall(
    r"^ {4}(?:torchrun .* -m )?anyflow (.*)$", PAGE.replace("\\\n", ""), flags=re.MULTILINE
)
TRAIN = [
    shlex.split(command, comments=True)[1:] for command in COMMANDS if command.startswith("train ")
]


def test_every_training_command_describes_a_recipe() -> None:
    assert len(TRAIN) >= 5
    for arguments in TRAIN:
        settings = [argument for argument in arguments if argument != "--print-config"]
        load_recipe(Path(settings[0]), settings[1:])


def test_every_option_that_the_commands_name_is_one() -> None:
    for command in COMMANDS:
        name, *arguments = shlex.split(command, comments=True)
        known = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for argument in arguments:
            assert not argument.startswith("--") or argument in known, (command, argument)


def test_a_recipe_of_the_page_loads(tmp_path: Path) -> None:
    for snippet in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL):
        base = "" if "base:" in snippet else "base: anyflow_pretrain_t2v\n"  # a section of a recipe
        (tmp_path / "mine.yaml").write_text(base + snippet, encoding="utf-8")
        load_recipe(tmp_path / "mine.yaml")


def test_every_setting_that_the_page_names_is_a_key() -> None:
    names = {key.name for key in keys()} | {section.name for section in sections()}
    last = {name.rpartition(".")[2] for name in names}
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)=[^`]*`", PAGE):
        assert name in names or name == "key.key", name
    for name in re.findall(r"`([a-z_]+)=[^`]*`", PAGE):
        assert name in last or name == "key", name


@pytest.mark.parametrize("number", range(len(re.findall(r"```sh\n", PAGE))))
def test_bash_accepts_the_scripts(number: int) -> None:
    script = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)[number]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    for command in re.findall(r"-m anyflow train (.*?) ?&?$", script, flags=re.MULTILINE):
        recipe, *settings = shlex.split(command)
        load_recipe(Path(recipe), settings)


def test_the_page_names_every_column_and_list_that_is_understood() -> None:
    for name in (*FILE_COLUMNS, *CAPTION_COLUMNS, VIDEO_LISTS[0], CAPTION_LISTS[0]):
        assert f"`{name}`" in PAGE, name
