"""Test what anyflow.utils.versions says is installed and required, and prompts without ftfy."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from anyflow.utils.versions import PACKAGES, differences, installed_versions, is_below

ROOT = Path(__file__).resolve().parents[2]


def test_versions_are_those_of_the_packages_that_import() -> None:
    import av
    import ftfy
    import torch
    import transformers

    found = installed_versions()
    for module in (av, ftfy, transformers):
        assert found[module.__name__] == module.__version__
    assert found["torch"] == importlib.metadata.version("torch") == torch.__version__
    assert installed_versions(["no-such-package"]) == {"no-such-package": None}


def test_packages_that_decide_numbers_are_pinned_and_those_of_text_and_pixels_have_floors() -> None:
    floors = dict(re.findall(r'"([a-z]+)>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert {"ftfy", "tokenizers", "transformers", "diffusers", "av", "torch"} <= set(floors)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [
        line.split(";")[0].strip().split("==")
        for line in lines
        if "==" in line and not line.startswith("#")
    ]
    for name in PACKAGES:
        versions = [version for package, version in pins if package == name]
        assert versions
        assert not any(is_below(version, floors[name]) for version in versions if name in floors)


@pytest.mark.parametrize(
    ("version", "floor", "below"),
    [
        ("0.9", "0.10", True),
        ("0.10", "0.10", False),
        ("0.10.0", "0.10", False),
        ("2.13.0+cpu", "2.13.0", False),
        ("4.9.dev0", "5", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, floor: str, below: bool) -> None:
    assert is_below(version, floor) == below


def test_differences_name_the_package_and_both_versions() -> None:
    before = {"ftfy": None, "av": "17.1.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1"}
    now = {"ftfy": "6.3.1", "av": "18.1.0", "torch": "2.13.0+cu130", "diffusers": "0.42.1"}
    assert differences(before, now) == ["av 17.1.0, here 18.1.0", "ftfy not installed, here 6.3.1"]


@pytest.mark.slow
def test_prompts_are_not_encoded_without_ftfy() -> None:
    """Require an error, because diffusers would take such prompts as they are."""
    program = (
        "import sys; sys.modules['ftfy'] = None\nfrom anyflow.pipelines.wan import clean_prompt; "
        "clean_prompt('a')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "ImportError: prompts are cleaned by ftfy" in done.stderr
