"""Recognize a plain Wan model, which has no flow map, and read the shift of its scheduler."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from anyflow.formats.architecture import ANYFLOW, FLOW_MAP_KEYS
from anyflow.formats.readers import read_header
from anyflow.models.network import has_flow_map
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.documents import read_json, shortened
from anyflow.utils.validation import brief

_SCHEDULER = "FlowMapEulerDiscreteScheduler"
# Settings of other schedulers that make their schedule another one than a shift alone does.
_UNSUPPORTED = ("use_dynamic_shifting", "shift_terminal", "invert_sigmas")


def is_plain_wan(folder: Path) -> bool:
    """Tell by configuration and headers whether a transformer's folder holds a plain Wan model.

    Args:
        folder: with ``config.json`` and files of weights; a broken one is left to the loader, and
            is none.

    Raises:
        ValueError: the configuration, or a file of weights, is damaged.
    """
    if not os.path.lexists(folder / "config.json"):
        return False
    config = read_json(folder / "config.json")
    if not isinstance(config, Mapping) or config.get(
        "r_embedder", config.get("_class_name") == ANYFLOW
    ):
        return False
    files = sorted(folder.glob("*.safetensors"))
    return bool(files) and not any(
        FLOW_MAP_KEYS in name for file in files for name in read_header(file)
    )


def require_flow_map(folder: Path, transformer: nn.Module | None = None) -> None:
    """Refuse a plain Wan model, which the caller did not ask for.

    Args:
        folder: folder of the transformer.
        transformer: a model in place of the folder's.

    Raises:
        ValueError: the transformer is a plain Wan model.
    """
    if is_plain_wan(folder) if transformer is None else not has_flow_map(transformer):
        name = shortened(folder) if transformer is None else "the transformer"
        raise ValueError(
            f"{name} is a plain Wan model, without the second timestep r of a flow map: it gives "
            "velocities, whose Euler steps need to be many (about 50, with guidance). Pass "
            "euler=True (--euler on the command line) to sample it so (r = t), or name an AnyFlow "
            "checkpoint for videos in a few steps"
        )


def require_one_transformer(model: Path) -> None:
    """Raise a ValueError for a model of two transformers, of which one would be sampled."""
    if os.path.isdir(model / "transformer_2"):
        raise ValueError(
            f"{shortened(model)} has two transformers (transformer/ and transformer_2/, as Wan "
            "2.2), and this pipeline samples with one; use diffusers' WanPipeline, which "
            "anyflow.accelerate makes faster"
        )


def flow_map_scheduler(scheduler: Any) -> FlowMapEulerDiscreteScheduler:
    """Return this library's scheduler with the settings of diffusers' class of the same name.

    A scheduler of this library is returned as it is.

    Raises:
        ValueError: it is another scheduler.
    """
    if isinstance(scheduler, FlowMapEulerDiscreteScheduler):
        return scheduler
    if type(scheduler).__name__ != _SCHEDULER:
        raise ValueError(f"scheduler must be a {_SCHEDULER}, got {type(scheduler).__name__}")
    return FlowMapEulerDiscreteScheduler.from_config(scheduler.config)


def load_scheduler(model: Path, *, euler: bool = False) -> FlowMapEulerDiscreteScheduler:
    """Load the scheduler of a model's folder.

    Args:
        model: folder with ``scheduler``.
        euler: take another scheduler's shift (``flow_shift`` of UniPC and its kin, ``shift`` of
            diffusers' flow-match Euler) and number of training timesteps. The schedule is then this
            library's, ``S(1 - i/n)`` for n steps, which is that of the original Wan's code;
            diffusers' flow-match Euler ends at ``S(S(1/1000))`` before 0.

    Raises:
        ValueError: the file is damaged; or the scheduler is another one, whose schedule is no shift
            of a uniform one or for which ``euler`` is False.
    """
    file = model / "scheduler" / "scheduler_config.json"
    config = read_json(file) if os.path.lexists(file) else {}
    kind = config.get("_class_name", _SCHEDULER) if isinstance(config, Mapping) else _SCHEDULER
    if kind in (_SCHEDULER, "FlowMapDiscreteScheduler"):
        return FlowMapEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
    if not euler:
        raise ValueError(
            f"{shortened(file)} is of {brief(kind)}, which is no scheduler of flow maps; name a "
            f"folder with {_SCHEDULER}"
        )
    name = "flow_shift" if "flow_shift" in config else "shift"
    odd = [f"{key}={brief(config[key])}" for key in _UNSUPPORTED if config.get(key)]
    if (
        name not in config
        or odd
        or config.get("prediction_type", "flow_prediction") != "flow_prediction"
    ):
        if name not in config:
            odd = ["no shift"]
        elif not odd:
            odd = [f"prediction_type={brief(config.get('prediction_type'))}"]
        raise ValueError(
            f"{shortened(file)} ({brief(kind)}) has {', '.join(odd)}: euler=True needs a flow "
            "scheduler with flow_shift or shift alone"
        )
    try:
        return FlowMapEulerDiscreteScheduler(config.get("num_train_timesteps", 1000), config[name])
    except ValueError as error:
        raise ValueError(f"{shortened(file)}: {error}") from None
