"""Test the names of ``anyflow``: which exist, when they load, what a type checker sees."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anyflow

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = (
    *("AnyFlowPipeline", "AnyFlowTransformer3DModel", "FlowMapEulerDiscreteScheduler"),
    *("AnyFlowFARPipeline", "AnyFlowFARTransformer3DModel", "sample_causal"),
    *("__version__", "accelerate", "restore", "sample"),
)

USER = """
import anyflow
from anyflow import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler
from anyflow.pipelines import write_video
from anyflow.training import train

reveal_type(AnyFlowTransformer3DModel.from_pretrained("path"))
reveal_type(FlowMapEulerDiscreteScheduler.from_pretrained("path"))
reveal_type(AnyFlowPipeline.from_pretrained("path"))
reveal_type(write_video)
reveal_type(train)
"""
WRONG = {
    "anyflow.sampel": "attr-defined",
    "anyflow.sample(num_steps=4)": "call-arg",
    "anyflow.accelerate()": "call-arg",
    "anyflow.sample_causal(num_steps=4)": "call-arg",
    "AnyFlowTransformer3DModel(num_heads=3)": "call-arg",
    'AnyFlowTransformer3DModel(num_layers="two")': "arg-type",
    'AnyFlowTransformer3DModel.from_pretrained("path").enable_flow_map(gate=1)': "call-arg",
    "FlowMapEulerDiscreteScheduler(shif=5)": "call-arg",
    "anyflow.ops.layer_norm_modulate(1, 2, 3)": "arg-type",
    "anyflow.pipelines.write_vide": "attr-defined",
    "anyflow.training.trian": "attr-defined",
}


def test_names_are_the_public_ones_and_each_loads() -> None:
    assert dir(anyflow) == sorted(anyflow.__all__) and set(OBJECTS) < set(anyflow.__all__)
    for name in anyflow.__all__:
        assert name in OBJECTS or getattr(anyflow, name).__name__ == f"anyflow.{name}"
    with pytest.raises(AttributeError, match="module 'anyflow' has no attribute 'sampel'"):
        anyflow.sampel  # noqa: B018


@pytest.mark.parametrize("name", ["pipelines", "training"])
def test_names_of_packages_that_load_late(name) -> None:
    package = importlib.import_module(f"anyflow.{name}")
    assert dir(package) == sorted(package.__all__)
    assert all(
        getattr(package, entry).__module__.startswith(f"anyflow.{name}.")
        for entry in package.__all__
    )


def test_importing_anyflow_loads_nothing_else() -> None:
    code = (
        "import sys, anyflow; dir(anyflow); print({'torch', 'diffusers', 'anyflow.ops'} & "
        "set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.slow
def test_a_type_checker_knows_every_name_and_finds_wrong_calls(tmp_path: Path) -> None:
    """Run mypy on a user's file, with the settings and the cache of ``make lint`` for speed."""
    names = [f"anyflow.{name}" for name in OBJECTS]
    file = tmp_path / "user.py"
    head = USER + "".join(f"reveal_type({name})\n" for name in names)
    file.write_text(head + "".join(f"{call}\n" for call in WRONG))
    command = [sys.executable, "-m", "mypy", "--no-error-summary", str(file)]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()

    revealed = [
        match[1] for line in lines if (match := re.search(r'Revealed type is "(.*)"$', line))
    ]
    assert len(revealed) == 5 + len(names), "\n".join(lines)
    assert revealed[:3] == [
        "anyflow.models.transformer.AnyFlowTransformer3DModel",
        "anyflow.schedulers.flow_map_euler.FlowMapEulerDiscreteScheduler",
        "anyflow.pipelines.pipeline.AnyFlowPipeline",
    ]
    assert not [kind for kind in revealed if kind == "Any"], "\n".join(lines)

    first = head.count("\n") + 1
    errors = dict(
        re.findall(r"user\.py:(\d+): error: .*\[([a-z-]+)\]$", "\n".join(lines), re.MULTILINE)
    )
    assert errors == {str(first + index): code for index, code in enumerate(WRONG.values())}, (
        "\n".join(lines)
    )
