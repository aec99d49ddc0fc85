"""Train by a recipe on every rank: ``train_recipe.py RECIPE``."""

import sys
from pathlib import Path

from anyflow.training.recipe import load_recipe
from anyflow.training.trainer import train

if __name__ == "__main__":
    train(load_recipe(Path(sys.argv[1])))
