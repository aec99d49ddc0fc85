"""Check the settings of the scheduler, their files, copies, and diffusers' configurations."""

import copy
import json
import pickle
from pathlib import Path

import diffusers
import pytest
import torch

from anyflow.schedulers import FlowMapEulerDiscreteScheduler, SchedulerConfig

FILE = "scheduler_config.json"
IMPOSSIBLE = [
    *(("num_train_timesteps", value) for value in (10**12, 10**400, 0, True, 1000.0, None)),
    *(("shift", value) for value in (10**400, float("nan"), float("inf"), "5", True, 1e300, 0, -1)),
    *(("weight_type", value) for value in ([], None, "beta", "x" * 5000)),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE, ids=lambda value: str(value)[:12])
def test_a_setting_that_cannot_be_is_refused(name: str, value: object, tmp_path: Path) -> None:
    """Name the setting in the error, and the file that it comes from."""
    with pytest.raises(ValueError, match=f"^{name} must be "):
        FlowMapEulerDiscreteScheduler(**{name: value})
    FlowMapEulerDiscreteScheduler(shift=5.0).save_pretrained(tmp_path)
    file = tmp_path / FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=name) as raised:
        FlowMapEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert str(file) in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "content", ["[1, 2]", "3", "null", '"shift"', "{", "", "[]", '{"shift": "5"}', "[" * 10_000]
)
def test_a_file_that_holds_no_settings_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path / FILE)):
        FlowMapEulerDiscreteScheduler.from_pretrained(tmp_path)


def test_the_defaults_of_the_settings_are_wans_and_those_of_the_scheduler_are_diffusers() -> None:
    assert SchedulerConfig().shift == 5.0 and FlowMapEulerDiscreteScheduler().config.shift == 1.0
    assert FlowMapEulerDiscreteScheduler.from_config(SchedulerConfig()).config.shift == 5.0


def test_set_shift() -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(4)
    t = torch.tensor([667.0])
    before = scheduler.get_train_weight(t)
    scheduler.set_shift(5.0)
    fresh = FlowMapEulerDiscreteScheduler(shift=5.0)
    fresh.set_timesteps(4)
    assert scheduler.config.shift == 5.0 and torch.equal(scheduler.timesteps, fresh.timesteps)
    assert (
        torch.equal(scheduler.get_train_weight(t), fresh.get_train_weight(t))
        and scheduler.get_train_weight(t) != before
    )
    with pytest.raises(ValueError, match="shift must be"):
        scheduler.set_shift(0.0)
    assert scheduler.config.shift == 5.0


def test_save_and_load(tmp_path: Path) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(
        num_train_timesteps=100, shift=3.0, weight_type="gaussian"
    )
    scheduler.save_pretrained(tmp_path / "pipeline" / "scheduler")
    file = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    assert json.loads(file.read_text())["_class_name"] == "FlowMapEulerDiscreteScheduler"
    for source, folder in ((tmp_path / "pipeline", "scheduler"), (file.parent, None), (file, None)):
        again = FlowMapEulerDiscreteScheduler.from_pretrained(source, subfolder=folder)
        assert dict(again.config) == dict(scheduler.config) and torch.equal(
            again.timesteps, scheduler.timesteps
        )
    assert FlowMapEulerDiscreteScheduler.from_pretrained(file, shift=7.0).config.shift == 7.0
    theirs = diffusers.FlowMapEulerDiscreteScheduler.from_pretrained(file.parent)
    assert (theirs.config.num_train_timesteps, theirs.config.shift) == (100, 3.0)


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no scheduler_config.json"):
        FlowMapEulerDiscreteScheduler.from_pretrained(tmp_path / "missing")
    (tmp_path / "scheduler_config.json").write_text('{"shift": 5.0, "sigma_min": 0.0}')
    with pytest.raises(
        ValueError,
        match="unknown scheduler settings sigma_min; expected num_train_timesteps, shift",
    ):
        FlowMapEulerDiscreteScheduler.from_pretrained(tmp_path)


def test_config_of_a_diffusers_scheduler(tmp_path: Path) -> None:
    theirs = diffusers.FlowMapEulerDiscreteScheduler(num_train_timesteps=500, shift=5.0)
    theirs.save_pretrained(tmp_path)
    for ours in (
        FlowMapEulerDiscreteScheduler.from_config(theirs.config),
        FlowMapEulerDiscreteScheduler.from_pretrained(tmp_path),
    ):
        assert dict(ours.config) == {
            "num_train_timesteps": 500,
            "shift": 5.0,
            "weight_type": "beta08",
        }
    defaults = diffusers.FlowMapEulerDiscreteScheduler()
    assert FlowMapEulerDiscreteScheduler.from_config(defaults.config).config.shift == 1.0
    back = diffusers.FlowMapEulerDiscreteScheduler.from_config(dict(ours.config))
    assert (back.config.num_train_timesteps, back.config.shift) == (500, 5.0)
    with pytest.raises(ValueError, match="unknown scheduler settings"):
        FlowMapEulerDiscreteScheduler.from_config(
            diffusers.FlowMatchEulerDiscreteScheduler().config
        )


def test_config_is_read_only() -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    with pytest.raises(AttributeError, match="set_shift"):
        scheduler.config.shift = 1.0
    with pytest.raises(TypeError):
        scheduler.config["shift"] = 1.0
    assert (
        scheduler.config.shift == scheduler.config["shift"] == scheduler.config.get("shift") == 5.0
    )
    assert "shift" in scheduler.config and scheduler.config.get("sigma", 3) == 3
    assert repr(scheduler) == (
        "FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0, weight_type='beta08')"
    )


def test_copies_and_pickles() -> None:
    scheduler = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert dict(twin.config) == dict(scheduler.config) and torch.equal(
            twin.timesteps, scheduler.timesteps
        )
        twin.set_shift(1.0)
        assert scheduler.config.shift == 5.0 and scheduler.timesteps[1] == 937.5
