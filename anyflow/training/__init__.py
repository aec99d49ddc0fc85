"""Train by recipe: the loop, checkpoints to resume from, distribution over GPUs.

The names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anyflow.training.config import Recipe
    from anyflow.training.ema import EMA
    from anyflow.training.guard import TrainingError
    from anyflow.training.recipe import RecipeError, dump_recipe, load_recipe
    from anyflow.training.trainer import train

_MODULES = {
    "EMA": "ema",
    "Recipe": "config",
    "RecipeError": "recipe",
    "TrainingError": "guard",
    "dump_recipe": "recipe",
    "load_recipe": "recipe",
    "train": "trainer",
}

# `export` is the name of a module too, which would replace the function when it is imported.
__all__ = ["EMA", "Recipe", "RecipeError", "TrainingError", "dump_recipe", "load_recipe", "train"]


if not TYPE_CHECKING:  # a type checker that saw it would let every misspelled name pass

    def __getattr__(name):
        if name in _MODULES:
            return getattr(importlib.import_module(f"anyflow.training.{_MODULES[name]}"), name)
        raise AttributeError(f"module 'anyflow.training' has no attribute {name!r}")

    def __dir__():
        return sorted(__all__)
