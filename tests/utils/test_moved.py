"""Import by former names of modules: the same objects, with a warning that names the new place."""

from __future__ import annotations

import importlib

import pytest

FORMER = {
    "anyflow.checkpoints": "anyflow.formats",
    "anyflow.cuda_graph": "anyflow.models.cuda_graph",
}
RENAMED = {"Architecture": "CheckpointArchitecture"}
NEWER = {"CausalSettings"}  # than the former name


@pytest.mark.parametrize("old", sorted(FORMER))
def test_public_names_stay_where_they_were(old: str) -> None:
    former, module = importlib.import_module(old), importlib.import_module(FORMER[old])
    assert former.__all__
    for name in former.__all__:
        found = RENAMED.get(name, name)
        with pytest.warns(DeprecationWarning, match=f"import {found} from {FORMER[old]}"):
            assert getattr(former, name) is getattr(module, found)


def test_checkpoints_has_every_public_name_that_formats_had() -> None:
    former, module = (
        importlib.import_module(f"anyflow.{name}") for name in ("checkpoints", "formats")
    )
    assert {RENAMED.get(name, name) for name in former.__all__} == set(module.__all__) - NEWER


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    with pytest.raises(
        AttributeError, match=r"module 'anyflow\.checkpoints' has no attribute 'load'"
    ):
        _ = importlib.import_module("anyflow.checkpoints").load
